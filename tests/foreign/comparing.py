"""What the foreign tests compare: a layer against torch's own, and against prune-then-multiply."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import sdgp_cusparselt as sdgp

NONE = sdgp.SDGPConfig(prune="none")
#: A method that draws nothing, so that the reference prunes the same elements.
MAGNITUDE = sdgp.SDGPConfig(prune="magnitude", backend="dense")


def identical(got: Any, expected: Any) -> None:
    """Assert equal bits, dtype, device and shape, of tensors or nested sequences of them."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def close(got: Any, expected: Any) -> None:
    """Assert equality up to the order of summation: the sums here have at most a few hundred terms.

    Magnitudes of random gradients lie further apart than that, and the reference prunes the same
    gradient: no comparison depends on which element survives.
    """
    torch.testing.assert_close(got, expected, equal_nan=True)


def random_like(x: Tensor) -> Tensor:
    """Return random numbers of x's shape, dtype and device, the same at each call."""
    generator = torch.Generator().manual_seed(x.numel())
    wide = torch.complex128 if x.is_complex() else torch.float64
    return torch.randn(x.shape, dtype=wide, generator=generator).to(x.dtype)


def grads(output: Tensor, inputs: Sequence[Tensor], grad_output: Tensor, **options: Any) -> Any:
    """Return the gradients of the inputs, None for those that output does not depend on."""
    return torch.autograd.grad(output, inputs, grad_output, allow_unused=True, **options)


def prune_channels(grad_output: Tensor, dim: int, groups: int) -> Tensor:
    """Return grad_output pruned along dim, in the borders of the convolution's groups."""
    parts = grad_output.chunk(groups, dim) if groups > 1 else (grad_output,)
    return torch.cat([sdgp.prune(part, dim=dim) for part in parts], dim)


def assert_pruned_backward(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    dim: int,
    groups: int = 1,
) -> None:
    """Assert: the same output; the data gradient of a pruned grad_output; the others exact.

    Args:
        ours, plain: functions of ``tensors``.
        tensors: the layer's input first, then its weight and perhaps its bias.
        dim: of the output, along which groups of four run.
        groups: convolution groups, which pruning never crosses.
    """
    expected, got = plain(*tensors), ours(*tensors)
    identical(got, expected)
    grad_output = random_like(expected)
    pruned = prune_channels(grad_output, dim, groups)
    close(grads(got, tensors, grad_output)[1:], grads(plain(*tensors), tensors, grad_output)[1:])
    close(
        grads(ours(*tensors), tensors, grad_output)[0], grads(plain(*tensors), tensors, pruned)[0]
    )
