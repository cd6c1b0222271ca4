"""A device that could run sparse, on a CPU: the emulator, its backend, and layers that meet it."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from tests.emulator.control import Emulator

NEVER = {"prune": "magnitude", "tune": "never"}
REFUSED = 10  # CUSPARSE_STATUS_NOT_SUPPORTED


class World(SimpleNamespace):
    """What an outcome may turn: emulator, backend, patch, and the layer that meets it."""

    emulator: Emulator
    backend: CusparseLtBackend
    patch: pytest.MonkeyPatch

    def linear(self, outputs: int = 64, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        return nn.Linear(32, outputs).to(dtype)

    def raising(self, error: Exception) -> Callable[..., None]:
        def fail(*args: object, **kwargs: object) -> None:
            raise error

        return fail


def prepared(world: World) -> None:
    """Let one layer of the same kind run sparse, so that what fails later fails while it runs."""
    layer = world.linear()
    sdgp.convert_(layer, sdgp.SDGPConfig(**NEVER))
    step(layer)
    assert layer.sdgp_record.calls == {("grad_input", "sparse"): 1}


def step(layer: nn.Module) -> list[Tensor]:
    """Return the gradients of one step on the same data for every layer of one shape."""
    torch.manual_seed(3)
    tokens = (getattr(layer, "tokens", 48), 32)
    shape = (2, 32, 5, 5) if isinstance(layer, nn.Conv2d) else tokens
    x = torch.randn(shape).to(layer.weight.dtype)
    if x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    layer.zero_grad()
    output = layer(x)
    output.backward(torch.randn(output.shape).to(output.dtype))
    return [x.grad, layer.weight.grad, layer.bias.grad]


def misaligned_linear() -> nn.Module:
    """Return a layer whose weight begins two bytes after a multiple of 16."""
    layer = nn.Linear(32, 64).bfloat16()
    memory = torch.empty(64 * 32 + 1, dtype=torch.bfloat16)[1:].view(64, 32)
    layer.weight = nn.Parameter(memory.copy_(layer.weight.detach()))
    return layer
