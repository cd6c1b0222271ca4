"""Predicted against trained steps to the same loss: python docs/gradient_plot.py

Every way of pruning that was trained is a dot: across, R = 1 + rho as docs/gradient_quality.py
measured it along a dense run, from its first to its last step, the dot at the middle one; up, R of
trained models, mean and standard deviation over seeds. Ways that were not trained lie hollow on
the line on which prediction and training agree.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdgp_cusparselt.training.equal_loss import StepsRatio, steps_ratios

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
TRAINED = (
    "presets",
    "heavy",
    "heavy-shares",
    "heavy-presets",
    *(f"dense-{n}" for n in (700, 800, 900, 1100)),
)
#: Name of a way in the file of predictions -> label of the trained method.
SAME = {
    "mvue": "mvue 2:4",
    "magnitude": "magnitude 2:4",
    "readers: mvue": "readers: mvue 2:4",
    "readers: magnitude": "readers: magnitude 2:4",
    "grad_weight: mvue": "grad_weight: mvue 2:4",
    "balanced: mvue": "balanced: mvue 2:4",
    "mvue, heaviest 2% of tokens exact": "mvue 2:4, heaviest 0.02 exact",
    "mvue, heaviest 6% of tokens exact": "mvue 2:4, heaviest 0.06 exact",
    "mvue, heaviest 12% of tokens exact": "mvue 2:4, heaviest 0.12 exact",
    "readers: mvue, heaviest 6% exact": "readers: mvue 2:4, heaviest 0.06 exact",
}
#: Where a dot's name stands beside it, in points.
OFFSETS = {
    "mvue": (10, 8),
    "magnitude": (8, -14),
    "readers: mvue": (10, -4),
    "readers: magnitude": (8, -14),
    "grad_weight: mvue": (6, -22),
    "balanced: mvue": (8, 6),
    "mvue, heaviest 2% of tokens exact": (-136, 20),
    "mvue, heaviest 6% of tokens exact": (-142, 10),
    "mvue, heaviest 12% of tokens exact": (10, -18),
    "readers: mvue, heaviest 6% exact": (14, -22),
}
LARGEST = 1.26
INK, DOT = "#12355b", "#c0504d"


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/img/rho-against-r.png")
    args = parser.parse_args()
    predicted = predictions(_read("gradient-quality"))
    documents = [_read(f"code-lm-{name}") for name in TRAINED]
    # An earlier sweep, of which only what the others lack is taken: its dense runs are its own.
    earlier = _read("code-lm-gradient-bias")
    biased = [run for run in earlier["runs"] if run["label"] == SAME["magnitude"]]
    documents.append(earlier | {"runs": biased})
    draw(predicted, {found.label: found for found in steps_ratios(documents)}, args.plot)


def _read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def predictions(document: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return way -> R at each step of the dense run, in order."""
    points = document["measured_at"]
    steps = sorted(points, key=int)
    rows = zip(*(points[step] for step in steps), strict=True)
    return {row[0]["name"]: [point["steps_ratio"] for point in row] for row in rows}


def draw(
    predicted: Mapping[str, list[float]], trained: Mapping[str, StepsRatio], path: Path
) -> None:
    """Draw every way as a dot, with what it scatters by."""
    figure = Figure(figsize=(8, 6.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([1, LARGEST], [1, LARGEST], color=INK, lw=1, label="predicted = trained")
    others = []
    for name, ratios in predicted.items():
        if SAME.get(name) in trained:
            _dot(axes, name, ratios, trained[SAME[name]])
        elif ratios[1] <= LARGEST:
            others.append(ratios[1])
    style = {"mfc": "white", "mec": INK, "ls": "", "ms": 6}
    axes.plot(others, others, marker="o", label="predicted, not trained", **style)
    axes.set(
        xlabel="R = 1 + rho, predicted at step 500 of 1,000 (bar: steps 200 to 800)",
        ylabel="R trained, mean ± std of 3 seeds",
        xlim=(0.99, LARGEST),
        ylim=(0.96, LARGEST),
        title="Steps to the same loss on code-lm",
    )
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def _dot(axes: Axes, name: str, ratios: list[float], found: StepsRatio) -> None:
    first, middle, last = ratios
    text, height, spread = name.replace(" of tokens", ""), found.mean, found.std
    if found.bound or height > LARGEST:  # an arrow to what lies above the picture
        text, height, spread = f"{name}: {found.text.partition(' ±')[0]}", LARGEST - 0.012, None
    bars = [[max(0.0, middle - first)], [max(0.0, last - middle)]]
    marker = "^" if spread is None else "o"
    axes.errorbar(middle, height, yerr=spread, xerr=bars, fmt=marker, color=DOT, capsize=3)
    axes.annotate(
        text, (middle, height), OFFSETS.get(name, (8, 6)), textcoords="offset points", fontsize=9
    )


if __name__ == "__main__":
    main()
