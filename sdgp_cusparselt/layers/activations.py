"""Which activations are fused, under which names, and which module computes which of them.

The forward is what the module itself computes, to the bit; so GELU written out in elementary
operations is a spelling of its own, with the derivative of the GELU that it spells.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdgp_cusparselt.pruning import producers

Elementwise = Callable[[Tensor], Tensor]

_ROOT = math.sqrt(2.0 / math.pi)


def _gelu_tanh_written_out(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(_ROOT * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _gelu_written_out(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


#: Spelling -> (the activation whose derivative it has, what it computes).
_WRITTEN_OUT: dict[str, tuple[str, Elementwise]] = {
    "gelu_tanh, written out": ("gelu_tanh", _gelu_tanh_written_out),
    "gelu_tanh, written out for speed": ("gelu_tanh", _gelu_fast),
    "gelu, written out": ("gelu", _gelu_written_out),
}
SPELLINGS = (*producers.ACTIVATIONS, *_WRITTEN_OUT)

_TORCH = (nn.GELU, nn.SiLU, nn.ReLU)
#: By name, because importing transformers takes seconds and it may not be installed.
_TRANSFORMERS = (
    *("AccurateGELUActivation", "FastGELUActivation", "GELUActivation", "GELUTanh"),
    *("NewGELUActivation", "PytorchGELUTanh", "ReLUSquaredActivation", "SiLUActivation"),
)
#: What tells the spellings apart in every bit: tiny, common and huge numbers, both signs, 0, Inf.
_PROBE = [0.0, 1e-30, 1e-4, *(i / 7 for i in range(1, 64)), 50.0, 1e4, math.inf]


def computed(spelling: str, x: Tensor) -> Tensor:
    """Return an activation of x as a spelling computes it.

    Args:
        spelling: one of ``SPELLINGS``.
        x: any shape, float.
    """
    if spelling in _WRITTEN_OUT:
        return _WRITTEN_OUT[spelling][1](x)
    return producers.forward(spelling, x)


def derivative_of(spelling: str) -> str:
    """Return the activation, one of ``producers.ACTIVATIONS``, whose derivative a spelling has."""
    return _WRITTEN_OUT[spelling][0] if spelling in _WRITTEN_OUT else spelling


def spelling_of_module(module: nn.Module) -> str | None:
    """Return the spelling that a module computes, bit for bit; None if it is none of them.

    Args:
        module: any; only exact classes of torch and transformers are tried, since another may hold
            a state or draw.
    """
    kind = type(module)
    known = kind.__module__ == "transformers.activations" and kind.__name__ in _TRANSFORMERS
    if kind not in _TORCH and not known:
        return None
    with torch.no_grad():
        probe = torch.tensor(_PROBE, dtype=torch.float32, device="cpu")
        probe = torch.cat([probe, -probe])
        expected = module(probe.clone()).view(torch.int32)
        for spelling in SPELLINGS:
            if torch.equal(computed(spelling, probe).view(torch.int32), expected):
                return spelling
    return None


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation by its class, known to this package or not."""
    kinds = [kind.__module__ for kind in type(module).__mro__]
    return any(
        kind in ("torch.nn.modules.activation", "transformers.activations") for kind in kinds
    )


def spelling_of_function(function: object, options: dict[str, object]) -> str | None:
    """Return the spelling that a call of a function of torch computes, or None.

    Args:
        function: such as ``torch.nn.functional.gelu``.
        options: its keywords.
    """
    options = {name: value for name, value in options.items() if name != "inplace"}
    if function is F.gelu and set(options) <= {"approximate"}:
        return "gelu_tanh" if options.get("approximate") == "tanh" else "gelu"
    if options:
        return None
    if function in (F.relu, torch.relu):
        return "relu"
    return "silu" if function is F.silu else None
