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
- ``critical-batch``: of the same script, R of larger batches and what a dense end is decided by;
- ``preset-gain``: time to the same loss of each preset, as docs/preset_gain.py predicts it;
- ``csr-products``: dense time / CSR time, as docs/csr_products.py measured it.
"""

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdgp_cusparselt.commands.quality import LARGER
from sdgp_cusparselt.telemetry.quality import GradientQuality
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
BLOCK = re.compile(r"<!-- ([a-z-]+): ([^>]+) -->\n(?:.*?<!-- end of \1 -->\n)?", re.DOTALL)
Cell = Callable[[dict[str, Any], int], str]


def with_tables(text: str) -> str:
    """Return a page with every table made anew from the files that it names."""

    def made(match: re.Match[str]) -> str:
        kind, words = match[1], match[2].split()
        if kind not in TABLES:
            return match[0]
        files = [word for word in words if word.endswith(".json")]
        methods = [word for word in words if word not in files]
        documents = [json.loads((ROOT / file).read_text(encoding="utf-8")) for file in files]
        table = TABLES[kind](documents, methods)
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


def bias_table(documents: list[dict[str, Any]]) -> str:
    """Return medians over a model's weights, and the same of its first weight."""
    lines = [
        ["task", "method", "one step", "mean", "bias", "one step, first", "mean, first"],
        ["---", "---", *["---:"] * 5],
    ]
    for task, content in documents[0]["tasks"].items():
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
    # A file of --equal-loss holds the dense runs of other lengths beside its own.
    others = [
        document | {"runs": document["equal_loss"]["dense_runs"]}
        for document in documents
        if "equal_loss" in document
    ]
    return markdown_rows(ratio_rows(steps_ratios([*documents, *others]), shares))


def csr_table(documents: list[dict[str, Any]]) -> str:
    """Return a row per share of zeros: the median, and the least and the most, over the runs."""
    lines = ["| zeros | the product alone | with the conversion |", "| ---: | ---: | ---: |"]
    alone, whole = (documents[0]["dense_over_csr"][part] for part in ("csr_gemm", "csr_grad_input"))
    for share, ratios in alone.items():
        cells = (
            f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
            for found in (ratios, whole[share])
        )
        lines.append(f"| {share} | {' | '.join(cells)} |")
    return "\n".join(lines)


def quality_table(documents: list[dict[str, Any]]) -> str:
    """Return a row per way of pruning: predicted R at each step, and the bias at the middle one."""
    points = documents[0]["measured_at"]
    steps = sorted(points, key=int)
    middle = steps[len(steps) // 2]
    titles = ["way", *(f"R at step {step}" for step in steps), f"bias at {middle}"]
    lines = [titles, ["---", *["---:"] * (len(steps) + 1)]]
    for rows in zip(*(points[step] for step in steps), strict=True):
        ratios = [f"{row['steps_ratio']:.3f}" for row in rows]
        lines.append([rows[0]["name"], *ratios, f"{rows[len(steps) // 2]['bias']:.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def critical_table(documents: list[dict[str, Any]]) -> str:
    """Return a row per step and way: R of this batch and of 4, the mean over pruning's noise."""
    fields = "name", "rho", "bias", "layers", "flop_share", "critical_batches"
    lines = [["step", "critical batch, in batches", "way", "R", "R, 4 times the batch", "signal"]]
    for step, rows in documents[0]["measured_at"].items():
        for row in rows:
            found = GradientQuality(*(row[field] for field in fields))
            ratios = f"{found.steps_ratio:.3f}", f"{found.steps_ratio_at(LARGER):.3f}"
            critical, signal = f"{found.critical_batches:.1f}", f"{found.signal:.1f}"
            lines.append([step, critical, found.name, *ratios, signal])
    return markdown_rows(lines)


def gain_table(documents: list[dict[str, Any]]) -> str:
    """Return a row per model and way: dense time / time to the same loss on each card."""
    gains, ratios = documents[0]["gains"], documents[0]["R"]
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


Documents = list[dict[str, Any]]
#: Kind of a table -> what makes it of the files that it names, and the methods if it has a choice.
TABLES: dict[str, Callable[[Documents, list[str]], str]] = {
    "accuracy": lambda documents, methods: sweep_table(documents, metric_cell, methods),
    "training-loss": lambda documents, methods: sweep_table(documents, loss_cell, methods),
    "gradient-bias": lambda documents, _: bias_table(documents),
    "steps-ratio": lambda documents, _: ratio_table(documents),
    "gradient-quality": lambda documents, _: quality_table(documents),
    "critical-batch": lambda documents, _: critical_table(documents),
    "preset-gain": lambda documents, _: gain_table(documents),
    "csr-products": lambda documents, _: csr_table(documents),
}


def main() -> None:
    """Write the tables of every page."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
