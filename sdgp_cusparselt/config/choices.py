"""What a user may choose: one frozen dataclass that validates itself."""

import functools
import json
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from sdgp_cusparselt.config.combinations import why_not
from sdgp_cusparselt.config.patterns import (
    HARDWARE_PATTERNS,
    PruneMethod,
    check_pattern,
    check_sizes,
    checked_int,
)
from sdgp_cusparselt.config.schedule import Schedule, Stage
from sdgp_cusparselt.errors import type_error, value_error

ForwardMode = Literal["dense", "sparse_weight"]
GradInputOperand = Literal["grad_output", "weight"]
GradWeightMode = Literal["dense", "sparse"]
BackendName = Literal["auto", "cusparselt", "dense"]
OnUnsupported = Literal["plain", "emulate", "raise"]
OnSlower = Literal["plain", "emulate"]
TunePolicy = Literal["auto", "first_use", "ahead", "never"]


@dataclass(frozen=True, kw_only=True)
class SDGPConfig:
    """Which operands of a layer's three products are 2:4, and how they are pruned.

    output      = input @ weight.T                (weight 2:4 if forward="sparse_weight")
    grad_input  = prune(grad_output) @ weight     (or grad_output @ weight, 2:4 along out_features)
    grad_weight = grad_output.T @ input           (grad_output 2:4 along tokens if so configured)

    What makes sense together is the table of ``config.combinations``.

    Attributes:
        prune: none, random, magnitude, rescaled_magnitude or mvue; see ``sdgp.prune``. mvue by
            default: on a small GPT the biased methods end 0.4 to 1.3 bits per byte behind dense.
        n: kept elements per group.
        m: group size, at most 32. 2:4 and 1:4 run on hardware, every other pattern is emulated.
        beta: mask decay of grad_input: kept + beta * (grad_output - kept), with kept the pruned
            gradient. 0 prunes, 1 is dense; between them the gradient has no zeros: emulated.
        heavy_tokens: share of a linear layer's tokens, those of largest gradient, that grad_input
            takes exactly; each costs a second row of the same sparse product. Only with mvue 2:4;
            convolutions have none.
        forward: "dense", or "sparse_weight": the weight pruned weight_n:weight_m along in_features,
            by the layer's mask or, without one, by magnitude whenever it is packed. Every product
            then uses the pruned weight; its gradient reaches the whole weight (straight through).
        grad_input: which operand of it is sparse: "grad_output", as ``prune`` says, or "weight":
            the pruned weight, pruned along out_features as well. Needs prune="none".
        weight_n: elements of the weight kept per group.
        weight_m: its group size. 2:4 and 1:4 run on hardware, every other pattern is emulated.
        weight_beta: mask decay of the weight: kept + weight_beta * the rest. 0 prunes, 1 is dense;
            between them the weight has no zeros: emulated.
        grad_weight: "dense" as in the paper, or "sparse": grad_output pruned 2:4 along tokens.
        grad_weight_prune: method for that pruning; mvue, because a biased one does not train.
        backend: "auto": sparse or plain where the tensors' device has sparse tensor cores, emulated
            where it has none. "cusparselt": sparse also where that was measured slower. "dense":
            emulated, pruned and multiplied densely, on any device.
        on_unsupported: what to do where a product cannot run sparse: "plain" leaves its gradient
            unpruned, as without this package, "emulate" prunes it and multiplies densely, "raise"
            raises NotSupportedError. The first two say so once for each reason and count it.
        on_slower: what backend "auto" does where the sparse path was measured slower than dense:
            "plain" leaves the gradient unpruned, so that no shape is slower than without this
            package; "emulate" prunes all the same, so that the numbers do not depend on the GPU.
        tune: how shapes get onto the sparse path, once per GPU and version. "auto" takes what was
            decided before, and else tries a few algorithms when a shape first occurs (about 2 s a
            shape, 60 s a process, nothing where the GPU's published speeds rule a gain out);
            "first_use" tries all of them then, "ahead" only takes what ``sdgp tune`` decided
            before, "never" times nothing and uses the library's default algorithm where it proves
            right. What is not on the sparse path runs plain.
        check_every: compare a layer's sparse result with the dense one every so many calls; 0
            never does.
        telemetry_every: sample a layer's gradient error every so many calls; 0 never does. Only
            then does compiled code tell its layers apart, at one compilation for each.
        schedule: how prune, n, m and beta change over the steps; ``sdgp.step`` drives it. The
            other fields are where it arrives. Layers hold what ``at`` returns for their step.
        prunes: whether the gradient is pruned for grad_input at all.
        masks_weight: whether the products use a pruned weight at all.
        text: all of these as one string, for custom operators; ``from_text`` turns it back.
    """

    prune: PruneMethod = "mvue"
    n: int = 2
    m: int = 4
    beta: float = 0.0
    heavy_tokens: float = 0.0
    forward: ForwardMode = "dense"
    grad_input: GradInputOperand = "grad_output"
    grad_weight: GradWeightMode = "dense"
    grad_weight_prune: PruneMethod = "mvue"
    weight_n: int = 2
    weight_m: int = 4
    weight_beta: float = 0.0
    backend: BackendName = "auto"
    on_unsupported: OnUnsupported = "plain"
    on_slower: OnSlower = "plain"
    tune: TunePolicy = "auto"
    check_every: int = 0
    telemetry_every: int = 0
    schedule: Schedule | None = None
    # Stored, because a property would have compiled code depend on beta beyond the text.
    prunes: bool = field(init=False, repr=False, compare=False, default=False)
    masks_weight: bool = field(init=False, repr=False, compare=False, default=False)
    text: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError, naming field, rule and value."""
        hints = get_type_hints(type(self))
        check_pattern("SDGPConfig", self.prune, self.n, self.m, argument="prune")
        check_sizes("SDGPConfig", self.weight_n, self.weight_m, names=("weight_n", "weight_m"))
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for name, value in given.items():
            choices = get_args(hints[name])
            if name == "schedule":
                self._check_schedule()
            elif name in ("beta", "weight_beta"):
                self._check_beta(name)
            elif name == "heavy_tokens":
                self._check_heavy_tokens()
            elif choices:
                self._check_choice(name, value, choices)
            else:
                checked_int("SDGPConfig", name, value)
        self._check_ranges()
        prunes = self.prune != "none" and self.n < self.m and self.beta < 1
        masks = self.weight_n < self.weight_m and self.weight_beta < 1
        object.__setattr__(self, "prunes", prunes)
        object.__setattr__(self, "masks_weight", self.forward == "sparse_weight" and masks)
        given["schedule"] = None if self.schedule is None else self.schedule.as_dict()
        object.__setattr__(self, "text", json.dumps(given))

    def _check_choice(self, name: str, value: object, choices: tuple[str, ...]) -> None:
        if not isinstance(value, str) or value not in choices:
            rule = f"one of {', '.join(choices)}"
            raise value_error("SDGPConfig", name, rule, repr(value), "Pick one of these.")

    def _check_beta(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise type_error("SDGPConfig", name, "a number", repr(value), "0 prunes.")
        if not 0 <= value <= 1:
            raise value_error("SDGPConfig", name, "in 0..1", value, "0 prunes, 1 is dense.")

    def _check_heavy_tokens(self) -> None:
        share = self.heavy_tokens
        if not isinstance(share, int | float) or isinstance(share, bool):
            fix = "0.06 keeps 6 % of them."
            raise type_error("SDGPConfig", "heavy_tokens", "a number", repr(share), fix)
        if not 0 <= share <= 1:
            fix = "0.06 keeps 6 % of them."
            raise value_error("SDGPConfig", "heavy_tokens", "in 0..1", share, fix)
        if share and ((self.prune, self.n, self.m) != ("mvue", 2, 4) or self.beta):
            rule, got = (
                "0 but for mvue 2:4 without beta",
                f"{share} with {self.prune} {self.n}:{self.m}",
            )
            fix = "Use prune='mvue': what is not heavy has to be unbiased."
            raise value_error("SDGPConfig", "heavy_tokens", rule, got, fix)

    def _check_schedule(self) -> None:
        given: object = self.schedule
        if given is not None and not isinstance(given, Schedule):
            fix = "Pass sdgp.Schedule(...)."
            got = type(given).__name__
            raise type_error("SDGPConfig", "schedule", "a Schedule or None", got, fix)
        if self.schedule is None:
            return
        self.schedule.patterns(self.n, self.m)
        if self.schedule.ramp != "none" and self.grad_weight == "sparse":
            fix = "Use ramp='none', or grad_weight='dense'."
            rule = '"dense" while a ramp runs patterns that no hardware runs'
            raise value_error("SDGPConfig", "grad_weight", rule, '"sparse"', fix)
        if self.beta and self.schedule.decay != "none":
            fix = "The decay sets it."
            raise value_error("SDGPConfig", "beta", "0 under a mask decay", self.beta, fix)

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
        fault = why_not(self)
        if fault is not None:
            raise value_error("SDGPConfig", *fault)

    @property
    def on_hardware(self) -> bool:
        """Whether a sparse tensor core can run this pattern; everything else is emulated."""
        return (self.n, self.m) in HARDWARE_PATTERNS and not self.decays

    @property
    def decays(self) -> bool:
        """Whether what is not kept stays in the gradient in part; that is emulated."""
        return 0 < self.beta < 1

    def at(self, step: int) -> "SDGPConfig":
        """Return the configuration that holds at a step, without a schedule.

        Args:
            step: optimizer steps taken so far.

        Raises:
            TypeError: step is no int.
            ValueError: step is negative.
        """
        if checked_int("SDGPConfig.at", "step", step) < 0:
            raise value_error("SDGPConfig.at", "step", ">= 0", step, "Training starts at 0.")
        if self.schedule is None:
            return self
        return _at_stage(self, self.schedule.stage(step, self.prune, self.n, self.m))

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
        if self.prunes and self.decays:
            parts.append(f"beta={self.beta:.3g}")
        if self.prunes and not self.on_hardware:
            parts.append("(emulated)")
        if self.heavy_tokens:
            parts.append(f"heavy_tokens={self.heavy_tokens:.3g}")
        if self.forward == "sparse_weight":
            parts.append(f"weight {self.weight_n}:{self.weight_m}")
            if 0 < self.weight_beta < 1:
                parts.append(f"weight_beta={self.weight_beta:.3g}")
        if self.grad_input == "weight":
            parts.append("both ways")
        if self.grad_weight == "sparse":
            parts.append(f"grad_weight={self.grad_weight_prune}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend}")
        if self.schedule is not None:
            parts.append(f"scheduled: {self.schedule.describe()}")
        return " ".join(parts)


@functools.lru_cache(maxsize=256)
def _config_of(text: str) -> SDGPConfig:
    given = json.loads(text)
    if given.get("schedule") is not None:
        given["schedule"] = Schedule(**given["schedule"])
    return SDGPConfig(**given)


@functools.lru_cache(maxsize=256)
def _at_stage(config: SDGPConfig, stage: Stage) -> SDGPConfig:
    """Return one object for all steps of a stage, so that nothing is compiled twice."""
    changes: dict[str, Any] = {"schedule": None, **stage._asdict()}
    if config.schedule is not None and config.schedule.decay == "none":
        changes["beta"] = config.beta
    if stage.prune == "none":
        changes["grad_weight"] = "dense"
    if (stage.prune, stage.n, stage.m, changes["beta"]) != ("mvue", 2, 4, 0):
        changes["heavy_tokens"] = 0.0
    return config.replace(**changes)


def check_config(function: str, config: object) -> None:
    """Raise TypeError unless config is an SDGPConfig."""
    if not isinstance(config, SDGPConfig):
        fix = "Pass sdgp.SDGPConfig(...)."
        raise type_error(function, "config", "an SDGPConfig", type(config).__name__, fix)
