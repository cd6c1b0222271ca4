"""The emulated way: the pruned gradient, its zeros multiplied like the rest, on any device.

It gives the numbers of the sparse way up to the order of accumulation, and is what that is checked
against. The plain products, of the gradient as it came, are torch's own.
"""

import torch
from torch import Tensor

from sdgp_cusparselt.backends import blocks
from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.backends.emulation import (
    prune_channels,
    prune_features,
    prune_pixels,
    prune_tokens,
)
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.recording.spans import is_sampling, span


def linear_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    config: SDGPConfig,
) -> Tensor:
    """Return prune(grad_output) @ weight."""
    whole = config.heavy_tokens > 0  # which rows are heavy, all rows together decide
    if blocks.takes(grad_output) and not is_sampling() and not whole:
        return blocks.linear_grad_input(grad_output, weight, config)
    with span("prune", weight.device):
        pruned = prune_features(grad_output, config)
    with span("dense", weight.device):
        return dense_linear_grad_input(pruned, weight)


def linear_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    config: SDGPConfig,
) -> Tensor:
    """Return prune(grad_output along tokens).T @ input."""
    if blocks.takes(grad_output) and not is_sampling():
        return blocks.linear_grad_weight(grad_output, input, config)
    with span("prune", input.device):
        pruned = prune_tokens(grad_output, config)
    with span("dense", input.device):
        return pruned.t().mm(input)


def conv2d_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_like: Tensor,
    conv: ConvGeometry,
    config: SDGPConfig,
) -> Tensor:
    """Return the transposed convolution of the pruned gradient."""
    with span("prune", weight.device):
        pruned = prune_channels(grad_output, conv.groups, config)
    with span("dense", weight.device):
        return dense_conv2d_grad_input(pruned, weight, input_like, conv)


def conv2d_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    conv: ConvGeometry,
    config: SDGPConfig,
) -> Tensor:
    """Return the weight gradient from pixels pruned in (n, h, w) order."""
    with span("prune", input.device):
        pruned = prune_pixels(grad_output, config)
    mask = (False, True, False)
    with span("dense", input.device):
        return _wanted(_convolution_backward(pruned, input, weight, conv, mask)[1])


def dense_linear_grad_input(grad_output: Tensor, weight: Tensor) -> Tensor:
    """Return grad_output @ weight: [..., K] @ [K, N]."""
    flat = grad_output.reshape(-1, grad_output.shape[-1]).mm(weight)
    return flat.view(*grad_output.shape[:-1], weight.shape[1])


def dense_conv2d_grad_input(
    grad_output: Tensor, weight: Tensor, input_like: Tensor, conv: ConvGeometry
) -> Tensor:
    """Return the dense gradient of a convolution with respect to its input."""
    mask = (True, False, False)
    return _wanted(_convolution_backward(grad_output, input_like, weight, conv, mask)[0])


def dense_conv2d_grad_parameters(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    conv: ConvGeometry,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the dense gradients of a convolution's weight and bias, where wanted."""
    if not any(wanted):
        return None, None
    return _convolution_backward(grad_output, input, weight, conv, (False, *wanted))[1:]


def _convolution_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    conv: ConvGeometry,
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    result: tuple[Tensor | None, Tensor | None, Tensor | None] = (
        torch.ops.aten.convolution_backward(
            grad_output,
            input,
            weight,
            [weight.shape[0]],
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            [0, 0],
            conv.groups,
            mask,
        )
    )
    return result


def _wanted(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise RuntimeError("convolution_backward left out a gradient that its mask asked for")
    return gradient
