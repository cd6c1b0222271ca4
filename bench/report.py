"""Result files as Markdown tables and plots; every number comes from a file, losses included.

python -m bench.report bench/results/NVIDIA-A100-SXM4-80GB --output report.md --plots plots
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.report_data import Results, Row, break_even, load, summary
from sdgp_cusparselt.planner.report import table

CONDITIONS = (
    "date",
    "file",
    "commit",
    "command",
    "gpu",
    "driver",
    "power_limit_w",
    "sm_clock_mhz",
    "sm_clock_max_mhz",
    "torch",
    "cuda",
    "triton",
    "cusparselt",
    "sdgp_cusparselt",
    "tune",
)
ON_CPU = (
    "**No GPU: the sparse path ran in the C emulator. These times say that the code runs, nothing "
    "about speed.**"
)
METHOD = (
    "Times are medians of device time with a cold L2 cache, taken in turns with what they are "
    "compared with. A speedup above 1 is a gain; shapes that lose stay in the tables."
)


def render(results: Results) -> str:
    """Return the report as Markdown."""
    on_cpu = "gpu" not in results.conditions[0]
    parts = [ON_CPU if on_cpu else METHOD, _conditions(results)]
    sections: tuple[tuple[str, Callable[[Results], str]], ...] = (
        ("Summary", summary_table),
        ("grad_input: pack and sparse product, against torch.mm", grad_input_table),
        ("grad_weight, and both gradients", other_gradients_table),
        ("The sparse product alone", gemm_table),
        ("Prune and pack, in clones of grad_output", pack_table),
        ("Layers, forward and backward", lambda r: _compared(r.of("layer"))),
        ("Training steps of whole models", model_table),
        ("Training steps of one block", step_table),
        ("Rivals", rivals_table),
        ("Unstructured sparsity, CSR", unstructured_table),
        ("The card", machine_table),
        ("What did not run", not_run_table),
    )
    for title, make in sections:
        body = make(results)
        if body:
            parts.append(f"## {title}\n\n{body}")
    return "\n\n".join(parts) + "\n"


def _conditions(results: Results) -> str:
    rows = []
    for name in CONDITIONS:
        values = list(dict.fromkeys(str(c[name]) for c in results.conditions if c.get(name)))
        if values:
            rows.append([name, ", ".join(values)])
    return table(["condition", "value"], rows)


#: What a summary is made of: title, part, contender.
HEADLINES = (
    ("grad_input, sparse by force", "grad_input", "sdgp"),
    ("grad_input, auto", "grad_input", "auto"),
    ("grad_weight, auto", "grad_weight", "auto"),
    ("both gradients, sparse by force", "both_grads", "sdgp"),
    ("both gradients, auto", "both_grads", "auto"),
    ("sparse product alone (not a headline)", "sparse_gemm", "sdgp"),
)


def summary_table(results: Results) -> str:
    """Return geometric mean, median, extremes, losses and break-even of each headline."""
    rows = []
    for title, part, contender in HEADLINES:
        found = results.of(part, contender)
        if found:
            s = summary(found)
            ratios = [f"{s[n]:.2f}" for n in ("geometric_mean", "median", "lowest", "highest")]
            edge = break_even(found)
            rows.append([title, s["shapes"], *ratios, s["losing"], edge or "none"])
    header = ["against torch.mm", "shapes", "geo. mean", "median", "lowest", "highest", "losing"]
    return table([*header, "gains from N"], rows) if rows else ""


def grad_input_table(results: Results) -> str:
    """Return dense, pack, sparse product, whole and auto of every shape."""
    rows = []
    for net in results.of("grad_input", "sdgp"):
        pack = results.find("pack", "sdgp", net.case)
        product = results.find("sparse_gemm", "sdgp", net.case)
        auto = results.find("grad_input", "auto", net.case)
        rows.append(
            [
                *_shape(net),
                f"{net.reference_us:.1f}",
                *(_us(part) for part in (pack, product, net)),
                f"{net.speedup:.2f}",
                _speedup(auto),
                _chose(auto),
            ]
        )
    header = ["shape", "M", "N", "K", "dense us", "pack us", "product us", "whole us"]
    return table([*header, "speedup", "auto", "auto chose"], rows) if rows else ""


def other_gradients_table(results: Results) -> str:
    """Return speedups of grad_weight and of both gradients."""
    columns = (
        ("grad_weight", "sdgp mvue"),
        ("grad_weight", "auto"),
        ("both_grads", "sdgp"),
        ("both_grads", "auto"),
    )
    rows = []
    for row in results.of("grad_weight", "sdgp mvue"):
        found = [results.find(*column, row.case) for column in columns]
        rows.append([row.case, *map(_us, found), *map(_speedup, found)])
    names = ["weight", "weight auto", "both", "both auto"]
    header = ["shape", *(f"{n} us" for n in names), *(f"{n} speedup" for n in names)]
    return table(header, rows) if rows else ""


def gemm_table(results: Results) -> str:
    """Return the sparse product beside the dense one, with the algorithm that was chosen."""
    rows = []
    for row in results.of("sparse_gemm", "sdgp", "sdgp grad_weight"):
        tflops = row.info["flops"] / row.us / 1e6
        dense = row.info["flops"] / row.reference_us / 1e6
        rejected = f"{len(row.info['rejected'])} of {row.info['tried']}"
        rows.append(
            [
                *_shape(row),
                row.info["product"],
                f"{dense:.1f}",
                f"{tflops:.1f}",
                f"{row.speedup:.2f}",
                row.info["algorithm"],
                rejected,
            ]
        )
    header = ["shape", "M", "N", "K", "product", "dense TFLOP/s", "sparse, dense-equivalent"]
    return table([*header, "speedup", "algorithm", "rejected"], rows) if rows else ""


def pack_table(results: Results) -> str:
    """Return each way of pruning and packing as time, clones and bandwidth."""
    rows = []
    for part in ("prune", "pack", "pack_tokens", "pack_both", "prune_pack"):
        for row in results.of(part):
            clones, bandwidth = row.us / row.reference_us, row.info["bytes"] / row.us / 1e3
            name = [part, row.contender, row.case]
            rows.append([*name, f"{row.us:.1f}", f"{clones:.2f}", f"{bandwidth:.1f}"])
    return table(["part", "who", "shape", "us", "clones", "GB/s"], rows) if rows else ""


def step_table(results: Results) -> str:
    """Return training steps with the memory that they took."""
    rows = []
    for row in results.of("step"):
        peaks = [row.info.get(n) for n in ("step_peak_mib", "reference_step_peak_mib")]
        memory = "-" if None in peaks else f"{peaks[0] / peaks[1]:.3f}"
        saved = f"{1 - row.us / row.reference_us:.1%}"
        times = [f"{row.us:.1f}", f"{row.reference_us:.1f}"]
        rows.append([row.case, row.contender, *times, f"{row.speedup:.3f}", saved, memory])
    header = ["block", "pruned", "us", "dense us", "speedup", "time saved", "peak memory / dense"]
    return table(header, rows) if rows else ""


def model_table(results: Results) -> str:
    """Return whole training steps: time and peak memory in units of dense, what ran sparse."""
    rows = []
    for row in results.of("model_step"):
        peaks = [row.info.get(n) for n in ("peak_mib", "reference_peak_mib")]
        memory = ["-", "-"]
        if None not in peaks:
            memory = [f"{peaks[0] / 1024:.1f}", f"{peaks[0] / peaks[1]:.3f}"]
        ratio = row.us / row.reference_us
        rows.append(
            [
                row.case,
                f"{row.info['parameters'] / 1e6:.1f}",
                row.contender,
                f"{row.us / 1e3:.1f}",
                f"{row.reference_us / 1e3:.1f}",
                f"{ratio:.3f}",
                f"{1 - ratio:.1%}",
                *memory,
                sparse_share(row.info["backends"]),
            ]
        )
    header = ["model", "M parameters", "pruned", "ms", "dense ms", "time / dense", "time saved"]
    return table([*header, "peak GiB", "peak / dense", "products run sparse"], rows) if rows else ""


def sparse_share(backends: dict[str, int]) -> str:
    """Return how many products of a step ran on cuSPARSELt, such as ``grad_input 48 of 96``."""
    parts = []
    for product in ("grad_input", "grad_weight"):
        calls = {key: n for key, n in backends.items() if key.split()[0] == product}
        if calls:
            sparse = calls.get(f"{product} sparse", 0)
            parts.append(f"{product} {sparse} of {sum(calls.values())}")
    return ", ".join(parts) or "none"


def rivals_table(results: Results) -> str:
    """Return what others offer for products and gradients, beside this project's own."""
    parts = ("dense_gemm", "sparse_gemm", "grad_input")
    cases = {row.case for part in parts for row in results.of(part) if row.rival}
    rows = [
        row
        for part in parts
        for row in results.of(part)
        if row.case in cases and row.info.get("product") != "grad_weight"
    ]
    return _compared(sorted(rows, key=lambda row: (row.case, parts.index(row.part))), "part")


def unstructured_table(results: Results) -> str:
    """Return CSR products by sparsity, beside 2:4 on the same shape."""
    rows = [*results.of("csr_gemm"), *results.of("csr_grad_input")]
    cases = {row.case for row in rows}
    rows += [row for row in results.of("grad_input", "sdgp") if row.case in cases]
    return _compared(sorted(rows, key=lambda row: row.case), "part")


def machine_table(results: Results) -> str:
    """Return the ceilings that were measured in the same run."""
    rows = []
    for row in results.of("ceiling"):
        rate = row.info["flops"] / row.us / 1e6, row.info["bytes"] / row.us / 1e3
        text = f"{rate[0]:.1f} TFLOP/s" if row.info["flops"] else f"{rate[1]:.1f} GB/s"
        rows.append([row.contender, text])
    for row in results.of("host_cost"):
        cost = f"{row.info['host_us']:.1f} us (torch.mm {row.info['reference_host_us']:.1f} us)"
        rows.append(["host time of a planned product", cost])
    return table(["what", "measured"], rows) if rows else ""


def not_run_table(results: Results) -> str:
    """Return who has no time, and why; equal reasons together."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for entry in results.not_run:
        key = (entry["part"], entry["contender"], entry["reason"])
        grouped.setdefault(key, []).append(entry["case"])
    rows = [
        [part, who, len(cases), reason.replace("|", "/")]
        for (part, who, reason), cases in grouped.items()
    ]
    return table(["part", "who", "shapes", "reason"], rows) if rows else ""


def _compared(rows: Sequence[Row], *more: str) -> str:
    """Return rows with time, reference and speedup."""
    lines = [
        [
            row.case,
            *(getattr(row, name) for name in more),
            row.contender,
            f"{row.us:.1f}",
            row.reference,
            f"{row.reference_us:.1f}",
            f"{row.speedup:.2f}",
        ]
        for row in rows
    ]
    header = ["shape", *more, "who", "us", "against", "its us", "speedup"]
    return table(header, lines) if lines else ""


def _shape(row: Row) -> list[Any]:
    return [row.case, row.m, row.n, row.k]


def _us(row: Row | None) -> str:
    return "-" if row is None else f"{row.us:.1f}"


def _speedup(row: Row | None) -> str:
    return "-" if row is None else f"{row.speedup:.2f}"


def _chose(row: Row | None) -> str:
    """Return the backend of most calls."""
    if row is None:
        return "-"
    calls = row.info["chose"].get("grad_input", {})
    return max(calls, key=calls.__getitem__) if calls else "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of one card; 2 where there is nothing to report."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="result files, or one card's folder")
    parser.add_argument("--output", type=Path, help="Markdown file (default: stdout)")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also write PNGs here")
    args = parser.parse_args(argv)
    try:
        results = load(args.paths)
    except (ValueError, OSError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    text = render(results)
    if args.plots:
        from bench.report_plots import plot_all

        plot_all(results, args.plots)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
