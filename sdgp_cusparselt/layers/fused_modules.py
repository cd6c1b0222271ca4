"""FusedModule: a module whose linear layers and activations run as one node of the graph.

The module keeps its children, Parameters and names; only what its own forward does is done by
another class, made of the module's own and of this one. Whenever something could see the
difference, a hook on a child, a replaced child, another class of weight, its own forward runs.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sdgp_cusparselt.errors import type_error
from sdgp_cusparselt.layers import activations, casting
from sdgp_cusparselt.layers.autograd import pruned_linear
from sdgp_cusparselt.layers.chains import Child, Function, Gated
from sdgp_cusparselt.layers.fused import Part, activated_linear, can_fuse
from sdgp_cusparselt.layers.modules import SDGPConv1D, SDGPLinear
from sdgp_cusparselt.layers.plain import linear_prunes
from sdgp_cusparselt.layers.schedule_state import NAME as SCHEDULE

_STATE = "sdgp_fusion"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class Fused:
    """x -> dropout(activation(layer(x)) [* up(x)]) as one node.

    Attributes:
        layers: names of the linear layer and, if gated, of the one it is multiplied by.
        spelling: of the activation, one of ``activations.SPELLINGS``.
        activation: name of the child that computes it, or None where a function does.
        kind: the class of that child.
        dropout: name of the child that drops, or None.
    """

    layers: tuple[str, ...]
    spelling: str
    activation: str | None = None
    kind: type[nn.Module] | None = None
    dropout: str | None = None

    @property
    def producer(self) -> str:
        """What makes the gradient, such as ``gelu``, ``silu gate`` or ``relu and dropout``."""
        gate = " gate" if len(self.layers) > 1 else ""
        drop = " and dropout" if self.dropout is not None else ""
        return f"{activations.derivative_of(self.spelling)}{gate}{drop}"

    def describe(self) -> str:
        """Return names and producer, such as ``gate_proj, up_proj with silu gate``."""
        return f"{', '.join(self.layers)} with {self.producer}"


Step = Fused | Child | Function | Gated


@dataclass(frozen=True)
class Fusion:
    """What a fused module runs.

    Attributes:
        steps: one after the other.
        children: names that the module's children had when they were read.
    """

    steps: tuple[Step, ...]
    children: tuple[str, ...]

    @property
    def fused(self) -> list[Fused]:
        """The steps that are fused."""
        return [step for step in self.steps if isinstance(step, Fused)]


class FusedModule(nn.Module):
    """What every fused module is, besides its own class.

    Attributes:
        sdgp_fusion: what it runs; None runs its own forward.
        sdgp_unfused_class: the class that ``revert_`` restores.
    """

    sdgp_fusion: Fusion | None = None  # what slices of an nn.Sequential have
    sdgp_unfused_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own forward returns."""
        fusion, given = self.sdgp_fusion, (*args, *kwargs.values())
        if fusion is None or len(given) != 1 or not _runs(self, fusion, given[0]):
            return super().forward(*args, **kwargs)
        x = given[0]
        for step in fusion.steps:
            x = _run(step, self, x)
        return x

    def extra_repr(self) -> str:
        """Return the module's own description and what is fused."""
        own = super().extra_repr()
        steps = [] if self.sdgp_fusion is None else self.sdgp_fusion.fused
        fused = f"sdgp=fused {'; '.join(step.describe() for step in steps)}" if steps else ""
        return ", ".join(part for part in (own, fused) if part)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the module's own class, of which this one is made again."""
        return _blank, (self.sdgp_unfused_class,), self.__dict__.copy()


def fuse_module_(module: nn.Module, fusion: Fusion) -> None:
    """Have a module run its fused steps, in place.

    Args:
        module: not fused.
        fusion: what its forward does.
    """
    module.__dict__[_STATE] = fusion
    module.__class__ = _fused_class(type(module))


def check_unfusable(function: str, module: nn.Module) -> None:
    """Raise TypeError unless module is of a class of ``fuse_module_``, and of no subclass."""
    own = getattr(module, "sdgp_unfused_class", None)
    if own is None or type(module) is not _fused_class(own):
        rule = "a fused module whose class nothing else changed since"
        fix = "Where fully_shard wrapped it, revert_ before that."
        raise type_error(function, "module", rule, type(module).__name__, fix)


def unfuse_module_(module: nn.Module) -> None:
    """Have a module run its own forward again, in place.

    Raises:
        TypeError: it is not fused, or something else changed its class since.
    """
    check_unfusable("unfuse_module_", module)
    module.__class__ = module.sdgp_unfused_class  # type: ignore[assignment]
    module.__dict__.pop(_STATE, None)


def obstacle(module: nn.Module, step: Fused) -> str | None:
    """Return why a step cannot be fused as the children of its module are now, or None.

    Args:
        module: the module.
        step: of its chain.
    """
    for name in step.layers:
        reason = _obstacle_of_layer(module.get_submodule(name))
        if reason is not None:
            return reason
    others = ((step.activation, step.kind), (step.dropout, nn.Dropout))
    for other, kind in others:
        if other is None:
            continue
        child = module.get_submodule(other)
        if type(child) is not kind:
            return f"its {other} is another one than was read"
        if is_watched(child):
            return f"something hooks into its {other}"
    return None


def is_watched(module: nn.Module) -> bool:
    """Whether something would see that a module is not called: hooks, or another forward."""
    return "forward" in module.__dict__ or any(module.__dict__.get(name) for name in _HOOKS)


def _obstacle_of_layer(layer: nn.Module) -> str | None:
    if not isinstance(layer, (SDGPLinear, SDGPConv1D)):
        return f"a {type(layer).__name__} is no converted linear layer"
    if is_watched(layer):
        return "something hooks into it"
    # 2:4 weights, and whatever else changes a weight before it is multiplied.
    if set(layer._modules) - {SCHEDULE} or layer._buffers or layer.sdgp_config.masks_weight:
        return "it holds more than a weight and a bias"
    return None


def _runs(module: nn.Module, fusion: Fusion, x: object) -> bool:
    """Whether the fused steps do what the module's own forward would, for this input."""
    if not isinstance(x, Tensor) or tuple(module._modules) != fusion.children or _seen_by_all():
        return False
    for step in fusion.fused:
        if obstacle(module, step) is not None:
            return False
        layers: list[Any] = [module.get_submodule(name) for name in step.layers]
        if not all(layer.sdgp_enabled for layer in layers):
            return False
        if not can_fuse(x, *(layer.weight for layer in layers)):
            return False
    return True


def _seen_by_all() -> bool:
    """Whether hooks are registered for every module, as profilers of modules do."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _run(step: Step, module: nn.Module, x: Any) -> Any:
    if isinstance(step, Child):
        return module.get_submodule(step.name)(x)
    if isinstance(step, Function):
        return activations.computed(step.spelling, x)
    if isinstance(step, Gated):
        gate, up = module.get_submodule(step.gate), module.get_submodule(step.up)
        return _run(step.activation, module, gate(x)) * up(x)
    return _run_fused(step, module, x)


def _run_fused(step: Fused, module: nn.Module, x: Tensor) -> Tensor:
    layers: list[Any] = [module.get_submodule(name) for name in step.layers]
    # Asked once a call: it counts the calls that stay plain.
    prunes = [
        linear_prunes(x, _matrix(layer, layer.weight), layer.sdgp_config, layer.sdgp_record)
        for layer in layers
    ]
    drop = None if step.dropout is None else module.get_submodule(step.dropout)
    if all(prunes):
        parts = tuple(_part(layer, x) for layer in layers)
        p = float(drop.p) if isinstance(drop, nn.Dropout) and drop.training else 0.0
        return activated_linear(x, parts, step.spelling, p)
    pre, *up = [_separate(layer, x, own) for layer, own in zip(layers, prunes, strict=True)]
    activation = step.activation
    hidden = (
        activations.computed(step.spelling, pre)
        if activation is None
        else module.get_submodule(activation)(pre)
    )
    hidden = hidden * up[0] if up else hidden
    return hidden if drop is None else drop(hidden)


def _part(layer: Any, x: Tensor) -> Part:
    dtype, weight = casting.autocast_dtype(x), layer.weight
    if dtype is not None:  # the Parameter itself is cast: no copy is kept of a view
        weight = casting.cast(weight, dtype)
    return Part(_matrix(layer, weight), layer.bias, layer.sdgp_config, layer.sdgp_record)


def _separate(layer: Any, x: Tensor, prunes: bool) -> Tensor:
    if not prunes:
        output: Tensor = layer.sdgp_dense_class.forward(layer, x)
        return output
    return pruned_linear(x, *_part(layer, x))


def _matrix(layer: Any, weight: Tensor) -> Tensor:
    """Return a weight as [out_features, in_features]."""
    return weight.t() if isinstance(layer, SDGPConv1D) else weight


#: Kind -> the class of fused modules of that kind.
_classes: dict[type[nn.Module], type[FusedModule]] = {}


def _fused_class(kind: type[nn.Module]) -> type[FusedModule]:
    """Return the class of fused modules of a kind; it keeps its name, by which some look for it."""
    if kind not in _classes:
        names: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        names |= {"__doc__": kind.__doc__, "sdgp_unfused_class": kind}
        _classes[kind] = type(kind.__name__, (FusedModule, kind), names)
    return _classes[kind]


def _blank(kind: type[nn.Module]) -> FusedModule:
    return object.__new__(_fused_class(kind))
