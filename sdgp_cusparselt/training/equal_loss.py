"""Steps to the same loss: how many more a method takes than dense training.

R = steps of the method / steps of dense training that ends at the same loss

Dense training is run at several lengths, each with its own whole learning-rate schedule: a point on
the curve of one long run would be a run whose rate has not come down yet.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.training.run import RunSpec
from sdgp_cusparselt.training.tasks import Task

#: Lengths of the further dense runs, as shares of the methods' steps: R from 0.91 to 1.43.
SHARES = (0.7, 0.8, 0.9, 1.1)


@dataclass(frozen=True)
class StepsRatio:
    """R of one method and length over the seeds.

    Attributes:
        label: of the method.
        steps: that it was trained for.
        values: R of each seed.
        gaps: its loss minus dense of the same seed and length, of each seed.
        bound: ">" where a seed ended worse than its shortest dense run, which then stands for it;
            "<" where better than the longest; "" where dense runs frame every seed.
    """

    label: str
    steps: int
    values: tuple[float, ...]
    gaps: tuple[float, ...]
    bound: str = ""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """R as tables show it: mean ± standard deviation, a bound where it is no more."""
        spread = "" if self.std is None else f" ± {self.std:.3f}"
        return f"{self.bound} {self.mean:.3f}{spread}".strip()

    @property
    def gap_text(self) -> str:
        """Loss minus dense, mean ± standard deviation."""
        spread = f" ± {statistics.stdev(self.gaps):.3f}" if len(self.gaps) > 1 else ""
        return f"{statistics.fmean(self.gaps):+.3f}{spread}"


def dense_specs(
    function: str, task: Task, specs: Sequence[RunSpec], num_examples: int
) -> dict[int, list[RunSpec]]:
    """Return the dense runs of other lengths that R needs: steps -> one run a seed.

    Args:
        function: that is named in errors.
        task: what is trained.
        specs: the runs of the methods and of dense, all of one length.
        num_examples: for training.

    Raises:
        ValueError: the task's metric is no loss, or no dense run is among the specs.
    """
    if task.metric.higher_is_better:
        fix = "Take a task like code-lm; accuracies are compared at equal steps."
        got = f"{task.name}, measured by {task.metric.name}"
        raise value_error(function, "--equal-loss", "for a task measured by a loss", got, fix)
    dense = [spec for spec in specs if spec.method.is_dense]
    if not dense or len(dense) == len(specs):
        rule = "with dense and what is compared with it"
        got = ", ".join(dict.fromkeys(spec.method.spelling for spec in specs))
        fix = "Such as --methods dense,mvue."
        raise value_error(function, "--equal-loss", rule, got, fix)
    steps = specs[0].recipe.total_steps(num_examples)
    lengths = sorted({max(1, round(share * steps)) for share in SHARES} - {steps})
    return {
        length: [replace(spec, recipe=spec.recipe.replace(steps=length)) for spec in dense]
        for length in lengths
    }


def ratio_rows(ratios: Sequence[StepsRatio], shares: Mapping[str, float]) -> list[list[str]]:
    """Return the cells of a table of R, titles first.

    Args:
        ratios: of ``steps_ratios``.
        shares: label -> share of the grad_input FLOPs that it prunes.
    """
    titles = ["method", "steps", "grad_input pruned", "minus dense", "R"]
    return [titles] + [
        [found.label, f"{found.steps:,}", f"{shares[found.label]:.0%}", found.gap_text, found.text]
        for found in ratios
    ]


def equal_loss_document(
    document: Mapping[str, Any], dense_runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what ``--json`` says of steps to the same loss.

    Args:
        document: of the methods and of dense, as ``report_document`` made it.
        dense_runs: results of the further dense runs.
    """
    ratios = steps_ratios([document, {"metric": document["metric"], "runs": dense_runs}])
    shares = {run["label"]: run["pruned_flop_share"] for run in document["runs"]}
    return {
        "ratios": [asdict(ratio) for ratio in ratios],
        "table": ratio_rows(ratios, shares),
        "dense_runs": list(dense_runs),
    }


def steps_to_loss(dense: Mapping[int, float], loss: float) -> float:
    """Return after how many steps dense training ends at a loss.

    Interpolated linearly in log(steps) between the lengths at hand.

    Args:
        dense: steps -> loss at the end of a whole dense run of that length.
        loss: to reach, in the same unit.

    Returns:
        Steps, a float.

    Raises:
        ValueError: the loss lies outside those of the shortest and the longest run.
    """
    lengths = sorted(dense)
    first, last = dense[lengths[0]], dense[lengths[-1]]
    if not last <= loss <= first:
        rule = (
            f"between those of the longest and the shortest dense run, {last:.4f} and {first:.4f}"
        )
        fix = "Add a dense run of another length."
        raise value_error("steps_to_loss", "loss", rule, f"{loss:.4f}", fix)
    for short, long in itertools.pairwise(lengths):
        above, below = dense[short], dense[long]
        if below <= loss <= above:
            part = (above - loss) / (above - below) if above > below else 0.0
            return math.exp(math.log(short) + part * (math.log(long) - math.log(short)))
    raise value_error("steps_to_loss", "dense", "falling with the steps", dict(dense), "Add seeds.")


def steps_ratios(documents: Sequence[Mapping[str, Any]]) -> list[StepsRatio]:
    """Return R of every method and length in the results of ``sdgp train``.

    Args:
        documents: what ``--json`` wrote, of one task whose metric is a loss: dense runs of several
            lengths with the same seeds, and the methods.

    Returns:
        One entry a method and length. Where no dense runs frame a loss, R is a bound.

    Raises:
        ValueError: the metric is no loss, or a method's seed has no dense run to compare with.
    """
    dense: dict[int, dict[int, float]] = {}
    others: dict[tuple[str, int], dict[int, float]] = {}
    for document in documents:
        if document["metric"]["higher_is_better"]:
            got, fix = document["metric"]["name"], "Use a task like code-lm."
            raise value_error("steps_ratios", "documents", "results with a loss", got, fix)
        for run in document["runs"]:
            seed, steps = run["identity"]["seed"], run["steps"]
            if run["identity"]["method"] == "dense":
                dense.setdefault(seed, {})[steps] = _loss(run)
            else:
                others.setdefault((run["label"], steps), {})[seed] = _loss(run)
    found = []
    for (label, steps), losses in others.items():
        missing = sorted(seed for seed in losses if steps not in dense.get(seed, {}))
        if missing:
            fix = "Train dense with the same seeds and lengths."
            rule = f"to have dense runs of {steps} steps for every seed"
            raise value_error("steps_ratios", "documents", rule, f"none for {missing}", fix)
        needed = [_framed(dense[seed], loss) for seed, loss in losses.items()]
        bound = max((bound for _, bound in needed), default="")  # ">" before "<" before ""
        ratios = tuple(steps / count for count, _ in needed)
        gaps = tuple(loss - dense[seed][steps] for seed, loss in losses.items())
        found.append(StepsRatio(label, steps, ratios, gaps, bound))
    return found


def _loss(run: Mapping[str, Any]) -> float:
    """Return the loss at the end of a run; that of one that diverged is not a number in JSON."""
    metric = run["metric"]
    return math.inf if metric is None else float(metric)


def _framed(dense: Mapping[int, float], loss: float) -> tuple[float, str]:
    """Return the dense steps to a loss, or those of the nearest dense run, and what R is then."""
    if loss > dense[min(dense)]:
        return min(dense), ">"
    if loss < dense[max(dense)]:
        return max(dense), "<"
    return steps_to_loss(dense, loss), ""
