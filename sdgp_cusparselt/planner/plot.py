"""A plan as one picture: which layers gain on which card, and what is left of the saving."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.planner.models import Problem
from sdgp_cusparselt.planner.roofline import Forecast, ladder, merge

#: Rungs of the ladder that are drawn, and their short names.
RUNGS = {2: "2x, free pruning", 3: "real sparse GEMM", 5: "+ packing, best choice", 6: "whole step"}
COLORS = ("#b8c4d0", "#7fa3c7", "#2f6db0", "#12355b")
MOST_SHAPES = 12


def plot(path: Path, problem: Problem, forecasts: Sequence[Forecast]) -> None:
    """Write the plan as a PNG that stays legible at the width of a README.

    Args:
        path: where to; its folder must exist.
        problem: names the model in the title.
        forecasts: one a card, all of the same trace.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = "Install it: pip install matplotlib."
        raise value_error("plot", "matplotlib", "importable", "no such module", fix) from error
    shapes, gains = gain_matrix(forecasts)
    figure = Figure(
        figsize=(9.5, 2.2 + 0.36 * max(len(shapes), 2 + len(forecasts))), layout="constrained"
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    _heatmap(left, shapes, gains, [f.gpu.name for f in forecasts])
    _ladder(right, forecasts)
    figure.legend(fontsize=9, loc="outside lower center", ncols=5)
    measured = {f.efficiency.measured for f in forecasts}
    basis = {frozenset({True}): "measured", frozenset({False}): "published"}.get(
        frozenset(measured), "measured and published"
    )
    figure.suptitle(f"{problem.name}, {problem.description}: predicted from {basis} efficiencies")
    figure.savefig(path, dpi=160)


def gain_matrix(forecasts: Sequence[Forecast]) -> tuple[list[str], np.ndarray]:
    """Return the labels of the largest prunable shapes, and dense / SDGP time per shape and card.

    Returns:
        Labels, and [shapes, cards] float64.
    """
    counted = [(n, t) for n, t in merge(forecasts[0].times) if t.gemm.prunable][:MOST_SHAPES]
    labels = [f"{n} x  M {t.gemm.m}  N {t.gemm.n}  K {t.gemm.k}" for n, t in counted]
    index = {time.gemm: i for i, time in enumerate(forecasts[0].times)}
    rows = [index[t.gemm] for _, t in counted]
    ratios = [[f.times[i].dense / f.times[i].path for f in forecasts] for i in rows]
    return labels, np.array(ratios, dtype=np.float64).reshape(len(rows), len(forecasts))


def _heatmap(axes: Any, shapes: list[str], gains: np.ndarray, cards: list[str]) -> None:
    """Colour each layer shape and card by how much faster SDGP's whole path is than dense."""
    axes.set_title("grad_input: dense time / (pack + sparse GEMM) time", fontsize=10)
    if not shapes:
        axes.text(0.5, 0.5, "no layer that SDGP may take", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    axes.imshow(np.log(gains), cmap="RdBu", vmin=-np.log(2), vmax=np.log(2), aspect="auto")
    axes.set_xticks(range(len(cards)), cards, fontsize=9)
    axes.set_yticks(range(len(shapes)), shapes, fontsize=9)
    axes.tick_params(length=0)
    for (row, column), gain in np.ndenumerate(gains):
        strong = abs(np.log(gain)) > np.log(1.45)
        color = "white" if strong else "black"
        axes.text(column, row, f"{gain:.2f}", ha="center", va="center", fontsize=9, color=color)


def _ladder(axes: Any, forecasts: Sequence[Forecast]) -> None:
    """Show what remains of the saving as the paper's assumptions are replaced."""
    height = 0.8 / len(RUNGS)
    for place, (rung, name) in enumerate(RUNGS.items()):
        saved = [100 * ladder(f)[rung].saved for f in forecasts]
        at = np.arange(len(forecasts)) + (place - (len(RUNGS) - 1) / 2) * height
        bars = axes.barh(at, saved, height, label=name, color=COLORS[place])
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set_yticks(range(len(forecasts)), [f.gpu.name for f in forecasts], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.axvspan(15, 25, color="#f2c14e", alpha=0.35, lw=0, label="paper: 15-25 %")
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlabel("saved, % of GEMM time (last: of the step)", fontsize=9)
    axes.set_title("what is left of the paper's assumptions", fontsize=10)
