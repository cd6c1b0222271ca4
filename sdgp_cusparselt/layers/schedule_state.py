"""ScheduleState: where a layer stands in its schedule, as a part of its model's checkpoints."""

import json
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sdgp_cusparselt.config.schedule import Schedule
from sdgp_cusparselt.errors import SDGPScheduleWarning, value_error

#: Name of the child module of a layer with a schedule, and so a part of its state dict's key.
NAME = "sdgp_schedule"
#: Name of the child module that a recipe of ``weights`` gives a layer.
RECIPE = "sdgp_recipe"
#: Bytes of the state: distributed checkpoints load into tensors of the same size.
BLOCK = 1024
#: Steps of an optimizer after which a schedule that has not moved is reported.
PATIENCE = 10


class ScheduleState(nn.Module):
    """The child of a layer with a schedule that puts step and schedule into its state dict.

    A tensor of bytes under ``<layer>.sdgp_schedule._extra_state``: every format of checkpoints
    carries it. It has neither parameters nor buffers, so nothing casts, moves or broadcasts it.

    Args:
        layer: the layer, an SDGPModule; not registered as a child of its own child.
    """

    layer: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer
        self.seen = 0
        self.reported = False
        _watch(self)

    @property
    def schedule(self) -> Schedule:
        """What the layer was converted with."""
        schedule = self.layer.sdgp_base_config.schedule
        assert isinstance(schedule, Schedule)  # layers without one have no such child
        return schedule

    def get_extra_state(self) -> Tensor:
        """Return step and schedule as JSON in uint8, filled up with spaces."""
        state = {"step": self.layer.sdgp_step, "schedule": self.schedule.as_dict()}
        text = json.dumps(state).encode()
        return torch.tensor(list(text.ljust(-len(text) // BLOCK * -BLOCK)), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Put the layer where the checkpoint says; warn if that had another schedule.

        Raises:
            ValueError: the state is not what ``get_extra_state`` returned.
        """
        try:
            saved = json.loads(bytes(state.tolist()))
            step, schedule = int(saved["step"]), Schedule(**saved["schedule"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            got, fix = f"{state!r} ({error})", "Load what a converted model's state_dict() gave."
            rule = "step and schedule as JSON in uint8"
            raise value_error("load_state_dict", NAME, rule, got, fix) from error
        if schedule != self.schedule:
            warnings.warn(
                f"the checkpoint was written under another schedule ({schedule.describe()}); "
                f"training goes on at step {step} of this one ({self.schedule.describe()})",
                SDGPScheduleWarning,
                stacklevel=2,
            )
        self.layer.sdgp_set_step(step)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load; a checkpoint of the plain model has no step and changes none."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing: list[str] = args[2]
        key = f"{prefix}_extra_state"
        if key in missing:
            missing.remove(key)


_watched: "weakref.WeakSet[ScheduleState]" = weakref.WeakSet()
_steps: "weakref.WeakKeyDictionary[Optimizer, int]" = weakref.WeakKeyDictionary()
_hooked: list[object] = []


def _watch(state: ScheduleState) -> None:
    """Look at this schedule whenever an optimizer has stepped a number of times."""
    _watched.add(state)
    if not _hooked:
        _hooked.append(register_optimizer_step_post_hook(_after_step))


def _after_step(optimizer: Optimizer, *_: object) -> None:
    _steps[optimizer] = _steps.get(optimizer, 0) + 1
    if _steps[optimizer] % PATIENCE:
        return
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    stuck = []
    for state in list(_watched):
        layer = state.layer
        if not any(id(p) in trained for p in layer.parameters(recurse=False)):
            continue
        if layer.sdgp_step == state.seen and not state.reported:
            stuck.append(state)
        state.seen = layer.sdgp_step
    if stuck:
        for state in stuck:
            state.reported = True
        warnings.warn(
            f"{PATIENCE} optimizer steps passed and the schedule of {len(stuck)} layers still "
            f"stands at step {stuck[0].seen} ({stuck[0].schedule.describe()}). Call "
            "sdgp.step(model) after each optimizer.step(), or sdgp.step_with(optimizer, model)",
            SDGPScheduleWarning,
            stacklevel=3,
        )
