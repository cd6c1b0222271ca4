"""What recipes do to gradients, once for each step of an optimizer: masks, and decay.

Not in the backward pass: there the decay would count once for each part of a batch, and a loss
scaler would divide it away.
"""

import weakref
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


class _State(Protocol):
    @property
    def weight(self) -> nn.Parameter: ...

    def mask_gradient(self) -> None: ...

    def decay_gradient(self, scale: float | Tensor = 1.0) -> None: ...


_watched: "weakref.WeakSet[Any]" = weakref.WeakSet()
_hooked: list[object] = []


def watch(state: _State) -> None:
    """Finish the gradient of a layer's weight before every step of an optimizer that trains it.

    Args:
        state: of the layer.
    """
    _watched.add(state)
    if not _hooked:
        _hooked.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: Optimizer, *_: object) -> None:
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    # A fused optimizer divides by the loss scale itself; the decay has to be in those units.
    scale = getattr(optimizer, "grad_scale", None)
    for state in list(_watched):
        if id(state.weight) in trained:
            state.mask_gradient()
            state.decay_gradient(1.0 if scale is None else scale)
