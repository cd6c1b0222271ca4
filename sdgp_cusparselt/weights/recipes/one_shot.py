"""Prune once, then train what is left: one-shot, Mishra's workflow, and Pietron's reference."""

from dataclasses import dataclass
from typing import ClassVar

from sdgp_cusparselt.weights.recipes.base import WeightRecipe, checked_number, first_masked
from sdgp_cusparselt.weights.stages import WeightStage


@dataclass(frozen=True, kw_only=True)
class OneShot(WeightRecipe):
    """Dense training, one pruning by magnitude, training of what is left with a fixed mask.

    steps 0 .. warmup - 1   dense
    step warmup             mask = n:m largest |weight|; weight = weight where mask, else 0
    from there on           gradient = gradient where mask, weights that are not kept stay 0

    Attributes:
        schedule: its ``warmup`` is the step of the pruning; at the last step the trained model is
            pruned and not trained on.

    Source: the usual baseline; Kao et al. (arXiv 2209.07617) compare their decays with it.
    """

    name: ClassVar[str] = "one-shot"
    unused: ClassVar[tuple[str, ...]] = (*WeightRecipe.unused, "tail")

    @property
    def prunes_at(self) -> int:
        """The step of the one pruning."""
        return first_masked(self.schedule)

    def stage(self, step: int) -> WeightStage:
        """Return the dense stage, or the masked one, whose mask is chosen at its first step."""
        if step < self.prunes_at:
            return WeightStage(masked=False)
        return self._pruned(refresh=step == self.prunes_at)

    def arrived(self) -> WeightStage:
        """Return the masked stage."""
        return self._pruned(refresh=False)

    def _pruned(self, *, refresh: bool) -> WeightStage:
        return WeightStage(masked=True, n=self.n, m=self.m, refresh=refresh, gradient="masked")


@dataclass(frozen=True, kw_only=True)
class Mishra(OneShot):
    """Train dense, prune once, and repeat the same training with the mask fixed.

    learning rate of step t = that of the first training at t - warmup, from step warmup on

    Attributes:
        schedule: its ``warmup`` is the length of the first training, ``total_steps`` twice that.

    Note:
        ``learning_rate_step`` gives the step to ask the first training's schedule for. The paper
        begins the second training with the optimizer's state empty; momentum decays within tens
        of steps, so a caller who keeps it trains nearly the same.

    Source: Mishra et al. (arXiv 2104.08378), section 5: the accuracy of the dense model with the
        same hyper-parameters, on image, language and detection networks; math throughput doubles.
    """

    name: ClassVar[str] = "mishra"

    def learning_rate_step(self, step: int) -> int:
        """Return the step, counted anew from the pruning on."""
        return step if step < self.prunes_at else step - self.prunes_at


@dataclass(frozen=True, kw_only=True)
class Unstructured(Mishra):
    """The reference without structure: the smallest weights of each layer, wherever they are.

    mask = the (1 - sparsity) largest |weight| of the layer; dense, prune, repeat as in ``Mishra``

    Attributes:
        sparsity: share of each layer's weights that is removed, in [0, 1).

    Note:
        Nothing here runs it faster: ``bench/bench_unstructured.py`` times torch's CSR product.

    Source: Pietron and Zurek (arXiv 2112.15445): at least 90 % of the weights of some CNNs without
        loss of accuracy after retraining (abstract).
    """

    sparsity: float = 0.9

    name: ClassVar[str] = "unstructured"

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError, naming field, rule and value."""
        super().__post_init__()
        checked_number("Unstructured", "sparsity", self.sparsity, below=1.0)

    @property
    def multiples(self) -> tuple[int, int]:
        """Any size will do."""
        return 1, 1

    def describe(self) -> str:
        """Return a short form for reprs and tables."""
        return f"{self.name} {self.sparsity:.0%} ({self.schedule.describe()})"

    def _pruned(self, *, refresh: bool) -> WeightStage:
        return WeightStage(
            masked=True,
            pattern="unstructured",
            sparsity=self.sparsity,
            refresh=refresh,
            gradient="masked",
        )
