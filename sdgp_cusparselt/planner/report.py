"""What a plan says: a verdict for each card, tables below it, plain dictionaries for JSON."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from sdgp_cusparselt.planner.gemms import Trace
from sdgp_cusparselt.planner.models import Problem
from sdgp_cusparselt.planner.results import PredictionError
from sdgp_cusparselt.planner.roofline import (
    BREAK_EVEN_TOKENS,
    Forecast,
    GemmTime,
    break_even,
    ladder,
    merge,
    paper_saving,
)

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


def time_to_loss(result: Forecast, steps_ratio: float) -> str:
    """Return what a step's speedup is worth if the same loss takes R times as many steps.

    time dense / time SDGP to the same loss = speedup / R

    Args:
        result: of one card.
        steps_ratio: R, as ``sdgp quality`` predicts it.
    """
    worth = result.speedup / steps_ratio
    word = "a win" if worth > 1 else "a loss" if worth < 1 else "neither win nor loss"
    return f"{result.gpu.name}: with R = {steps_ratio:g}, {worth:.3f}x to the same loss: {word}."


def verdict(result: Forecast) -> str:
    """Return what to expect of one card, in one sentence."""
    dense, sdgp = _step_ms(result)
    gains, layers = _gaining(result)
    name = result.gpu.name
    if not layers:
        return f"{name}: no layer of this model can be pruned, so nothing changes."
    if result.speedup < WORTHWHILE:
        few = f"{gains} of {layers} layers would gain" if gains else "no layer would gain"
        return f"{name}: no gain to speak of is predicted for a step of {dense} ms; {few}."
    return (
        f"{name}: a step is predicted to be {result.speedup:.2f}x as fast, "
        f"{sdgp} ms instead of {dense}; {gains} of {layers} layers gain."
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


def overview(forecasts: Sequence[Forecast]) -> Table:
    """Return one row a card, within 60 columns."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("GPU")
    for title in ("dense ms", "SDGP ms", "speedup", "layers gain", "from width"):
        shown.add_column(title, justify="right")
    for result in forecasts:
        edge = break_even(result.gpu, result.efficiency)
        gains, layers = _gaining(result)
        shown.add_row(
            result.gpu.name,
            *_step_ms(result),
            f"{result.speedup:.3f}x",
            f"{gains} of {layers}",
            "none" if edge is None else str(edge),
        )
    return shown


def _step_ms(result: Forecast) -> tuple[str, str]:
    """Return the milliseconds of the dense step and of the one with SDGP, to three digits."""
    steps = ((gemms + result.other) / 1e3 for gemms in (result.dense_us, result.sdgp_us))
    dense, sdgp = (f"{ms:.{2 if ms < 10 else 1 if ms < 100 else 0}f}" for ms in steps)
    return dense, sdgp


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
    steps_ratio: float | None = None,
) -> dict[str, Any]:
    """Return the plan as plain data: every GEMM, every GPU, every source; R if one was given."""
    return {
        "steps_ratio": steps_ratio,
        "model": problem.name,
        "problem": problem.description,
        "parameters": trace.parameters,
        "flops": shares(trace),
        "caveat": CAVEAT,
        "gpus": [_gpu_json(result) for result in forecasts],
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
