"""Write the tables of measured training runs into the pages: python docs/accuracy.py

A table stands between ``<!-- KIND: FILE ... -->`` and ``<!-- end of KIND -->``; KIND is

- ``accuracy``: final metric, mean ± std over seeds, and in brackets the mean difference to dense
  of the same seed; a column for each result file of ``sdgp train``; methods named before the files
  (``dense readers:mvue@2:4``) are the rows, in that order, in place of all;
- ``training-loss``: the same for the training loss at the end, means only;
- ``gradient-bias``: the file of docs/gradient_bias.py;
- ``steps-ratio``: R, steps to the same loss over those of dense training, from a sweep and dense
  runs of other lengths;
- ``gradient-quality``: R as docs/gradient_quality.py predicts it;
- ``preset-gain``: time to the same loss of each preset, as docs/preset_gain.py predicts it.
"""

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdgp_cusparselt.training.equal_loss import ratio_rows, steps_ratios
from sdgp_cusparselt.training.report import markdown_rows
from sdgp_cusparselt.training.tasks import TASKS

ROOT = Path(__file__).parents[1]
PAGES = tuple(
    ROOT / page
    for page in (
        "README.md",
        "docs/numerics.md",
        "docs/when-is-it-faster.md",
        "docs/sparse-weights.md",
    )
)
BLOCK = re.compile(
    r"<!-- (accuracy|training-loss|gradient-bias|steps-ratio|gradient-quality|preset-gain): "
    r"([^>]+) -->\n"
    r"(?:.*?<!-- end of \1 -->\n)?",
    re.DOTALL,
)
Cell = Callable[[dict[str, Any], int], str]


def with_tables(text: str) -> str:
    """Return a page with every table made anew from the files that it names."""

    def made(match: re.Match[str]) -> str:
        kind, words = match[1], match[2].split()
        files = [word for word in words if word.endswith(".json")]
        methods = [word for word in words if word not in files]
        documents = [json.loads((ROOT / file).read_text(encoding="utf-8")) for file in files]
        if kind == "gradient-bias":
            table = bias_table(documents[0])
        elif kind == "gradient-quality":
            table = quality_table(documents[0])
        elif kind == "preset-gain":
            table = gain_table(documents[0])
        elif kind == "steps-ratio":
            table = ratio_table(documents)
        else:
            cell = metric_cell if kind == "accuracy" else loss_cell
            table = sweep_table(documents, cell, methods)
        return f"<!-- {kind}: {match[2]} -->\n{table}\n<!-- end of {kind} -->\n"

    return BLOCK.sub(made, text)


def sweep_table(documents: list[dict[str, Any]], cell: Cell, methods: Sequence[str] = ()) -> str:
    """Return a row per method and a column per result file, losses kept.

    In square brackets stands how many runs a method has, where others have more.

    Args:
        documents: contents of result files.
        cell: writes a method's row of a file, at so many decimals.
        methods: the rows, in order; all that occur if empty.

    Raises:
        ValueError: a method is in none of the files.
    """
    titles = ["method", *(_title(document, cell) for document in documents)]
    lines = [titles, ["---", *["---:"] * len(documents)]]
    labels: dict[str, str] = {}
    for document in documents:
        labels |= {row["method"]: row["label"] for row in document["summary"]}
    columns = [{row["method"]: row for row in document["summary"]} for document in documents]
    # A fourth decimal says nothing beside these spreads, and makes the table too wide for a page.
    digits = [min(3, TASKS[document["task"]].metric.digits) for document in documents]
    if unknown := [method for method in methods if method not in labels]:
        raise ValueError(f"sweep_table: methods must be of {', '.join(labels)}, got {unknown}.")
    for method in methods or labels:
        cells = []
        for column, places in zip(columns, digits, strict=True):
            row = column.get(method)
            runs = 0 if row is None else len(row["values"])
            most = max(len(other["values"]) for other in column.values())
            number = f" [{runs}]" if runs < most else ""
            cells.append(cell(row, places) + number if row is not None and runs else "")
        lines.append([labels[method], *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _title(document: dict[str, Any], cell: Cell) -> str:
    metric = document["metric"]
    unit = "nats" if cell is loss_cell else "%" if metric["unit"] == "%" else metric["name"]
    return f"{document['task']}, {unit}"


def metric_cell(row: dict[str, Any], digits: int) -> str:
    """Return mean ± std and the difference to dense, or how many runs ended in no number."""
    if row["num_not_finite"]:
        return f"{row['num_not_finite']} of {len(row['values'])} not finite"
    spread = f"{row['mean']:.{digits}f}"
    if row["std"] is not None:
        spread += f" ± {row['std']:.{digits}f}"
    if row["method"] == "dense":
        return spread
    return f"{spread} ({row['difference_mean']:+.{digits}f})"


def loss_cell(row: dict[str, Any], digits: int) -> str:
    """Return the mean training loss at the end; the metric's digits do not matter to it."""
    return "-" if row["train_loss"] is None else f"{row['train_loss']:.4f}"


def bias_table(document: dict[str, Any]) -> str:
    """Return medians over a model's weights, and the same of its first weight."""
    lines = [
        ["task", "method", "one step", "mean", "bias", "one step, first", "mean, first"],
        ["---", "---", *["---:"] * 5],
    ]
    for task, content in document["tasks"].items():
        for spelling, rows in content["methods"].items():
            if spelling == "dense":
                continue
            steps, means = ([_angle(row[key]) for row in rows] for key in _COSINES)
            angles = [statistics.median(steps), statistics.median(means), steps[0], means[0]]
            step, mean, step_first, mean_first = (f"{angle:.1f}°" for angle in angles)
            bias = f"{statistics.median(row['bias'] for row in rows):.3f}"
            method = spelling.partition("@")[0]
            lines.append([task, method, step, mean, bias, step_first, mean_first])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio_table(documents: list[dict[str, Any]]) -> str:
    """Return a row per method and length: its gap to dense and R, mean ± std over the seeds."""
    shares = {
        run["label"]: run["pruned_flop_share"] for document in documents for run in document["runs"]
    }
    return markdown_rows(ratio_rows(steps_ratios(documents), shares))


def quality_table(document: dict[str, Any]) -> str:
    """Return a row per way of pruning: predicted R at each step, and the bias at the middle one."""
    points = document["measured_at"]
    steps = sorted(points, key=int)
    middle = steps[len(steps) // 2]
    titles = ["way", *(f"R at step {step}" for step in steps), f"bias at {middle}"]
    lines = [titles, ["---", *["---:"] * (len(steps) + 1)]]
    for rows in zip(*(points[step] for step in steps), strict=True):
        ratios = [f"{row['steps_ratio']:.3f}" for row in rows]
        lines.append([rows[0]["name"], *ratios, f"{rows[len(steps) // 2]['bias']:.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gain_table(document: dict[str, Any]) -> str:
    """Return a row per model and way: dense time / time to the same loss on each card."""
    gains, ratios = document["gains"], document["R"]
    cards = list(next(iter(gains.values())))
    lines = [["model", "prunes", "R", *cards]]
    for model, by_card in gains.items():
        for way, ratio in ratios.items():
            cells = [f"{by_card[card][way][1]:.3f}" for card in cards]
            lines.append([model, way, f"{ratio:.3f}", *cells])
    return markdown_rows(lines)


_COSINES = ("cosine_step", "cosine_mean")


def _angle(cosine: float) -> float:
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine))))


def main() -> None:
    """Write the tables of every page."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
