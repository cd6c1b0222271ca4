"""Recipe: the hyper-parameters of one run, and the triangular learning rate of the paper."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from sdgp_cusparselt.errors import type_error, value_error

Optimizer = Literal["sgd", "adamw"]
Decay = Literal["matrices", "not_norms", "all"]

#: The learning rate of step 0 as a share of the peak.
INITIAL_LR_FRACTION = 1e-4
#: Fields that came later: at their default the identity of a run leaves them out, so that it equals
#: that of a checkpoint or result from before.
LATER_FIELDS = (
    "decay",
    "gradient_accumulation",
    "flip",
    "translate",
    "cutout",
    "flip_evaluation",
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a model is trained, except model, data, method and seed.

    Args:
        optimizer: ``sgd`` (with momentum) or ``adamw``.
        learning_rate: peak of the triangular schedule, above 0.
        batch_size: examples per step, at least 1; an incomplete last batch is dropped.
        epochs: passes over the training examples; exactly one of ``epochs`` and ``steps`` is set.
        steps: optimizer steps.
        peak_fraction: where the learning rate peaks, as a share of all steps, in [0, 1).
        momentum: of SGD, in [0, 1); AdamW takes its own defaults.
        weight_decay: of the parameters that ``decay`` names.
        label_smoothing: in [0, 1).
        max_grad_norm: gradients are clipped to this norm; None leaves them alone.
        decay: ``matrices`` (weight matrices and kernels; no bias, no norm), ``not_norms`` (all but
            the parameters of norm layers) or ``all``.
        gradient_accumulation: parts of equal size in which a batch goes through the model before
            the step, at least 1; it divides ``batch_size``. Batch norms see one part at a time.
        flip: mirror each training image with probability 1/2.
        translate: shift each training image by up to this many pixels along both axes.
        cutout: blank a square of this many pixels in each training image; 0 blanks none.
        flip_evaluation: evaluate on the sum of the logits of an image and of its mirror image.

    Raises:
        TypeError: a number is not a number.
        ValueError: a value lies outside its range.

    Source: section 4 of the SDGP paper and its published configurations (triangular schedule).
    """

    optimizer: Optimizer = "sgd"
    learning_rate: float = 0.1
    batch_size: int = 64
    epochs: int | None = None
    steps: int | None = None
    peak_fraction: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    max_grad_norm: float | None = None
    decay: Decay = "matrices"
    gradient_accumulation: int = 1
    flip: bool = False
    translate: int = 0
    cutout: int = 0
    flip_evaluation: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("optimizer", get_args(Optimizer)), ("decay", get_args(Decay))):
            if getattr(self, name) not in choices:
                got = repr(getattr(self, name))
                raise value_error("Recipe", name, " or ".join(choices), got, "Choose one.")
        self._check_integers()
        for name in ("flip", "flip_evaluation"):
            if not isinstance(getattr(self, name), bool):
                got = repr(getattr(self, name))
                raise type_error("Recipe", name, "a bool", got, "Pass True or False.")
        self._check_floats()
        if (self.epochs is None) == (self.steps is None):
            got = f"epochs={self.epochs}, steps={self.steps}"
            raise value_error(
                "Recipe", "epochs or steps", "set, one of the two", got, "Set one, None the other."
            )

    def _check_integers(self) -> None:
        lowest = {"batch_size": 1, "epochs": 1, "steps": 1, "gradient_accumulation": 1}
        for name, least in (lowest | {"translate": 0, "cutout": 0}).items():
            value = getattr(self, name)
            if value is None and name in ("epochs", "steps"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise type_error("Recipe", name, "an int", repr(value), "Pass a whole number.")
            if value < least:
                raise value_error(
                    "Recipe", name, f"at least {least}", value, "Pass a larger number."
                )
        if self.batch_size % self.gradient_accumulation:
            rule = f"a divisor of the batch size {self.batch_size}"
            fix = "Change one of the two."
            got = self.gradient_accumulation
            raise value_error("Recipe", "gradient_accumulation", rule, got, fix)

    def _check_floats(self) -> None:
        half_open = ("peak_fraction", "momentum", "label_smoothing")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", *half_open):
            value = getattr(self, name)
            if value is None and name == "max_grad_norm":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise type_error("Recipe", name, "a float", repr(value), "Pass a number.")
            rule, holds = "at least 0", value >= 0
            if name in ("learning_rate", "max_grad_norm"):
                rule, holds = "above 0", value > 0
            elif name in half_open:
                rule, holds = "in [0, 1)", 0 <= value < 1
            if not holds or not math.isfinite(value):
                raise value_error("Recipe", name, rule, value, "Pass a finite number in range.")

    def identity(self) -> dict[str, object]:
        """Return the fields as plain values, without those of ``LATER_FIELDS`` at their default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in LATER_FIELDS or value != defaults[name]
        }

    def replace(self, **changes: object) -> "Recipe":
        """Return a copy; setting one of ``epochs`` and ``steps`` unsets the other."""
        if changes.get("epochs") is not None:
            changes.setdefault("steps", None)
        if changes.get("steps") is not None:
            changes.setdefault("epochs", None)
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def steps_per_epoch(self, num_examples: int) -> int:
        """Return the whole batches in ``num_examples``.

        Raises:
            ValueError: there is not even one.
        """
        if num_examples < self.batch_size:
            raise value_error(
                "Recipe",
                "batch_size",
                f"at most the {num_examples} training examples",
                self.batch_size,
                "Pass a smaller batch size.",
            )
        return num_examples // self.batch_size

    def total_steps(self, num_examples: int) -> int:
        """Return the optimizer steps of one run over ``num_examples`` training examples."""
        per_epoch = self.steps_per_epoch(num_examples)
        return self.steps if self.steps is not None else per_epoch * (self.epochs or 0)


def triangular(step: int, total_steps: int, peak_fraction: float) -> float:
    """Return the learning rate of ``step`` as a share of its peak.

        rises linearly from 1e-4 to 1 at peak_fraction * total_steps, then falls linearly to 0

    Args:
        step: 0-based; step ``total_steps`` would get 0.
        total_steps: of the run.
        peak_fraction: in [0, 1); 0 starts at the peak.

    Returns:
        A factor in [0, 1].

    Source: the schedule of the SDGP paper's CIFAR-10 and ImageNet runs.
    """
    peak = peak_fraction * total_steps
    if step < peak:
        return INITIAL_LR_FRACTION + (1 - INITIAL_LR_FRACTION) * step / peak
    return max(0.0, (total_steps - step) / (total_steps - peak))
