"""What a plan says: a verdict for each card, tables below it, plain dictionaries for JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from sdgp_cusparselt.layers.presets import Preset
from sdgp_cusparselt.planner.gemms import Trace
from sdgp_cusparselt.planner.models import Problem
from sdgp_cusparselt.planner.results import PredictionError
from sdgp_cusparselt.planner.roofline import (
    BREAK_EVEN_TOKENS,
    Forecast,
    GemmTime,
    break_even,
    heavy_rows,
    ladder,
    merge,
    paper_saving,
)
from sdgp_cusparselt.planner.steps_ratios import MEASURED

ROLES = ("forward", "grad_input", "grad_weight")
#: Below this a predicted speedup of a step is within what the roofline leaves out.
WORTHWHILE = 1.01
COLUMNS_NOTE = (
    f"from width: narrowest n for which grad_input [{BREAK_EVEN_TOKENS}, n] = "
    f"[{BREAK_EVEN_TOKENS}, n] @ [n, n] gains, as do all wider ones."
)
CAVEAT = (
    "Predictions, not measurements: a roofline of single kernels. Optimizer, data loading and "
    "communication are not in it; other ops count as unfused memory traffic."
)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an aligned Markdown table; the first column left, the others right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(_pad(c, w, i) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return " |\n".join([lines[0], "| " + " | ".join(rule), *lines[1:]]) + " |"


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def shares(trace: Trace) -> dict[str, int]:
    """Return FLOPs by role, and those that SDGP may take, of one step."""
    total = {role: sum(g.flops for g in trace.gemms if g.role == role) for role in ROLES}
    return total | {"prunable": sum(g.flops for g in trace.gemms if g.prunable)}


@dataclass(frozen=True)
class StepsRatio:
    """R, and where it comes from.

    Attributes:
        value: steps to the same loss over those of dense training.
        source: in words; empty where the user gave it.
    """

    value: float
    source: str = ""


def steps_ratio(preset: Preset | None, given: float | None, heavy: float) -> StepsRatio | None:
    """Return R as the user gave it, or as it was measured for a preset; None without either."""
    if given is not None:
        return StepsRatio(given)
    if preset is None or heavy:
        return None
    found = MEASURED[preset]
    return StepsRatio(found.mean, f" ({preset}: {found.source})")


def time_to_loss(result: Forecast, ratio: StepsRatio) -> str:
    """Return what a step's speedup is worth if the same loss takes R times as many steps.

    time dense / time SDGP to the same loss = speedup / R

    Args:
        result: of one card.
        ratio: R, as ``sdgp quality`` predicts it or a preset was measured.
    """
    if not _gaining(result)[0]:
        return f"{result.gpu.name}: nothing gains, so nothing is pruned: neither win nor loss."
    worth = result.speedup / ratio.value
    word = "win" if worth > 1 else "loss"
    end = f"a {word} of {abs(worth - 1):.1%}" if worth != 1 else "neither win nor loss"
    given = f"with R = {ratio.value:g}{ratio.source}"
    return f"{result.gpu.name}: {given}, {worth:.3f}x to the same loss: {end}."


def verdict(result: Forecast) -> str:
    """Return what to expect of one card, in one sentence."""
    dense, sdgp = _step_ms(result)
    gains, layers = _gaining(result)
    name, what = result.gpu.name, _counted(result)
    if not layers:
        return f"{name}: no layer of this model can be pruned, so nothing changes."
    if result.speedup < WORTHWHILE:
        few = f"{gains} of {layers} {what} would gain" if gains else f"no {what[:-1]} would gain"
        return f"{name}: no gain to speak of is predicted for a step of {dense} ms; {few}."
    return (
        f"{name}: a step is predicted to be {result.speedup:.2f}x as fast, "
        f"{sdgp} ms instead of {dense}; {gains} of {layers} {what} gain."
    )


def summary(problem: Problem, trace: Trace) -> list[str]:
    """Return sentences: the model, the share that SDGP may take, what stays plain and why."""
    flops = shares(trace)
    total = sum(flops[role] for role in ROLES)
    lines = [
        f"{problem.name}: {problem.description}; {trace.parameters / 1e6:.1f} M parameters, "
        f"{len(trace.gemms)} GEMMs of {total / 1e12:.3g} TFLOP a step, of which SDGP may take "
        f"{flops['prunable'] / max(total, 1):.1%}."
    ]
    plain = {g.reason: g for g in trace.gemms if g.role == "grad_input" and not g.prunable}
    return lines + [f"Stays plain: {g.fqn or 'the model'}: {why}." for why, g in plain.items()]


def packing_notes(trace: Trace, forecasts: Sequence[Forecast], heavy: float) -> list[str]:
    """Return sentences: which layers' gradients are packed where they are made, or what rows."""
    if heavy:
        tokens = max((g.m for g in trace.gemms if g.prunable and g.role == "grad_input"), default=0)
        rows = heavy_rows(tokens, heavy)
        return [
            f"Heavy tokens: {rows} of {tokens} tokens take a second row in grad_input; their norms "
            "take a read of the gradient."
        ]
    if not any(result.packing.fuse for result in forecasts):
        return []
    behind: dict[str, int] = {}
    layers = {g.call for g in trace.gemms if g.prunable}
    for call in layers & set(trace.activations):
        name = trace.activations[call]
        behind[name] = behind.get(name, 0) + 1
    if not behind:
        return ["Fused: none; no activation follows a layer that SDGP may take at once."]
    kinds = ", ".join(f"{count} behind {name}" for name, count in sorted(behind.items()))
    return [
        f"Fused: {sum(behind.values())} of {len(layers)} layers, {kinds}: packing adds 1.125 bytes "
        "an element to the activation's backward for one sparse product, 0.25 for two, in place of "
        "3.125 or 4.25 in a pass of its own."
    ]


def overview(forecasts: Sequence[Forecast], before: Sequence[Forecast] | None = None) -> Table:
    """Return one row a card, within 60 columns.

    Args:
        forecasts: one a card.
        before: the same without fused packs, for a column of their speedups.
    """
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("GPU")
    what = _counted(forecasts[0])
    titles = ["dense ms", "SDGP ms", "speedup", f"{what} gain", "from width"]
    if before is not None:
        titles[2:3] = ["unfused", "fused"]
        titles.remove("from width")
    for title in titles:
        shown.add_column(title, justify="right")
    for number, result in enumerate(forecasts):
        edge = break_even(result.gpu, result.efficiency)
        gains, layers = _gaining(result)
        cells = [*_step_ms(result), f"{result.speedup:.3f}x", f"{gains} of {layers}"]
        if before is not None:
            cells.insert(2, f"{before[number].speedup:.3f}x")
        else:
            cells.append("none" if edge is None else str(edge))
        shown.add_row(result.gpu.name, *cells)
    return shown


def _step_ms(result: Forecast) -> tuple[str, str]:
    """Return the milliseconds of the dense step and of the one with SDGP, to three digits."""
    steps = ((gemms + result.other) / 1e3 for gemms in (result.dense_us, result.sdgp_us))
    dense, sdgp = (f"{ms:.{2 if ms < 10 else 1 if ms < 100 else 0}f}" for ms in steps)
    return dense, sdgp


def _counted(result: Forecast) -> str:
    """Return what ``_gaining`` counts: a layer has one product that is pruned, or two."""
    both = any(t.gemm.prunable and t.gemm.role == "grad_weight" for t in result.times)
    return "products" if both else "layers"


def _gaining(result: Forecast) -> tuple[int, int]:
    prunable = [t for t in result.times if t.gemm.prunable]
    return sum(t.gains for t in prunable), len(prunable)


def details(
    trace: Trace,
    forecasts: Sequence[Forecast],
    errors: Sequence[PredictionError],
    *,
    limit: int,
) -> str:
    """Return every table as Markdown; ``limit`` bounds the rows of each GEMM table."""
    parts = [_flops(trace), *(_layers(result, limit) for result in forecasts)]
    parts += [_paper(), *(_ladder(result) for result in forecasts), _errors(errors)]
    return "\n\n".join(parts)


def sources(forecasts: Sequence[Forecast]) -> list[str]:
    """Return where each card's numbers stand, one paragraph a card."""
    return [
        f"{r.gpu.name}: {r.gpu.tflops:g} TFLOP/s, {r.gpu.bandwidth:g} GB/s ({r.gpu.source}); "
        f"efficiencies: {r.efficiency.source}; {r.efficiency.bandwidth:.0%} of the bandwidth and "
        f"{r.efficiency.launch_us:.1f} us a kernel launch "
        f"({'measured' if r.efficiency.measured else 'assumed'})"
        for r in forecasts
    ]


def _flops(trace: Trace) -> str:
    flops = shares(trace)
    total = max(sum(flops[role] for role in ROLES), 1)
    named = [(role, flops[role]) for role in ROLES]
    named.append(("grad_input that SDGP may take", flops["prunable"]))
    rows = [[name, f"{count / 1e12:.3f}", f"{count / total:.1%}"] for name, count in named]
    return table(["GEMMs", "TFLOP", "share"], rows)


def _layers(result: Forecast, limit: int) -> str:
    header = [
        "GEMM",
        "M",
        "N",
        "K",
        "count",
        "dense us",
        "pack",
        "sparse",
        "fold",
        "SDGP us",
        "gain",
    ]
    counted = merge(result.times)
    rows = [_row(count, time) for count, time in counted[:limit]]
    basis = "measured" if result.efficiency.measured else "published"
    title = f"{result.gpu.name}: {basis} efficiencies"
    left = len(counted) - limit
    more = f"\n\n{left} more shapes: --limit" if left > 0 else ""
    return f"{title}\n\n{table(header, rows)}{more}"


def _row(count: int, time: GemmTime) -> list[object]:
    gemm = time.gemm
    times = [f"{time.dense:.1f}"]
    if gemm.prunable:
        times += [f"{us:.1f}" for us in (time.pack, time.sparse, time.fold, time.path)]
        times.append(f"{time.dense / time.path:.2f}x" if time.gains else "plain wins")
    else:
        times += ["", "", "", "", ""]
    batch = f"{count} x {gemm.batch}" if gemm.batch > 1 else str(count)
    return [f"{gemm.kind} {gemm.role}", gemm.m, gemm.n, gemm.k, batch, *times]


def _paper() -> str:
    rows = [[f"{f:.1%}", f"{paper_saving(f):.1%}"] for f in (0.30, 1 / 3, 0.50)]
    text = "The paper's 15-25 % of a step, as arithmetic: 2x sparse GEMMs, pruning free."
    return f"{text}\n\n{table(['share of the step in pruned GEMMs', 'saved'], rows)}"


def _ladder(result: Forecast) -> str:
    rows = [[rung.assumption, f"{rung.saved:.1%}"] for rung in ladder(result)]
    return table([f"{result.gpu.name}: assumption", "saved"], rows)


def _errors(errors: Sequence[PredictionError]) -> str:
    if not errors:
        return "Prediction error: no result files to compare with."
    rows = [
        [f"{e.path.parent.name}/{e.path.name}", e.part, e.count, f"{e.bias:.2f}", f"{e.spread:.2f}"]
        for e in errors
    ]
    return table(["result file", "part", "points", "predicted / measured", "off by"], rows)


def as_json(
    problem: Problem,
    trace: Trace,
    forecasts: Sequence[Forecast],
    errors: Sequence[PredictionError],
    ratio: StepsRatio | None = None,
    before: Sequence[Forecast] | None = None,
) -> dict[str, Any]:
    """Return the plan as plain data: every GEMM, every GPU, every source; R if there is one."""
    unfused = [None] * len(forecasts) if before is None else [f.speedup for f in before]
    cards = zip(forecasts, unfused, strict=True)
    return {
        "steps_ratio": None if ratio is None else ratio.value,
        "model": problem.name,
        "problem": problem.description,
        "parameters": trace.parameters,
        "flops": shares(trace),
        "caveat": CAVEAT,
        "gpus": [_gpu_json(result) | {"unfused_speedup": old} for result, old in cards],
        "prediction_errors": [
            {
                "file": f"{e.path.parent.name}/{e.path.name}",
                "part": e.part,
                "points": e.count,
                "bias": e.bias,
                "spread": e.spread,
            }
            for e in errors
        ],
    }


def _gpu_json(result: Forecast) -> dict[str, Any]:
    return {
        "gpu": result.gpu.name,
        "verdict": verdict(result),
        "tflops": result.gpu.tflops,
        "bandwidth_gbs": result.gpu.bandwidth,
        "source": result.gpu.source,
        "efficiency_source": result.efficiency.source,
        "measured": result.efficiency.measured,
        "dense_gemm_us": result.dense_us,
        "sdgp_gemm_us": result.sdgp_us,
        "other_us": result.other,
        "step_speedup": result.speedup,
        "break_even": {
            "tokens": BREAK_EVEN_TOKENS,
            "width": break_even(result.gpu, result.efficiency),
        },
        "ladder": [{"assumption": r.assumption, "saved": r.saved} for r in ladder(result)],
        "gemms": [_gemm_json(time) for time in result.times],
    }


def _gemm_json(time: GemmTime) -> dict[str, Any]:
    gemm = time.gemm
    return {
        "fqn": gemm.fqn,
        "kind": gemm.kind,
        "role": gemm.role,
        "M": gemm.m,
        "N": gemm.n,
        "K": gemm.k,
        "batch": gemm.batch,
        "flops": gemm.flops,
        "prunable": gemm.prunable,
        "reason": gemm.reason,
        "dense_us": time.dense,
        "pack_us": time.pack,
        "sparse_us": time.sparse,
        "fold_us": time.fold,
        "gains": time.gains,
    }
