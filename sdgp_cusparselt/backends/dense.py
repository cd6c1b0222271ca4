"""The dense backend: the pruned gradient, multiplied densely, on any device.

It gives the numbers of the sparse path up to the order of accumulation, and is what that path is
checked against.
"""

import torch
from torch import Tensor

from sdgp_cusparselt.backends.base import Backend, ConvGeometry, Problem
from sdgp_cusparselt.backends.gemm import Candidate
from sdgp_cusparselt.config import SDGPConfig
from sdgp_cusparselt.pruning import prune


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
        pruned = prune(grad_output, method=config.prune, n=config.n, m=config.m)
        return dense_linear_grad_input(pruned, weight)

    def linear_grad_weight(
        self,
        grad_output: Tensor,
        input: Tensor,
        config: SDGPConfig,
        candidate: Candidate | None = None,
    ) -> Tensor:
        """Return prune(grad_output along tokens).T @ input; see ``Backend``."""
        pruned = prune(grad_output, method=config.grad_weight_prune, n=config.n, m=config.m, dim=0)
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
        pruned = prune_channels(grad_output, conv.groups, config)
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
        pixels = grad_output.permute(0, 2, 3, 1)
        tokens = pixels.reshape(-1, pixels.shape[-1])
        pruned = prune(tokens, method=config.grad_weight_prune, n=config.n, m=config.m, dim=0)
        pruned = pruned.reshape(pixels.shape).permute(0, 3, 1, 2)
        mask = (False, True, False)
        return _wanted(_convolution_backward(pruned, input, weight, conv, mask)[1])


def prune_channels(grad_output: Tensor, groups: int, config: SDGPConfig) -> Tensor:
    """Prune [N, C, H, W] along the channels that one product reduces over: those of a group."""
    pattern = {"method": config.prune, "n": config.n, "m": config.m}
    if groups == 1:
        return prune(grad_output, dim=1, scale_dims=(2, 3), **pattern)  # type: ignore[arg-type]
    grouped = torch.unflatten(grad_output, 1, (groups, -1))
    pruned = prune(grouped, dim=2, scale_dims=(3, 4), **pattern)  # type: ignore[arg-type]
    return pruned.flatten(1, 2)


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
