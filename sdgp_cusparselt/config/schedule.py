"""Schedule: how the pruning changes over training, as a pure function of the optimizer step."""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from sdgp_cusparselt.config.patterns import MAX_M, METHODS, PruneMethod, checked_int
from sdgp_cusparselt.errors import type_error, value_error

Ramp = Literal["none", "stepwise", "geometric", "densify"]
Decay = Literal["none", "linear", "exponential"]
#: How much wider the first groups of a geometric or densifying ramp are.
WIDEST = 8


class Stage(NamedTuple):
    """What holds at one step.

    Attributes:
        prune: method; "none" in a dense phase.
        n: kept elements per group.
        m: group size.
        beta: share of what is not kept that stays in the gradient.
    """

    prune: PruneMethod
    n: int
    m: int
    beta: float


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Dense phases, N:M ramps, mask decay and changes of method over the optimizer steps.

    steps 0 .. warmup - 1                       dense
    steps warmup .. total - tail - settle - 1   the ramp and the decay run
    steps .. total - tail - 1                   the configuration's own N:M with beta = 0
    the last ``tail`` steps, and any after      dense

    A whole number is a number of steps, a fraction below 1 a share of ``total_steps``. Dense
    phases cost nothing and 2:4 runs on hardware; ramps and decays are emulated densely until they
    arrive there.

    Attributes:
        total_steps: optimizer steps of the training; None if nothing here counts from its end.
        warmup: dense steps at the start.
        tail: dense steps at the end.
        settle: pruned steps before the tail in which ramp and decay have arrived.
        ramp: N:M patterns in frames of equal length. "stepwise": (M-1):M, M/2:M, M/4:M .. N:M;
            "geometric": 8N:8M, 4N:4M, 2N:2M, N:M; "densify": N:8M, N:4M, N:2M, N:M.
        decay: what is not kept counts beta times, with t the steps since warm-up. "linear":
            beta = max(0, 1 - decay_rate * t); "exponential": beta = exp(-decay_rate * t).
        decay_rate: per step. For "linear" None reaches 0 as the settling begins.
        decay_every: steps between two changes of beta; each change compiles compiled code anew.
        methods: (from which step on, prune method) in increasing order, over the whole training.

    Source:
        Kao et al. (arXiv 2209.07617) for ramps and decays, there of weight masks.
    """

    total_steps: int | None = None
    warmup: int | float = 0
    tail: int | float = 0
    settle: int | float = 0
    ramp: Ramp = "none"
    decay: Decay = "none"
    decay_rate: float | None = None
    decay_every: int = 1
    methods: tuple[tuple[int | float, PruneMethod], ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError, naming field, rule and value."""
        if self.total_steps is not None and checked_int(_NAME, "total_steps", self.total_steps) < 1:
            raise value_error(_NAME, "total_steps", ">= 1", self.total_steps, "None is unknown.")
        for name, choices in (("ramp", get_args(Ramp)), ("decay", get_args(Decay))):
            if getattr(self, name) not in choices:
                rule = f"one of {', '.join(choices)}"
                got = repr(getattr(self, name))
                raise value_error(_NAME, name, rule, got, "Pick one of these.")
        for name in ("warmup", "tail", "settle"):
            self._steps(name, getattr(self, name))
        self._check_decay()
        self._check_methods()
        self._check_spans()

    @property
    def is_emulated(self) -> bool:
        """Whether some steps prune in a way that no hardware runs."""
        return self.ramp != "none" or self.decay != "none"

    def stage(self, step: int, prune: PruneMethod, n: int, m: int) -> Stage:
        """Return what holds at a step.

        Args:
            step: optimizer steps taken so far.
            prune: the configuration's method, until ``methods`` says otherwise.
            n: the configuration's own, at which a ramp arrives.
            m: likewise.
        """
        begin, arrive, end = self._spans()
        if step < begin or (end is not None and step >= end):
            return Stage("none", n, m, 0.0)
        for start, method in self.methods:
            if step >= self._steps("methods", start):
                prune = method
        length = None if arrive is None else arrive - begin
        n, m = self._pattern(step - begin, length, n, m)
        return Stage(prune, n, m, self._beta(step - begin, length))

    def patterns(self, n: int, m: int) -> list[tuple[int, int]]:
        """Return the N:M patterns that a ramp to n:m goes through, n:m included.

        Raises:
            ValueError: the ramp cannot arrive at n:m.
        """
        if self.ramp == "none":
            return [(n, m)]
        if self.ramp == "stepwise":
            halvings = (m // n).bit_length() - 1
            if n << halvings != m or n == m:
                raise value_error(_NAME, "ramp", "one that can reach n:m", *_stepwise(n, m))
            return [(m - 1, m), *((m >> i, m) for i in range(1, halvings + 1))]
        if WIDEST * m > MAX_M:
            fix = f"Use m <= {MAX_M // WIDEST}, or the stepwise ramp."
            got = f"{self.ramp!r} with m = {m}"
            raise value_error(_NAME, "ramp", f"one with {WIDEST} * m <= {MAX_M}", got, fix)
        widths = [WIDEST >> i for i in range(WIDEST.bit_length())]
        return [(w * n if self.ramp == "geometric" else n, w * m) for w in widths]

    def describe(self) -> str:
        """Return a short form for reprs and tables."""
        parts = [f"{self.warmup} dense first"] if self.warmup else []
        parts += [f"{self.ramp} ramp (emulated)"] if self.ramp != "none" else []
        parts += [f"{self.decay} mask decay (emulated)"] if self.decay != "none" else []
        parts += [f"{method} from {start}" for start, method in self.methods]
        parts += [f"{self.tail} dense last"] if self.tail else []
        return ", ".join(parts) or "constant"

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain types that ``Schedule(**...)`` takes back."""
        return asdict(self)

    def _pattern(self, t: int, length: int | None, n: int, m: int) -> tuple[int, int]:
        patterns = self.patterns(n, m)
        if length is None or t >= length:
            return patterns[-1]
        return patterns[t * len(patterns) // length]

    def _beta(self, t: int, length: int | None) -> float:
        if self.decay == "none" or (length is not None and t >= length):
            return 0.0
        t -= t % self.decay_every
        rate = 1 / length if self.decay_rate is None and length else self.decay_rate or 0.0
        return max(0.0, 1.0 - rate * t) if self.decay == "linear" else math.exp(-rate * t)

    def _spans(self) -> tuple[int, int | None, int | None]:
        """Return where pruning begins, where ramp and decay arrive, and where pruning ends."""
        begin, total = self._steps("warmup", self.warmup), self.total_steps
        if total is None:
            return begin, None, None
        end = total - self._steps("tail", self.tail)
        return begin, end - self._steps("settle", self.settle), end if self.tail else None

    def _steps(self, name: str, value: object) -> int:
        """Return a number of steps, or a share of total_steps as such, checked."""
        if isinstance(value, float):
            if not 0 <= value < 1:
                fix = "Pass a whole number for steps."
                raise value_error(_NAME, name, "a fraction in 0..1 or an int", value, fix)
            if self.total_steps is None:
                fix = "Set total_steps, or pass a whole number of steps."
                raise value_error(_NAME, name, "an int without total_steps", value, fix)
            return round(value * self.total_steps)
        steps = checked_int(_NAME, name, value)
        if steps < 0:
            raise value_error(_NAME, name, ">= 0", value, "0 is no such phase.")
        return steps

    def _check_decay(self) -> None:
        if checked_int(_NAME, "decay_every", self.decay_every) < 1:
            raise value_error(_NAME, "decay_every", ">= 1", self.decay_every, "1 is every step.")
        rate = self.decay_rate
        if rate is None:
            if self.decay == "exponential":
                fix = "It never reaches 0 by itself; 5 / steps leaves less than one percent."
                raise value_error(_NAME, "decay_rate", "a number > 0", rate, fix)
            return
        if not isinstance(rate, int | float) or isinstance(rate, bool):
            raise type_error(_NAME, "decay_rate", "a number", repr(rate), "It is per step.")
        if not (0 < rate < math.inf):
            raise value_error(_NAME, "decay_rate", "a number > 0", rate, "It is per step.")

    def _check_methods(self) -> None:
        rule = "(step, method) pairs with increasing steps"
        fix = 'Such as ((0.5, "mvue"),).'
        try:
            pairs = tuple((start, method) for start, method in self.methods)
        except (TypeError, ValueError):
            raise type_error(_NAME, "methods", rule, repr(self.methods), fix) from None
        object.__setattr__(self, "methods", pairs)  # lists, as JSON gives them, become tuples
        steps = [self._steps("methods", start) for start, _ in pairs]
        if any(a >= b for a, b in itertools.pairwise(steps)):
            raise value_error(_NAME, "methods", rule, repr(pairs), fix)
        for _, method in pairs:
            if method not in METHODS:
                names = f"of methods in {', '.join(METHODS)}"
                raise value_error(_NAME, "methods", names, repr(method), "Pick one of these.")

    def _check_spans(self) -> None:
        from_end = [name for name in ("tail", "settle") if getattr(self, name)]
        from_end += ["ramp"] if self.ramp != "none" else []
        from_end += ["decay"] if self.decay == "linear" and self.decay_rate is None else []
        begin, arrive, _ = self._spans()
        if arrive is None:
            if from_end:
                got = f"None with {', '.join(from_end)}"
                raise value_error(_NAME, "total_steps", "known", got, "Those need the length.")
        elif arrive <= begin:
            got = f"{self.warmup}, {self.tail} and {self.settle} of {self.total_steps}"
            fix = "Leave at least one step between them."
            raise value_error(_NAME, "warmup, tail and settle", "below total_steps", got, fix)


_NAME = "Schedule"


def _stepwise(n: int, m: int) -> tuple[str, str]:
    return f"'stepwise' with {n}:{m}", "Halving M has to arrive at N: m / n a power of 2 above 1."
