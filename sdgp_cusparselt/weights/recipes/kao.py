"""Kao's decays: of the mask's zeros towards zero, or of the structure towards n:m."""

from dataclasses import dataclass
from typing import ClassVar

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.weights.recipes.base import WeightRecipe
from sdgp_cusparselt.weights.stages import WeightStage


@dataclass(frozen=True, kw_only=True)
class _Decaying(WeightRecipe):
    """Masks of every step whose n, m and beta follow the schedule; straight-through gradient."""

    needs: ClassVar[str] = ""
    unused: ClassVar[tuple[str, ...]] = ("methods", "tail")

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError, naming field, rule and value."""
        super().__post_init__()
        if getattr(self.schedule, self.needs) == "none":
            rule, fix = "set", f"Pass sdgp.Schedule({self.needs}=...)."
            raise value_error(type(self).__name__, f"schedule.{self.needs}", rule, "'none'", fix)

    def stage(self, step: int) -> WeightStage:
        """Return the dense stage, or the mask of this step's n, m and beta."""
        now = self.schedule.stage(step, "magnitude", self.n, self.m)
        if now.prune == "none":
            return WeightStage(masked=False)
        return WeightStage(masked=True, n=now.n, m=now.m, beta=now.beta, refresh=True)

    def arrived(self) -> WeightStage:
        """Return the stage of n:m without decay."""
        return WeightStage(masked=True, n=self.n, m=self.m)


@dataclass(frozen=True, kw_only=True)
class MaskDecay(_Decaying):
    """Pruning-mask decay (MdGf): weights that are not kept fade out.

    effective weight = weight * (mask + (1 - mask) * beta(t)), t the steps since the warm-up
    linear:      beta = max(0, 1 - decay_rate * t)
    exponential: beta = exp(-decay_rate * t)
    gradient straight through; beta = 0 in the last ``settle`` steps

    Attributes:
        schedule: ``warmup`` (d in the paper), ``settle`` (f), ``decay`` and ``decay_rate``.

    Note:
        While 0 < beta < 1 the weight has no zeros: those steps run dense on any hardware.

    Source: Kao et al. (arXiv 2209.07617): comparable to unstructured sparsity on a Transformer
        for translation, at marginally more training FLOPs (abstract). Names as in the code of
        their successor (arXiv 2402.04497).
    """

    name: ClassVar[str] = "kao-mask"
    needs: ClassVar[str] = "decay"
    unused: ClassVar[tuple[str, ...]] = ("methods", "tail", "ramp")


@dataclass(frozen=True, kw_only=True)
class StructureDecay(_Decaying):
    """Sparse-structure decay (SdGf): the pattern narrows in frames of equal length.

    stepwise:  (m-1):m, m/2:m, m/4:m .. n:m
    geometric: 8n:8m, 4n:4m, 2n:2m, n:m
    masks of every step, gradient straight through; n:m in the last ``settle`` steps

    Attributes:
        schedule: ``warmup``, ``settle`` and ``ramp``.

    Note:
        Only the frame of 2:4 runs on sparse tensor cores; the geometric ramp needs layers whose
        in_features are a multiple of 8 m.

    Source: Kao et al. (arXiv 2209.07617), as ``MaskDecay``; for 1:16 the stepwise frames there
        are 15:16, 8:16, 4:16, 2:16 and 1:16.
    """

    name: ClassVar[str] = "kao-structure"
    needs: ClassVar[str] = "ramp"
    unused: ClassVar[tuple[str, ...]] = ("methods", "tail", "decay")
