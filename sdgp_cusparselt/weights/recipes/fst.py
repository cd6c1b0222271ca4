"""FST: transposable masks, masked decay in the gradient, a dense tail."""

from dataclasses import dataclass
from typing import ClassVar

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.weights.recipes.base import (
    WeightRecipe,
    checked_number,
    checked_positive,
    is_refresh,
)
from sdgp_cusparselt.weights.stages import WeightStage


@dataclass(frozen=True, kw_only=True)
class FST(WeightRecipe):
    """All three products 2:4: one mask for both directions, gradients by mvue along tokens.

    mask        = the 4 x 4 patterns, 2:4 along rows and columns, that keep most of |weight|;
                  chosen anew every refresh_every steps
    output      = input @ (weight where mask).T
    grad_input  = grad_output @ (weight where mask)
    grad_weight = mvue(grad_output along tokens).T @ input + decay * weight where not mask

    Attributes:
        decay: alpha of the masked decay.
        refresh_every: optimizer steps between two choices of the mask.
        mvue: whether grad_weight prunes grad_output; False leaves it dense.
        schedule: ``tail`` is the dense fine-tuning; the paper ends so, its final model is dense.

    Note:
        The decay is added to the gradient once an optimizer step, to the sum over a batch's parts,
        in the units of unscaled losses, with the mask that the step's products used, and not in
        dense phases. It is no weight decay: an adaptive optimizer normalises it with the rest.

    Source: Hu et al. (arXiv 2404.01847, ICML 2024), sections 4 and 5: convergence similar to
        dense (abstract); SLoPe's authors measured its training as 1.06 to 1.11 times as fast.
    """

    decay: float = 6e-5
    refresh_every: int = 40
    mvue: bool = True

    name: ClassVar[str] = "fst"

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError, naming field, rule and value."""
        super().__post_init__()
        if (self.n, self.m) != (2, 4):
            got = f"{self.n}:{self.m}"
            raise value_error("FST", "n:m", "2:4", got, "Its masks are 2:4 in both directions.")
        checked_number("FST", "decay", self.decay)
        checked_positive("FST", "refresh_every", self.refresh_every)

    @property
    def multiples(self) -> tuple[int, int]:
        """Blocks are 4 x 4."""
        return 4, 4

    def stage(self, step: int) -> WeightStage:
        """Return the dense stage, or the masked one."""
        if not self._is_masked(step):
            return WeightStage(masked=False, sparse_grad_weight=False if self.mvue else None)
        return self._pruned(refresh=is_refresh(self.schedule, step, self.refresh_every))

    def arrived(self) -> WeightStage:
        """Return the masked stage."""
        return self._pruned(refresh=False)

    def _pruned(self, *, refresh: bool) -> WeightStage:
        return WeightStage(
            masked=True,
            pattern="transposable",
            refresh=refresh,
            decay=self.decay,
            both_ways=True,
            sparse_grad_weight=True if self.mvue else None,
        )
