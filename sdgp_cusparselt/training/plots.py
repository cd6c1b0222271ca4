"""Learning curves and sweep charts as PNG, through matplotlib's Agg canvas."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdgp_cusparselt.cache import write_atomically
from sdgp_cusparselt.extras import require
from sdgp_cusparselt.telemetry.colours import COLOURS
from sdgp_cusparselt.training.tasks import Metric

PIXELS_PER_INCH = 150
#: Interquartile ranges from the median at which an arrow stands for a value.
FAR = 8.0


def check_matplotlib() -> None:
    """Raise MissingPackageError now rather than after hours of training."""
    require("matplotlib.figure", package="matplotlib", purpose="--plot")


def plot_curves(document: dict[str, Any], metric: Metric, path: Path) -> None:
    """Draw metric and training loss over steps, one mean line per method with its min-max band.

    Runs on a GPU get a third panel, the metric over the time that their training steps took. On a
    CPU pruning costs time and saves none.

    Args:
        document: content of ``--json``.
        metric: of the task. An accuracy is drawn as an error on a logarithmic axis, where the
            differences at the end of training can be seen.
        path: PNG file to write.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    timed = document["environment"]["device_type"] == "cuda"
    figure = _figure(width=16.0 if timed else 11.0, height=4.6)
    left, right, *over_time = figure.subplots(1, 3 if timed else 2)
    colours = _colours(document["summary"])
    for entry in document["summary"]:
        runs = [r for r in document["runs"] if r["identity"]["method"] == entry["method"]]
        steps = [point["step"] for point in runs[0]["history"]]
        style = colours[entry["method"]]
        errors = _error(_curves(runs, "metric"), metric)
        _band(left, steps, errors, _label(entry, metric), **style)
        _band(right, steps, _curves(runs, "train_loss"), entry["label"], **style)
        for axes in over_time:
            _band(axes, _seconds(runs), errors, entry["label"], **style)
    for axes in (left, *over_time):
        axes.set_ylabel(_error_name(metric))
        if metric.higher_is_better:
            axes.set_yscale("log")
            _plain_log_ticks(axes)
    right.set_ylabel("training loss, nats")
    for axes in (left, right, *over_time):
        axes.set_xlabel("seconds of training steps" if axes in over_time else "optimizer step")
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8, title=_legend_title(document, metric), title_fontsize=8)
    bands = ", bands from min to max" if len(document["summary"][0]["seeds"]) > 1 else ""
    figure.suptitle(_title(document) + bands, fontsize=11)
    _save(figure, path)


def plot_rows(document: dict[str, Any], metric: Metric, path: Path) -> None:
    """Draw one line per method: each seed a dot, the mean a bar, dense's range as a band.

    Values far from most others are arrows at the edge; their mean stands beside the chart.

    Args:
        document: content of ``--json``.
        metric: of the task.
        path: PNG file to write.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    summary = document["summary"]
    figure = _figure(width=8.0, height=1.6 + 0.36 * len(summary))
    axes = figure.subplots()
    colours, limits = _colours(summary), _limits(summary)
    if limits is not None:
        axes.set_xlim(*limits)
    for position, entry in enumerate(summary):
        values = [value for value in entry["values"] if value is not None]
        colour = colours[entry["method"]]["color"]
        axes.plot(values, [position] * len(values), "o", color=colour, alpha=0.45, markersize=5)
        for edge, marker, beyond in zip(limits or (), "<>", (np.less, np.greater), strict=False):
            if any(beyond(value, edge) for value in values):
                axes.plot([edge], [position], marker, color=colour, clip_on=False, markersize=8)
        if entry["mean"] is not None:
            axes.plot([entry["mean"]], [position], "|", color=colour, markersize=17, mew=2.5)
            text = f"  {metric.format(entry['mean'])}"
            axes.annotate(text, (1.0, position), xycoords=axes.get_yaxis_transform(), va="center")
        if entry["method"] == "dense" and values:
            axes.axvspan(min(values), max(values), color="black", alpha=0.08, lw=0)
    axes.set_yticks(range(len(summary)), [entry["label"] for entry in summary])
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric.name}, {metric.unit} (dots: seeds, bars: means, band: dense)")
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(document), fontsize=11)
    _save(figure, path)


def _limits(summary: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """Return where to cut the axis off, so that one row far away does not hide all others."""
    values = np.array([v for entry in summary for v in entry["values"] if v is not None])
    if not values.size:
        return None
    low, high = np.quantile(values, (0.25, 0.75))
    inside = values[np.abs(values - np.median(values)) <= FAR * (high - low)]
    if not 0.8 * values.size <= inside.size < values.size:
        return None
    margin = 0.06 * (inside.max() - inside.min())
    return float(inside.min() - margin), float(inside.max() + margin)


def _figure(width: float, height: float) -> Any:
    figures = require("matplotlib.figure", package="matplotlib", purpose="--plot")
    return figures.Figure(figsize=(width, height), dpi=PIXELS_PER_INCH, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    canvas = require("matplotlib.backends.backend_agg", package="matplotlib", purpose="--plot")
    canvas.FigureCanvasAgg(figure)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, lambda file: file.write(image.getvalue()))


def _colours(summary: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Give each method a colour, and dashes once the palette starts over; dense is black."""
    styles: dict[str, dict[str, Any]] = {"dense": {"color": "black", "linestyle": "-"}}
    others = [entry["method"] for entry in summary if entry["method"] != "dense"]
    for index, method in enumerate(others):
        dashes = ("-", "--", ":")[index // len(COLOURS) % 3]
        styles[method] = {"color": COLOURS[index % len(COLOURS)], "linestyle": dashes}
    return styles


def _curves(runs: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """Return [num_runs, num_points]; a value that was not finite is NaN, which draws nothing."""
    return np.array([[point[key] for point in run["history"]] for run in runs], dtype=float)


def _seconds(runs: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return [num_points] seconds of training steps, the mean over runs; evaluations left out."""
    steps = np.diff([0, *(point["step"] for point in runs[0]["history"])])
    return np.cumsum(steps * _curves(runs, "ms_per_step").mean(axis=0) / 1e3)


def _band(
    axes: Any, steps: Sequence[int] | np.ndarray, curves: np.ndarray, label: str, **style: Any
) -> None:
    axes.plot(steps, curves.mean(axis=0), label=label, linewidth=1.6, **style)
    if len(curves) > 1:
        low, high = curves.min(axis=0), curves.max(axis=0)
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _error(values: np.ndarray, metric: Metric) -> np.ndarray:
    return 100.0 - values if metric.higher_is_better else values


def _error_name(metric: Metric) -> str:
    if metric.higher_is_better:
        return "validation error, %"
    return f"validation {metric.name}, {metric.unit}"


def _plain_log_ticks(axes: Any) -> None:
    ticker = require("matplotlib.ticker", package="matplotlib", purpose="--plot")
    axes.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _label(entry: dict[str, Any], metric: Metric) -> str:
    text = f"{entry['label']}: {metric.format(entry['mean'])}"
    return text if entry["std"] is None else f"{text} ± {metric.format(entry['std'])}"


def _legend_title(document: dict[str, Any], metric: Metric) -> str:
    spread = " ± std" if len(document["summary"][0]["seeds"]) > 1 else ""
    return f"final {metric.name}, {metric.unit}{spread}"


def _title(document: dict[str, Any]) -> str:
    seeds = len(document["summary"][0]["seeds"])
    number = "1 seed" if seeds == 1 else f"{seeds} seeds"
    return f"{document['task']}: {document['data']['source']}, {number}"
