"""What a user may choose: one frozen dataclass that validates itself."""

import functools
import json
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from sdgp_cusparselt.errors import type_error, value_error

PruneMethod = Literal["none", "random", "magnitude", "rescaled_magnitude", "mvue"]
METHODS: tuple[str, ...] = get_args(PruneMethod)
MAX_M = 32
#: N:M patterns that fit the 2:4 format; 1:4 is a 2:4 whose second value is zero.
HARDWARE_PATTERNS = ((2, 4), (1, 4))

GradWeightMode = Literal["dense", "sparse"]
BackendName = Literal["auto", "cusparselt", "dense"]
OnUnsupported = Literal["dense", "raise"]
OnSlower = Literal["dense", "prune"]
TunePolicy = Literal["first_use", "ahead", "never"]


def check_pattern(
    function: str, method: object, n: object, m: object, *, argument: str = "method"
) -> None:
    """Raise unless method is known and 1 <= n <= m <= 32."""
    if method not in METHODS:
        rule = f"one of {', '.join(METHODS)}"
        raise value_error(function, argument, rule, repr(method), "Pick one of these.")
    n, m = checked_int(function, "n", n), checked_int(function, "m", m)
    if not 1 <= m <= MAX_M:
        raise value_error(function, "m", f"in 1..{MAX_M}", m, "Hardware runs m = 4.")
    if not 1 <= n <= m:
        raise value_error(function, "n", f"in 1..m with m = {m}", n, "Hardware runs n = 2.")


def checked_int(function: str, argument: str, value: object) -> int:
    """Return value if it is an int and no bool, else raise TypeError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise type_error(function, argument, "an int", repr(value), "Pass a whole number.")
    return value


@dataclass(frozen=True, kw_only=True)
class SDGPConfig:
    """How a layer's backward pass prunes its data gradient.

    grad_input = prune(grad_output) @ weight

    Attributes:
        prune: none, random, magnitude, rescaled_magnitude or mvue; see ``sdgp.prune``.
        n: kept elements per group.
        m: group size, at most 32. 2:4 and 1:4 run on hardware, every other pattern is emulated.
        grad_weight: "dense" as in the paper, or "sparse": grad_output pruned 2:4 along tokens.
        grad_weight_prune: method for that pruning; mvue, because a biased one does not train.
        backend: "auto", or "cusparselt" or "dense" to force one.
        on_unsupported: what to do where the wanted backend cannot run: "dense" announces it once
            per layer and reason and counts it, "raise" raises NotSupportedError.
        on_slower: what backend "auto" does where the sparse path was measured slower than dense:
            "dense" leaves the gradient unpruned, so that no shape is slower than without this
            package; "prune" prunes all the same, so that the numbers do not depend on the GPU.
        tune: "ahead" uses the sparse path only for shapes that ``sdgp tune`` decided before,
            "first_use" tunes a shape when it first occurs (seconds, once per GPU and version),
            "never" times nothing and uses the library's default algorithm where it proves right.
        check_every: compare a layer's sparse result with the dense one every so many calls; 0
            never does.
        telemetry_every: sample a layer's gradient error every so many calls; 0 never does. Only
            then does compiled code tell its layers apart, at one compilation for each.
        text: all of these as one string, for custom operators; ``from_text`` turns it back.
    """

    prune: PruneMethod = "magnitude"
    n: int = 2
    m: int = 4
    grad_weight: GradWeightMode = "dense"
    grad_weight_prune: PruneMethod = "mvue"
    backend: BackendName = "auto"
    on_unsupported: OnUnsupported = "dense"
    on_slower: OnSlower = "dense"
    tune: TunePolicy = "ahead"
    check_every: int = 0
    telemetry_every: int = 0
    text: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError, naming field, rule and value."""
        hints = get_type_hints(type(self))
        check_pattern("SDGPConfig", self.prune, self.n, self.m, argument="prune")
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for name, value in given.items():
            choices = get_args(hints[name])
            if choices:
                self._check_choice(name, value, choices)
            else:
                checked_int("SDGPConfig", name, value)
        self._check_ranges()
        object.__setattr__(self, "text", json.dumps(given))

    def _check_choice(self, name: str, value: object, choices: tuple[str, ...]) -> None:
        if not isinstance(value, str) or value not in choices:
            rule = f"one of {', '.join(choices)}"
            raise value_error("SDGPConfig", name, rule, repr(value), "Pick one of these.")

    def _check_ranges(self) -> None:
        for name in ("check_every", "telemetry_every"):
            if getattr(self, name) < 0:
                raise value_error("SDGPConfig", name, ">= 0", getattr(self, name), "0 is never.")
        if self.grad_weight == "sparse" and (self.n, self.m) not in HARDWARE_PATTERNS:
            raise value_error(
                "SDGPConfig",
                "grad_weight",
                '"dense" for a pattern that no hardware runs',
                f'"sparse" with {self.n}:{self.m}',
                "Use n=2, m=4, or grad_weight='dense'.",
            )

    @property
    def prunes(self) -> bool:
        """Whether grad_input differs from the dense one at all."""
        return self.prune != "none" and self.n < self.m

    @property
    def on_hardware(self) -> bool:
        """Whether a sparse tensor core can run this pattern; everything else is emulated."""
        return (self.n, self.m) in HARDWARE_PATTERNS

    def replace(self, **changes: Any) -> "SDGPConfig":
        """Return a copy with some fields changed, validated again."""
        return replace(self, **changes)

    @staticmethod
    def from_text(text: str) -> "SDGPConfig":
        """Return the configuration whose ``text`` this is."""
        return _config_of(text)

    def describe(self) -> str:
        """Return a short form for reprs and tables, such as ``magnitude 2:4``."""
        parts = [f"{self.prune} {self.n}:{self.m}" if self.prunes else "none"]
        if self.prunes and not self.on_hardware:
            parts.append("(emulated)")
        if self.grad_weight == "sparse":
            parts.append(f"grad_weight={self.grad_weight_prune}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend}")
        return " ".join(parts)


@functools.lru_cache(maxsize=256)
def _config_of(text: str) -> SDGPConfig:
    return SDGPConfig(**json.loads(text))


def check_config(function: str, config: object) -> None:
    """Raise TypeError unless config is an SDGPConfig."""
    if not isinstance(config, SDGPConfig):
        fix = "Pass sdgp.SDGPConfig(...)."
        raise type_error(function, "config", "an SDGPConfig", type(config).__name__, fix)
