"""The results table, for a terminal and as Markdown, from one list of rows."""

from collections.abc import Sequence
from typing import Any, Literal

from rich.table import Table

from sdgp_cusparselt.training.tasks import Metric


def header(metric: Metric, num_seeds: int) -> list[str]:
    """Return the column titles."""
    seeds = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds"
    spread = "" if num_seeds == 1 else " ± std"
    return [
        "method",
        f"{metric.name}, {metric.unit}{spread} ({seeds})",
        "min to max",
        "minus dense",
        "training loss",
        "ms per step",
        "grad_input FLOPs pruned",
        "backend",
    ]


def rows(summary: Sequence[dict[str, Any]], metric: Metric) -> list[list[str]]:
    """Return the cells, one list per method."""
    return [_row(entry, metric) for entry in summary]


def _row(entry: dict[str, Any], metric: Metric) -> list[str]:
    text = metric.format
    mean = text(entry["mean"])
    if entry["std"] is not None:
        mean += f" ± {text(entry['std'])}"
    if entry["num_not_finite"]:
        mean += f" ({entry['num_not_finite']} not finite)"
    return [
        entry["label"],
        mean,
        f"{text(entry['min'])} to {text(entry['max'])}",
        _difference(entry, metric),
        "-" if entry["train_loss"] is None else f"{entry['train_loss']:.4f}",
        f"{entry['ms_per_step']:.1f}",
        f"{100 * entry['pruned_flop_share']:.1f} %",
        ", ".join(entry["backends"]),
    ]


def _difference(entry: dict[str, Any], metric: Metric) -> str:
    if entry["method"] == "dense" or entry["difference_mean"] is None:
        return ""
    mean = f"{entry['difference_mean']:+.{metric.digits}f}"
    if entry["difference_std"] is None:
        return mean
    return f"{mean} ± {metric.format(entry['difference_std'])}"


def verdict(document: dict[str, Any], metric: Metric) -> str:
    """Return in one sentence where the best pruned method ended, beside dense.

    Args:
        document: content of ``results.json``.
        metric: of its task.
    """
    summary = document["summary"]
    seeds = _num_seeds(summary)
    spread = "one seed shows no spread" if seeds == 1 else f"mean of {seeds} seeds"
    ended = [entry for entry in summary if entry["mean"] is not None]
    pruned = [entry for entry in ended if entry["method"] != "dense"]
    dense = next((entry for entry in ended if entry["method"] == "dense"), None)
    if dense and len(summary) == 1:
        ends = f"{document['task']}: dense ends at {metric.format(dense['mean'])}"
        return f"{ends} {metric.words} ({spread}); nothing was pruned to set beside it."
    if not pruned:
        return f"{document['task']}: no pruned run ended with a finite {metric.name} ({spread})."
    choose = max if metric.higher_is_better else min
    best = choose(pruned, key=lambda entry: float(entry["mean"]))
    text = f"{document['task']}: {best['label']} ends at {metric.format(best['mean'])}"
    beside = f", dense at {metric.format(dense['mean'])}" if dense else ""
    return f"{text} {metric.words}{beside} ({spread})."


#: Columns in the order in which a narrow terminal loses them: they stand in results.md too.
_LEFT_OUT_FIRST = (6, 7, 2, 5, 4)


def terminal_table(document: dict[str, Any], metric: Metric, width: int) -> Table:
    """Return a rich table of the results; columns that do not fit ``width`` are left out."""
    titles = header(metric, _num_seeds(document["summary"]))
    cells = rows(document["summary"], metric)
    # Titles are folded between words, values never.
    needed = [
        max(*map(len, title.split()), *(len(row[index]) for row in cells)) + 2
        for index, title in enumerate(titles)
    ]
    shown = list(range(len(titles)))
    for index in _LEFT_OUT_FIRST:
        if sum(needed[i] for i in shown) > width:
            shown.remove(index)
    longest = [max(len(title), need - 2) + 2 for title, need in zip(titles, needed, strict=True)]
    folded = sum(longest[i] for i in shown) > width
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index in shown:
        justify: Literal["left", "right"] = "left" if index in (0, 7) else "right"
        table.add_column(
            titles[index], justify=justify, width=needed[index] - 2 if folded else None
        )
    for row in cells:
        table.add_row(*(row[index] for index in shown))
    return table


def markdown_table(document: dict[str, Any], metric: Metric) -> str:
    """Return the same table as Markdown, with a line below it that says what it was run on."""
    summary, environment = document["summary"], document["environment"]
    titles = header(metric, _num_seeds(summary))
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 2) + ["---"], *rows(summary, metric)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return (
        f"{table}\n\n{document['task']} ({document['data']['source']}), "
        f"{document['runs'][0]['steps']} steps, {environment['precision']}, "
        f"{environment['device_type']} {environment['device']}, torch {environment['torch']}, "
        f"sdgp_cusparselt {environment['sdgp_cusparselt']}. The value is that of the last step, "
        "the training loss the mean, in nats, since the evaluation before it; "
        "± is the sample standard deviation over seeds; *minus dense* pairs the seeds.\n"
    )


#: What a table of R says below it.
STEPS_TO_EQUAL_LOSS = (
    "R is the steps of a method over those of dense training that ends at the same loss, each "
    "length with its own schedule, per seed; > and < where no dense run frames a seed's loss."
)


def markdown_rows(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown, titles first; all columns but the first are numbers."""
    titles, *others = rows
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def aligned_rows(rows: Sequence[Sequence[str]]) -> Table:
    """Return the same as a table of rich."""
    titles, *others = rows
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, title in enumerate(titles):
        table.add_column(title, justify="right" if index else "left")
    for row in others:
        table.add_row(*row)
    return table


def _num_seeds(summary: Sequence[dict[str, Any]]) -> int:
    return max(len(entry["seeds"]) for entry in summary)
