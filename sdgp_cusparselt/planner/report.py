"""What a plan says: Markdown for people, plain dictionaries for JSON."""

from collections.abc import Sequence
from typing import Any

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


def render(
    problem: Problem,
    trace: Trace,
    forecasts: Sequence[Forecast],
    errors: Sequence[PredictionError],
    *,
    limit: int,
) -> str:
    """Return the whole plan as Markdown; ``limit`` bounds the rows of each GEMM table."""
    parts = [_summary(problem, trace), _overview(forecasts)]
    parts += [_layers(result, limit) for result in forecasts]
    parts += [_paper(), *(_ladder(result) for result in forecasts)]
    parts += [_sources(forecasts), _errors(errors), CAVEAT]
    return "\n\n".join(parts)


def _summary(problem: Problem, trace: Trace) -> str:
    flops = shares(trace)
    total = sum(flops[role] for role in ROLES)
    rows = [[role, f"{flops[role] / 1e12:.3f}", f"{flops[role] / total:.1%}"] for role in ROLES]
    rows.append(["grad_input that SDGP may take", f"{flops['prunable'] / 1e12:.3f}"])
    rows[-1].append(f"{flops['prunable'] / total:.1%}")
    lines = [
        f"{problem.name}: {problem.description}; {trace.parameters / 1e6:.1f} M parameters, "
        f"{len(trace.gemms)} GEMMs a step",
        table(["GEMMs", "TFLOP", "share"], rows),
    ]
    dense = {g.reason: g for g in trace.gemms if g.role == "grad_input" and not g.prunable}
    kept = [f"- stays dense: {g.fqn or 'the model'}: {why}" for why, g in dense.items()]
    return "\n\n".join([*lines, "\n".join(kept)] if kept else lines)


def _overview(forecasts: Sequence[Forecast]) -> str:
    rows = []
    for result in forecasts:
        prunable = [t for t in result.times if t.gemm.prunable]
        edge = break_even(result.gpu, result.efficiency)
        rows.append(
            [
                result.gpu.name,
                f"{result.dense_us / 1e3:.1f}",
                f"{result.sdgp_us / 1e3:.1f}",
                f"{result.dense_us / result.sdgp_us:.3f}",
                f"{result.other / 1e3:.1f}",
                f"{result.speedup:.3f}",
                f"{sum(t.gains for t in prunable)} of {len(prunable)}",
                "none" if edge is None else edge,
            ]
        )
    header = [
        "GPU",
        "dense GEMMs ms",
        "SDGP ms",
        "speedup",
        "other ms",
        "step speedup",
        "layers that gain",
        "break-even width",
    ]
    t = BREAK_EVEN_TOKENS
    note = (
        f"Break-even width: narrowest n for which grad_input [{t}, n] = [{t}, n] @ [n, n]"
        " gains, as do all wider ones."
    )
    return table(header, rows) + "\n\n" + note


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
        times.append(f"{time.dense / time.path:.2f}x" if time.gains else "dense wins")
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


def _sources(forecasts: Sequence[Forecast]) -> str:
    return "\n".join(
        f"{r.gpu.name}: {r.gpu.tflops:g} TFLOP/s, {r.gpu.bandwidth:g} GB/s ({r.gpu.source}); "
        f"efficiencies: {r.efficiency.source}; {r.efficiency.bandwidth:.0%} of the bandwidth and "
        f"{r.efficiency.launch_us:.1f} us a kernel launch "
        f"({'measured' if r.efficiency.measured else 'assumed'})"
        for r in forecasts
    )


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
) -> dict[str, Any]:
    """Return the plan as plain data: every GEMM, every GPU, every source."""
    return {
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
