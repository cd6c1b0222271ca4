"""Steps to the same loss: how many more a method takes than dense training.

R = steps of the method / steps of dense training that ends at the same loss

Dense training is run at several lengths, each with its own whole learning-rate schedule: a point on
the curve of one long run would be a run whose rate has not come down yet.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdgp_cusparselt.errors import value_error


@dataclass(frozen=True)
class StepsRatio:
    """R of one method and length over the seeds.

    Attributes:
        label: of the method.
        steps: that it was trained for.
        values: R of each seed.
        gaps: its loss minus dense of the same seed and length, of each seed.
    """

    label: str
    steps: int
    values: tuple[float, ...]
    gaps: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


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

    Raises:
        ValueError: the metric is no loss, a method's seed has no dense run to compare with, or the
            dense runs are all longer or all shorter than needed.
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
                dense.setdefault(seed, {})[steps] = run["metric"]
            else:
                others.setdefault((run["label"], steps), {})[seed] = run["metric"]
    found = []
    for (label, steps), losses in others.items():
        missing = sorted(seed for seed in losses if steps not in dense.get(seed, {}))
        if missing:
            fix = "Train dense with the same seeds and lengths."
            rule = f"to have dense runs of {steps} steps for every seed"
            raise value_error("steps_ratios", "documents", rule, f"none for {missing}", fix)
        ratios = tuple(steps / steps_to_loss(dense[seed], loss) for seed, loss in losses.items())
        gaps = tuple(loss - dense[seed][steps] for seed, loss in losses.items())
        found.append(StepsRatio(label, steps, ratios, gaps))
    return found
