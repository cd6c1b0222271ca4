"""step, step_with and the state of schedules: what moves a converted model through its phases."""

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sdgp_cusparselt.config.patterns import checked_int
from sdgp_cusparselt.errors import type_error, value_error
from sdgp_cusparselt.layers.convert import converted_layers
from sdgp_cusparselt.layers.schedule_state import RECIPE

#: Layer -> the optimizer whose steps it counts since ``step_with``.
_drivers: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Optimizer]]"
_drivers = weakref.WeakKeyDictionary()


def step(model: nn.Module) -> int:
    """Tell a converted model that the optimizer took a step; call it once after each.

    Layers whose phase ends take their next configuration. Code that ``torch.compile`` made of them
    is compiled anew once for each phase, and kept.

    Args:
        model: any module with converted layers, wrapped or not.

    Returns:
        Optimizer steps counted so far.

    Raises:
        TypeError: model is no module.
        ValueError: it has no converted layer, its layers count different steps, or ``step_with``
            counts them already.
    """
    _check_undriven("step", model)
    return _advance("step", model)


def step_with(optimizer: Any, model: nn.Module) -> RemovableHandle:
    """Call ``step(model)`` after every ``optimizer.step()`` that is really taken.

    A step that a loss scaler skips is not counted.

    Args:
        optimizer: a torch optimizer, or Accelerate's or Lightning's wrapper of one; of several
            take one.
        model: any module with converted layers, wrapped or not.

    Returns:
        Handle whose ``remove()`` ends it.

    Raises:
        TypeError: optimizer is no torch optimizer, or model no module.
        ValueError: model has no converted layer, or an optimizer counts its steps already.
    """
    # Wrappers call themselves optimizers, but take no hooks of their own.
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        got = type(optimizer).__name__
        fix = "Pass what torch.optim made."
        raise type_error("step_with", "optimizer", "a torch.optim.Optimizer", got, fix)
    _count("step_with", model)
    _check_undriven("step_with", model)
    handle = _Driving(optimizer.register_step_post_hook(lambda *_: _counted(model)), model)
    for _, layer in converted_layers("step_with", model):
        _drivers[layer] = weakref.ref(optimizer)
    return handle


class _Driving(RemovableHandle):
    """The optimizer's handle, whose removal also lets the model be driven in another way."""

    def __init__(self, hook: RemovableHandle, model: nn.Module) -> None:
        self.__dict__.update(hook.__dict__)
        self._layers = weakref.WeakSet(layer for _, layer in converted_layers("step_with", model))

    def remove(self) -> None:
        """Stop counting."""
        super().remove()
        for layer in self._layers:
            _drivers.pop(layer, None)
        self._layers.clear()


def _check_undriven(function: str, model: nn.Module) -> None:
    """Raise ValueError if ``step_with`` counts a layer's steps for an optimizer that lives."""
    for name, layer in converted_layers(function, model):
        driver = _drivers.get(layer)
        if driver is not None and driver() is not None:
            rule = "one whose steps nothing else counts"
            got = f"one whose layer {name or '(root)'!r} sdgp.step_with drives already"
            fix = (
                "Count in one place only, or call remove() on the handle of the earlier step_with."
            )
            raise value_error(function, "model", rule, got, fix)


def schedule_state(model: nn.Module) -> dict[str, Any]:
    """Return where a converted model stands in its schedule.

    The state dict of layers with a schedule carries the same; this is for checkpoints of other
    things, such as adapters alone.

    Args:
        model: any module with converted layers, wrapped or not.

    Returns:
        Plain types: {"step": optimizer steps counted}.

    Raises:
        TypeError: model is no module.
        ValueError: it has no converted layer, or its layers count different steps.
    """
    return {"step": _count("schedule_state", model)}


def load_schedule_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put a converted model where ``schedule_state`` says that another one stood.

    Args:
        model: any module with converted layers, wrapped or not.
        state: what ``schedule_state`` returned.

    Raises:
        TypeError: model is no module, or state no such dictionary.
        ValueError: model has no converted layer, or the step is negative. It is then unchanged.
    """
    layers = converted_layers("load_schedule_state", model)
    if not isinstance(state, Mapping) or set(state) != {"step"}:
        rule, fix = 'a dictionary with the key "step"', "Pass what schedule_state returned."
        raise type_error("load_schedule_state", "state", rule, repr(state), fix)
    count = checked_int("load_schedule_state", "state['step']", state["step"])
    if count < 0:
        fix = "Pass what schedule_state returned."
        raise value_error("load_schedule_state", "state['step']", ">= 0", count, fix)
    for _, layer in layers:
        layer.sdgp_set_step(count)


def _counted(model: nn.Module) -> None:
    _advance("step_with", model)


def _advance(function: str, model: nn.Module) -> int:
    count = _count(function, model) + 1
    for _, layer in converted_layers(function, model):
        layer.sdgp_set_step(count)
    return count


def _count(function: str, model: nn.Module) -> int:
    """Return the steps that every layer of model counted; of those with a schedule, if any has."""
    layers = [layer for _, layer in converted_layers(function, model)]
    # Only the step of a schedule or recipe is in checkpoints: others' is 0 after loading one.
    scheduled = [
        layer
        for layer in layers
        if layer.sdgp_base_config.schedule is not None or RECIPE in layer._modules
    ]
    counts = {layer.sdgp_step for layer in scheduled or layers}
    if len(counts) > 1:
        fix = "Bring them together with sdgp.load_schedule_state(model, {'step': n})."
        rule = "one whose layers count the same steps"
        raise value_error(function, "model", rule, sorted(counts), fix)
    return counts.pop()
