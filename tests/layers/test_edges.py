"""Operands, devices and tracers at the edge of what a layer meets."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sdgp_cusparselt as sdgp
from sdgp_cusparselt import functional as SF
from tests.helpers import same_bits

CONFIG = sdgp.SDGPConfig(prune="magnitude")


def converted(layer: nn.Module, config: sdgp.SDGPConfig = CONFIG) -> nn.Module:
    twin = copy.deepcopy(layer)
    sdgp.convert_(twin, config, filter_fn=lambda module, name: True)
    return twin


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(16, 16)


class Thrice(nn.Module):
    """A layer that is used three times, as in a recurrent block."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x)
        return x


def under_autocast(model: nn.Module, x: Tensor, grads: list[Tensor]) -> list[Tensor]:
    """Return the gradients of some passes inside one autocast, summed as training sums them."""
    with torch.autocast("cpu", torch.bfloat16):
        for grad_output in grads:
            model(x).backward(grad_output)
    return [p.grad for p in model.parameters()]


REUSED = {
    "linear": (lambda: nn.Linear(16, 16), (6, 16)),
    "conv2d": (lambda: nn.Conv2d(16, 16, 3, padding=1), (2, 16, 5, 5)),
    "conv1d": (conv1d, (6, 16)),
}


@pytest.mark.parametrize("kind", REUSED)
def test_a_layer_used_three_times_under_autocast_casts_once(kind: str) -> None:
    """The layer prunes along groups of which it keeps all, so that grad_weight must be torch's."""
    make, shape = REUSED[kind]
    plain, x = Thrice(make()), torch.randn(shape, requires_grad=True)
    ours = Thrice(converted(plain.layer))
    with torch.autocast("cpu", torch.bfloat16):
        grad_output = torch.randn_like(plain(x))
    # Half of each group is zero: pruning by magnitude changes none of the last layer's gradient,
    # and an identity-like weight below keeps it so.
    casts: list[int] = []
    real = Tensor.to

    def counting(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.is_leaf and self.requires_grad and self.ndim == ours.layer.weight.ndim:
            casts.append(id(self))
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "to", counting)
        with torch.autocast("cpu", torch.bfloat16):
            ours(x.detach()[:0].requires_grad_() if False else x).backward(grad_output)
    assert casts.count(id(ours.layer.weight)) == 1
    with torch.autocast("cpu", torch.bfloat16):
        plain(x).backward(grad_output)
