"""The results table, for a terminal and as Markdown, from one list of rows."""

from collections.abc import Sequence
from typing import Any

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


def terminal_table(document: dict[str, Any], metric: Metric) -> Table:
    """Return a rich table of a ``--json`` document."""
    summary = document["summary"]
    table = Table(title=f"{document['task']}: {document['data']['source']}", title_justify="left")
    for index, title in enumerate(header(metric, _num_seeds(summary))):
        table.add_column(title, justify="left" if index in (0, 7) else "right")
    for cells in rows(summary, metric):
        table.add_row(*cells)
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


def _num_seeds(summary: Sequence[dict[str, Any]]) -> int:
    return max(len(entry["seeds"]) for entry in summary)
