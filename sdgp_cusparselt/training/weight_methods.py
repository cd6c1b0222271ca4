"""The rows of the weights sweep: which recipe, with which hyper-parameters, for how long."""

from collections.abc import Callable
from dataclasses import dataclass

from sdgp_cusparselt.config.schedule import Schedule
from sdgp_cusparselt.weights import (
    FST,
    SRSTE,
    MaskDecay,
    Mishra,
    OneShot,
    SLoPe,
    StructureDecay,
    Unstructured,
    WeightRecipe,
)

#: Of Kao's decays: dense steps first, steps at the final pattern last, as shares of all steps.
WARMUP, SETTLE = 0.1, 0.2
#: exp(-5) is less than one percent where the decay is cut off.
EXPONENT = 5.0


@dataclass(frozen=True)
class WeightMethod:
    """One row.

    Args:
        label: in tables and plots.
        build: steps of the task's recipe -> the weights' recipe, or None for dense weights.
        passes: how often the task's recipe is gone through, its learning rate anew each time.
    """

    label: str
    build: Callable[[int], WeightRecipe | None]
    passes: int = 1


def _kao(steps: int, **schedule: object) -> Schedule:
    fields = {"warmup": round(WARMUP * steps), "settle": round(SETTLE * steps)}
    return Schedule(total_steps=steps, **fields, **schedule)  # type: ignore[arg-type]


def _exponential(steps: int) -> MaskDecay:
    spans = steps - round(WARMUP * steps) - round(SETTLE * steps)
    rate = EXPONENT / max(1, spans)
    return MaskDecay(schedule=_kao(steps, decay="exponential", decay_rate=rate))


def _once(share: float) -> Callable[[int], OneShot]:
    return lambda steps: OneShot(schedule=Schedule(warmup=round(share * steps)))


def _unstructured(sparsity: float) -> WeightMethod:
    return WeightMethod(
        f"unstructured {sparsity:.0%}, retrained",
        lambda steps: Unstructured(
            sparsity=sparsity, schedule=Schedule(total_steps=2 * steps, warmup=steps)
        ),
        passes=2,
    )


#: Name on the command line -> row. Mishra trains twice, so dense weights do so beside it.
WEIGHT_METHODS: dict[str, WeightMethod] = {
    "dense-twice": WeightMethod("dense, trained twice", lambda steps: None, passes=2),
    "prune-only": WeightMethod("pruned at the end", _once(1.0)),
    "one-shot-10": WeightMethod("one-shot at 10 %", _once(0.1)),
    "one-shot-50": WeightMethod("one-shot at 50 %", _once(0.5)),
    "mishra": WeightMethod(
        "Mishra, retrained",
        lambda steps: Mishra(schedule=Schedule(total_steps=2 * steps, warmup=steps)),
        passes=2,
    ),
    "sr-ste": WeightMethod("SR-STE", lambda steps: SRSTE()),
    "kao-mask-linear": WeightMethod(
        "Kao: mask, linear", lambda steps: MaskDecay(schedule=_kao(steps, decay="linear"))
    ),
    "kao-mask-exponential": WeightMethod("Kao: mask, exponential", _exponential),
    "kao-structure-stepwise": WeightMethod(
        "Kao: structure, stepwise",
        lambda steps: StructureDecay(schedule=_kao(steps, ramp="stepwise")),
    ),
    "kao-structure-geometric": WeightMethod(
        "Kao: structure, geometric",
        lambda steps: StructureDecay(schedule=_kao(steps, ramp="geometric")),
    ),
    # The paper's last 1 % are a handful of steps here.
    "slope": WeightMethod(
        "SLoPe",
        lambda steps: SLoPe(adapter_share=0.1, schedule=Schedule(total_steps=steps)),
    ),
    # Masks are chosen every 40 of 300,000 steps in the paper; here a run has hundreds.
    "fst": WeightMethod(
        "FST, dense at the end",
        lambda steps: FST(
            refresh_every=10, schedule=Schedule(total_steps=steps, tail=round(steps / 6))
        ),
    ),
    **{f"unstructured-{s}": _unstructured(s / 100) for s in (50, 75, 90, 95)},
}
#: Those without any structure, a sweep of their own.
STRUCTURELESS = tuple(name for name in WEIGHT_METHODS if name.startswith("unstructured"))
