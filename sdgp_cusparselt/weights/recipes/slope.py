"""SLoPe: a static mask, pruned once more for the backward, and low-rank adapters at the end."""

from dataclasses import dataclass
from typing import ClassVar

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.weights.recipes.base import WeightRecipe, checked_number, checked_positive
from sdgp_cusparselt.weights.stages import WeightStage


@dataclass(frozen=True, kw_only=True)
class SLoPe(WeightRecipe):
    """Double-pruned training from the first step, lazy low-rank adapters in the last ones.

    mask       = n:m largest |weight| at the start, for ever
    output     = input @ (weight where mask).T  [+ (input @ down.T) @ up.T in the last steps]
    grad_input = grad_output @ (weight where mask, pruned to n:m along out_features, too)
    gradient   = gradient where mask; weights that are not kept stay 0

    Attributes:
        rank: of the adapters of linear layers; convolutions get none.
        adapter_share: the last steps in which the adapters count, as a share of ``total_steps``.
        schedule: only ``total_steps``, which must be known.

    Note:
        The adapters' Parameters are there from the start, so that optimizers, DDP and FSDP know
        them: ``up`` begins at zero, and until their time both get a gradient of zero.

    Source: Mozaffari et al. (arXiv 2405.16325). Reported there: training up to 1.25 times and
        inference up to 1.54 times as fast (OPT, Llama), with adapters in the last 1 % of the steps.
    """

    rank: int = 8
    adapter_share: float = 0.01

    name: ClassVar[str] = "slope"
    unused: ClassVar[tuple[str, ...]] = (*WeightRecipe.unused, "tail", "warmup")

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError, naming field, rule and value."""
        super().__post_init__()
        checked_positive("SLoPe", "rank", self.rank)
        checked_number("SLoPe", "adapter_share", self.adapter_share, below=1.0)
        if self.schedule.total_steps is None:
            fix = "Pass sdgp.Schedule(total_steps=...): the adapters count from the end."
            raise value_error("SLoPe", "schedule.total_steps", "known", None, fix)

    @property
    def adapters_from(self) -> int:
        """The first step in which the adapters count."""
        total = self.schedule.total_steps or 0
        return total - round(self.adapter_share * total)

    @property
    def multiples(self) -> tuple[int, int]:
        """Groups run along both directions."""
        return self.m, self.m

    def stage(self, step: int) -> WeightStage:
        """Return the masked stage, with adapters in the last steps and after them."""
        return self._pruned(refresh=step == 0, adapters=step >= self.adapters_from)

    def arrived(self) -> WeightStage:
        """Return the stage with adapters."""
        return self._pruned(refresh=False, adapters=True)

    def _pruned(self, *, refresh: bool, adapters: bool) -> WeightStage:
        return WeightStage(
            masked=True,
            n=self.n,
            m=self.m,
            refresh=refresh,
            gradient="masked",
            both_ways=True,
            adapters=adapters and self.adapter_share > 0,
        )
