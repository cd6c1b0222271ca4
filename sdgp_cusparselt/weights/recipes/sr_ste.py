"""SR-STE: masks that follow the weights, and a decay of what they leave out."""

from dataclasses import dataclass
from typing import ClassVar

from sdgp_cusparselt.weights.recipes.base import (
    WeightRecipe,
    checked_number,
    checked_positive,
    is_refresh,
)
from sdgp_cusparselt.weights.stages import WeightStage


@dataclass(frozen=True, kw_only=True)
class SRSTE(WeightRecipe):
    """Sparse-refined straight-through estimator: masks of every step, decay of the rest.

    mask        = n:m largest |weight|, chosen anew every refresh_every steps
    output      = input @ (weight where mask, else 0).T
    grad_weight = gradient of the masked weight, everywhere, + decay * weight where not mask

    The decay keeps weights near the threshold from changing sides at every step. It enters the
    gradient once an optimizer step, after any loss scaling is undone.

    Attributes:
        decay: lambda of the paper.
        refresh_every: steps between two choices of the mask.
        schedule: ``warmup`` and ``tail`` are dense.

    Source: Zhou et al. (arXiv 2102.04010), equation 9; decay 2e-4 is theirs for ResNet-50 under
        SGD. They report 2:4 from scratch without a drop in accuracy (abstract).
    """

    decay: float = 2e-4
    refresh_every: int = 1

    name: ClassVar[str] = "sr-ste"

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError, naming field, rule and value."""
        super().__post_init__()
        checked_number("SRSTE", "decay", self.decay)
        checked_positive("SRSTE", "refresh_every", self.refresh_every)

    def stage(self, step: int) -> WeightStage:
        """Return the dense stage, or the masked one."""
        if not self._is_masked(step):
            return WeightStage(masked=False)
        return self._pruned(refresh=is_refresh(self.schedule, step, self.refresh_every))

    def arrived(self) -> WeightStage:
        """Return the masked stage."""
        return self._pruned(refresh=False)

    def _pruned(self, *, refresh: bool) -> WeightStage:
        return WeightStage(masked=True, n=self.n, m=self.m, refresh=refresh, decay=self.decay)
