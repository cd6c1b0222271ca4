"""The dense backend: the pruned gradient, multiplied densely, on any device.

It gives the numbers of the sparse path up to the order of accumulation, and is what that path is
checked against.
"""

import torch
from torch import Tensor

from sdgp_cusparselt.backends import blocks
from sdgp_cusparselt.backends.base import Backend, ConvGeometry, Problem
from sdgp_cusparselt.backends.emulation import (
    prune_channels,
    prune_features,
    prune_pixels,
    prune_tokens,
)
from sdgp_cusparselt.backends.gemm import Candidate
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.recording.spans import is_sampling, span


class DenseBackend(Backend):
    """Prunes, keeps the zeros, and calls the dense products of torch."""

    name = "dense"

    def machine_reasons(self) -> list[str]:
        """Return no reason: torch runs everywhere."""
        return []

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Return no reason: every pattern, dtype and shape can be emulated."""
        return []

    def linear_grad_input(
        self,
        grad_output: Tensor,
        weight: Tensor,
        config: SDGPConfig,
        candidate: Candidate | None = None,
    ) -> Tensor:
        """Return prune(grad_output) @ weight; see ``Backend``."""
        if blocks.takes(grad_output) and not is_sampling():
            return blocks.linear_grad_input(grad_output, weight, config)
        with span("prune", weight.device):
            pruned = prune_features(grad_output, config)
        with span("dense", weight.device):
            return dense_linear_grad_input(pruned, weight)

    def linear_grad_weight(
        self,
        grad_output: Tensor,
        input: Tensor,
        config: SDGPConfig,
        candidate: Candidate | None = None,
    ) -> Tensor:
        """Return prune(grad_output along tokens).T @ input; see ``Backend``."""
        if blocks.takes(grad_output) and not is_sampling():
            return blocks.linear_grad_weight(grad_output, input, config)
        with span("prune", input.device):
            pruned = prune_tokens(grad_output, config)
        with span("dense", input.device):
            return pruned.t().mm(input)

    def conv2d_grad_input(
        self,
        grad_output: Tensor,
        weight: Tensor,
        input_like: Tensor,
        conv: ConvGeometry,
        config: SDGPConfig,
        candidate: Candidate | None = None,
    ) -> Tensor:
        """Return the transposed convolution of the pruned gradient; see ``Backend``."""
        with span("prune", weight.device):
            pruned = prune_channels(grad_output, conv.groups, config)
        with span("dense", weight.device):
            return dense_conv2d_grad_input(pruned, weight, input_like, conv)

    def conv2d_grad_weight(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        conv: ConvGeometry,
        config: SDGPConfig,
        candidate: Candidate | None = None,
    ) -> Tensor:
        """Return the weight gradient from pixels pruned in (n, h, w) order; see ``Backend``."""
        with span("prune", input.device):
            pruned = prune_pixels(grad_output, config)
        mask = (False, True, False)
        with span("dense", input.device):
            return _wanted(_convolution_backward(pruned, input, weight, conv, mask)[1])


def pruned_gradient(problem: Problem, grad_output: Tensor) -> Tensor:
    """Return grad_output pruned as the product of ``problem`` prunes it, with its zeros."""
    config, conv = problem.config, problem.conv
    if problem.product == "grad_weight":
        return (
            prune_tokens(grad_output, config) if conv is None else prune_pixels(grad_output, config)
        )
    if conv is None:
        return prune_features(grad_output, config)
    return prune_channels(grad_output, conv.groups, config)


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
