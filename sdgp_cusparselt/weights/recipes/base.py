"""WeightRecipe: how masks come and go over the optimizer steps; one subclass for each paper."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sdgp_cusparselt.config.patterns import check_pattern, checked_int
from sdgp_cusparselt.config.schedule import Schedule
from sdgp_cusparselt.errors import type_error, value_error
from sdgp_cusparselt.weights.stages import WeightStage

#: Name -> class, for what a state dict or a file names.
RECIPES: "dict[str, type[WeightRecipe]]" = {}


@dataclass(frozen=True, kw_only=True)
class WeightRecipe:
    """What every recipe has: the pattern at which it arrives, and when.

    Attributes:
        n: weights kept per group.
        m: group size, at most 32; groups run along what the forward product reduces over.
        schedule: dense warm-up and tail, ramp and decay; each recipe says what it uses of it.

    Raises:
        TypeError: schedule is no Schedule, or a number no number.
        ValueError: a value lies outside its range, or the schedule does not fit the recipe.
    """

    n: int = 2
    m: int = 4
    schedule: Schedule = field(default_factory=Schedule)

    #: Its name in state dicts and on the command line.
    name: ClassVar[str] = ""
    #: Fields of the schedule that the recipe does not read.
    unused: ClassVar[tuple[str, ...]] = ("ramp", "decay", "methods", "settle")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.name:
            RECIPES[cls.name] = cls

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError, naming field, rule and value."""
        kind = type(self).__name__
        check_pattern(kind, "magnitude", self.n, self.m)
        given: object = self.schedule
        if not isinstance(given, Schedule):
            fix, got = "Pass sdgp.Schedule(...).", type(given).__name__
            raise type_error(kind, "schedule", "a Schedule", got, fix)
        plain = Schedule()
        for name in self.unused:
            value = getattr(self.schedule, name)
            if value != getattr(plain, name):
                fix = "Leave it at its default."
                raise value_error(kind, f"schedule.{name}", "unused", repr(value), fix)

    def stage(self, step: int) -> WeightStage:
        """Return what holds at a step.

        Args:
            step: optimizer steps taken so far.
        """
        raise NotImplementedError

    def learning_rate_step(self, step: int) -> int:
        """Return the step of the first training whose learning rate holds at a step."""
        return step

    @property
    def multiples(self) -> tuple[int, int]:
        """Of what in_features and out_features have to be multiples."""
        return max(m for _, m in self.schedule.patterns(self.n, self.m)), 1

    def arrived(self) -> WeightStage:
        """Return the stage in which the recipe prunes most."""
        raise NotImplementedError

    def describe(self) -> str:
        """Return a short form for reprs and tables."""
        when = self.schedule.describe()
        return f"{self.name} {self.n}:{self.m}" + ("" if when == "constant" else f" ({when})")

    def as_dict(self) -> dict[str, Any]:
        """Return it as what JSON has, that ``recipe_from`` takes back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        schedule = json.loads(json.dumps(self.schedule.as_dict()))
        return {"name": self.name, **fields, "schedule": schedule}

    def _is_masked(self, step: int) -> bool:
        """Whether a step lies outside the dense warm-up and tail."""
        return self.schedule.stage(step, "magnitude", self.n, self.m).prune != "none"


def recipe_from(saved: dict[str, Any]) -> WeightRecipe:
    """Return the recipe whose ``as_dict`` this is.

    Raises:
        KeyError, TypeError, ValueError: it is not one.
    """
    fields = {key: value for key, value in saved.items() if key != "name"}
    fields["schedule"] = Schedule(**fields["schedule"])
    return RECIPES[saved["name"]](**fields)


def checked_number(
    function: str, argument: str, value: object, *, below: float = math.inf
) -> float:
    """Return value if it is a number in [0, below), else raise."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise type_error(function, argument, "a number", repr(value), "Pass a float.")
    if not 0 <= value < below:
        rule = ">= 0" if below == math.inf else f"in [0, {below:g})"
        raise value_error(function, argument, rule, value, "0 leaves it out.")
    return float(value)


def checked_positive(function: str, argument: str, value: object) -> int:
    """Return value if it is an int >= 1, else raise."""
    number = checked_int(function, argument, value)
    if number < 1:
        raise value_error(function, argument, ">= 1", value, "Pass a larger number.")
    return number


def first_masked(schedule: Schedule) -> int:
    """Return the first step after the dense warm-up."""
    warmup, total = schedule.warmup, schedule.total_steps
    if isinstance(warmup, int):
        return warmup
    if total is None:
        fix = "Set total_steps, or pass a whole number of steps."
        raise value_error("Schedule", "warmup", "an int without total_steps", warmup, fix)
    return round(warmup * total)


def is_refresh(schedule: Schedule, step: int, every: int) -> bool:
    """Whether a mask is chosen anew at a masked step: at the first one, then every so many."""
    return (step - first_masked(schedule)) % every == 0
