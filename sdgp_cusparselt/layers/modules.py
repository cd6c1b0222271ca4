"""SDGPLinear, SDGPConv2d and SDGPConv1D: torch's and Hugging Face's layers with a pruned backward.

A layer is converted by changing the class of the module object itself: parameters, buffers, hooks,
device, dtype, training flag and every reference to the module stay what they are.
"""

import functools
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from sdgp_cusparselt.config.choices import SDGPConfig, check_config
from sdgp_cusparselt.errors import SDGPError, type_error
from sdgp_cusparselt.layers import casting, functional
from sdgp_cusparselt.layers.autograd import pruned_linear
from sdgp_cusparselt.layers.masked import masked_linear
from sdgp_cusparselt.layers.plain import linear_prunes, may_prune
from sdgp_cusparselt.layers.schedule_state import NAME as SCHEDULE
from sdgp_cusparselt.layers.schedule_state import RECIPE, ScheduleState
from sdgp_cusparselt.layers.weight_masks import (
    MASK,
    MASK_T,
    as_outputs_inputs,
    clear_weight_mask_,
)
from sdgp_cusparselt.recording.records import LayerRecord

_STATE = (
    "sdgp_config",
    "sdgp_base_config",
    "sdgp_step",
    "sdgp_enabled",
    "sdgp_record",
    "sdgp_dense_class",
    "sdgp_rebound",
)
_CONV1D = "TransformersConv1D"


class SDGPModule(nn.Module):
    """What the three layers share: configuration, an on/off switch, a record, the way back.

    Attributes:
        sdgp_config: how this layer prunes now.
        sdgp_base_config: what it was converted with; differs where that has a schedule.
        sdgp_step: optimizer steps that ``sdgp.step`` counted.
        sdgp_enabled: False runs the layer exactly as its dense class does.
        sdgp_record: calls and fallbacks of this layer.
        sdgp_dense_class: the class that ``to_dense`` and ``revert_`` restore.
        sdgp_rebound: whether something put another Parameter in the weight's place, as FSDP does
            at each forward; then its version does not say when it changes.
    """

    sdgp_config: SDGPConfig
    sdgp_base_config: SDGPConfig
    sdgp_step: int
    sdgp_enabled: bool
    sdgp_record: LayerRecord
    sdgp_dense_class: type[nn.Module]
    sdgp_rebound: bool

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, and note when it is another weight."""
        if name == "weight" and value is not self._parameters.get(name):
            self.__dict__["sdgp_rebound"] = True
        super().__setattr__(name, value)

    @property
    def _masks(self) -> tuple[Tensor | None, Tensor | None]:
        """The masks of the weight as [outputs, inputs, ...], where there are any."""
        first, second = (self._buffers.get(name) for name in (MASK, MASK_T))
        return (
            None if first is None else as_outputs_inputs(self, first),
            None if second is None else as_outputs_inputs(self, second),
        )

    @classmethod
    def from_dense(cls, module: nn.Module, config: SDGPConfig) -> "SDGPModule":
        """Return a converted layer that shares the Parameters and hooks of ``module``.

        Args:
            module: layer of exactly the class that this one replaces.
            config: how to prune.

        Raises:
            TypeError: module is of another class, or config no SDGPConfig.
        """
        target = sdgp_class_of(module)
        if target is None or not issubclass(cls, target):
            rule = f"a layer that {cls.__name__} replaces"
            fix = "Only exact classes are converted; a subclass may compute something else."
            raise type_error(f"{cls.__name__}.from_dense", "module", rule, type(module), fix)
        twin: SDGPModule = _twin(module)
        adopt_(twin, config)
        return twin

    def to_dense(self) -> nn.Module:
        """Return a plain layer that shares the Parameters and hooks of this one."""
        twin: nn.Module = _twin(self)
        release_(twin)
        return twin

    def sdgp_set_step(self, step: int) -> None:
        """Take the configuration that holds at a step of the schedule."""
        self.sdgp_config = self.sdgp_base_config.at(step)
        self.sdgp_step = step
        recipe: Any = self._modules.get(RECIPE)
        if recipe is not None:
            recipe.set_step(step)

    def extra_repr(self) -> str:
        """Return the dense layer's own description and the active pruning."""
        dense = super().extra_repr()
        schedule = self.sdgp_base_config.schedule
        when = "" if schedule is None else f" at step {self.sdgp_step} ({schedule.describe()})"
        state = self.sdgp_config.describe() + when + ("" if self.sdgp_enabled else ", disabled")
        return f"{dense}, sdgp={state}" if dense else f"sdgp={state}"


class SDGPLinear(SDGPModule, nn.Linear):
    """``nn.Linear`` whose grad_input comes from a pruned grad_output."""

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight.T + bias: [..., in_features] -> [..., out_features]."""
        if is_traced(input):
            return _as_leaf(self, input)
        return _with_adapter(self, input, self._output(input))

    def _output(self, input: Tensor) -> Tensor:
        config, record = self.sdgp_config, self.sdgp_record
        if config.masks_weight and self.sdgp_enabled:
            keeps = not self.sdgp_rebound
            return masked_linear(input, self.weight, self.bias, self._masks, keeps, config, record)
        if not self.sdgp_enabled or not linear_prunes(input, self.weight, config, record):
            return super().forward(input)
        return pruned_linear(input, self.weight, self.bias, config, record)


class SDGPConv2d(SDGPModule, nn.Conv2d):
    """``nn.Conv2d`` whose grad_input comes from a grad_output pruned along channels."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of [N, in_channels, H, W] or [in_channels, H, W]."""
        if is_traced(input):
            return _as_leaf(self, input)
        config, record = self.sdgp_config, self.sdgp_record
        masks = config.masks_weight and self.sdgp_enabled
        if not self.sdgp_enabled or not (masks or may_prune(input, self.weight, config, record)):
            return super().forward(input)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            pads = self._reversed_padding_repeated_twice
            input, padding = nn.functional.pad(input, pads, mode=self.padding_mode), 0
        return functional.conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            config=config,
            record=record,
            masks=self._masks if masks else None,
            keeps=not self.sdgp_rebound,
        )


class SDGPConv1D(SDGPModule):
    """Hugging Face's ``Conv1D`` (a linear layer with a transposed weight), pruned in backward.

    What ``convert_`` makes is an instance of this class and of transformers' own.

    Attributes:
        weight: [in_features, out_features].
        bias: [out_features].
        nf: out_features.
        nx: in_features.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    nf: int
    nx: int

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight + bias: [..., in_features] -> [..., out_features]."""
        if is_traced(input):
            return _as_leaf(self, input)
        return _with_adapter(self, input, self._output(input))

    def _output(self, input: Tensor) -> Tensor:
        weight, config, record = self.weight.t(), self.sdgp_config, self.sdgp_record
        if config.masks_weight and self.sdgp_enabled:
            keeps = not self.sdgp_rebound
            return masked_linear(input, weight, self.bias, self._masks, keeps, config, record)
        if not self.sdgp_enabled or not linear_prunes(input, weight, config, record):
            output: Tensor = super().forward(input)
            return output
        dtype = casting.autocast_dtype(input)
        if dtype is not None:  # the Parameter itself is cast: no copy is kept of a view
            weight = casting.cast(self.weight, dtype).t()
        return pruned_linear(input, weight, self.bias, config, record)

    def __repr__(self) -> str:
        """Return name, sizes and the active pruning."""
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        """Return sizes and the active pruning."""
        return f"nf={self.nf}, nx={self.nx}, {super().extra_repr()}"


def _with_adapter(layer: SDGPModule, input: Tensor, output: Tensor) -> Tensor:
    """Return output with what a recipe's low-rank adapter adds to it."""
    recipe: Any = layer._modules.get(RECIPE)
    if recipe is None:
        return output
    added: Tensor = recipe.add_adapter(input, output)
    return added


def is_traced(input: object) -> bool:
    """Whether this is no tensor, but stands for one while ``torch.fx`` traces the model."""
    return isinstance(input, Proxy)


def _as_leaf(module: nn.Module, input: Any) -> Tensor:
    """Stay one node of a graph that ``torch.fx`` traces, as layers of torch.nn do."""
    tracer: Any = input.tracer
    path = tracer.path_of_module(module)
    if not path:
        raise SDGPError(
            "SDGP: torch.fx cannot trace a pruned layer by itself: its pruning is no graph of "
            "torch's operators. Trace the model around it, or call sdgp.revert_ first."
        )
    output: Tensor = tracer.create_proxy("call_module", path, (input,), {})
    return output


def sdgp_class_of(module: nn.Module) -> type[SDGPModule] | None:
    """Return the class that replaces ``module``'s, or None; subclasses are never replaced."""
    return _replacing(type(module))


def _replacing(kind: type) -> type[SDGPModule] | None:
    if kind is nn.Linear:
        return SDGPLinear
    if kind is nn.Conv2d:
        return SDGPConv2d
    # By name, because importing transformers takes seconds and it may not be installed.
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return SDGPConv1D
    return None


def _made_of(kind: type) -> type[SDGPModule] | None:
    """Return the class that a layer of this dense class gets."""
    target = _replacing(kind)
    return _transformers_conv1d() if target is SDGPConv1D else target


@functools.cache
def _transformers_conv1d() -> type[SDGPConv1D]:
    """Return the class of converted ``Conv1D`` layers, which is one of transformers', too."""
    from transformers.pytorch_utils import Conv1D

    names = {"__module__": __name__, "__qualname__": _CONV1D, "__doc__": SDGPConv1D.__doc__}
    return type(SDGPConv1D.__name__, (SDGPConv1D, Conv1D), names)


def __getattr__(name: str) -> Any:
    """Find that class by its name too, as unpickling a layer looks for it."""
    if name == _CONV1D:
        return _transformers_conv1d()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def adopt_(module: nn.Module, config: SDGPConfig, name: str = "") -> None:
    """Turn a dense layer into its SDGP class, in place.

    Args:
        module: an nn.Linear, nn.Conv2d or Hugging Face Conv1D.
        config: how to prune.
        name: fully qualified name for messages; the class name if empty.

    Raises:
        TypeError: module is of another class, or config no SDGPConfig.
    """
    target = _made_of(type(module))
    if target is None:
        rule = "an nn.Linear, nn.Conv2d or transformers Conv1D"
        raise type_error("adopt_", "module", rule, type(module), "Other layers stay dense.")
    check_config("adopt_", config)
    state = (
        config.at(0),
        config,
        0,
        True,
        LayerRecord(name or type(module).__name__),
        type(module),
        False,
    )
    module.__dict__.update(zip(_STATE, state, strict=True))
    module.__class__ = target
    if config.schedule is not None:
        assert isinstance(module, SDGPModule)
        module.add_module(SCHEDULE, ScheduleState(module))


def check_releasable(function: str, module: nn.Module) -> None:
    """Raise TypeError unless module is of one of our own classes, and of no subclass."""
    if not isinstance(module, SDGPModule) or type(module) is not _made_of(module.sdgp_dense_class):
        rule = "an SDGP layer whose class nothing else changed since"
        fix = "Convert it first; where fully_shard wrapped the layer itself, revert_ before that."
        raise type_error(function, "module", rule, type(module).__name__, fix)


def release_(module: nn.Module) -> None:
    """Turn an SDGP layer back into its dense class, in place.

    Raises:
        TypeError: module is no SDGP layer, or something else changed its class since.
    """
    check_releasable("release_", module)
    assert isinstance(module, SDGPModule)
    dense_class = module.sdgp_dense_class
    module.__class__ = dense_class  # type: ignore[assignment]
    for name in _STATE:
        del module.__dict__[name]
    module._modules.pop(SCHEDULE, None)
    module._modules.pop(RECIPE, None)
    clear_weight_mask_(module)


def reconfigure_(layer: SDGPModule, **changes: Any) -> None:
    """Change fields of a converted layer's configuration; the step stays.

    Args:
        layer: a converted layer.
        changes: fields of ``SDGPConfig``.

    Raises:
        ValueError, TypeError: as ``SDGPConfig``. The layer is then unchanged.
    """
    base, now = layer.sdgp_base_config.replace(**changes), layer.sdgp_config.replace(**changes)
    layer.sdgp_base_config, layer.sdgp_config = base, now


def _twin(module: nn.Module) -> Any:
    """Return a second module object over the same Parameters, buffers and hooks."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(module.__dict__[name])
    return twin
