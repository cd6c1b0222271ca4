"""The emulated way: the pruned gradient, its zeros multiplied like the rest, on any device.

It gives the numbers of the sparse way up to the order of accumulation, and is what that is checked
against. The plain products, of the gradient as it came, are torch's own.
"""

import torch
from torch import Tensor

from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.pruning.methods import prune
from sdgp_cusparselt.recording.spans import is_sampling, span

#: Rows that are pruned and multiplied at a time on a CPU: enough for a product at full speed.
CHUNK_ROWS = 2048


def linear_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    config: SDGPConfig,
) -> Tensor:
    """Return prune(grad_output) @ weight."""
    if config.prune == "magnitude" and weight.device.type == "cpu" and not is_sampling():
        return _by_chunks(grad_output, weight, config)
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


def _by_chunks(grad_output: Tensor, weight: Tensor, config: SDGPConfig) -> Tensor:
    """Return prune(grad_output) @ weight without a whole pruned gradient in memory.

    On a CPU a temporary of that size costs as much in page faults as the pruning itself.
    """
    flat = grad_output.reshape(-1, grad_output.shape[-1])
    out = flat.new_empty((flat.shape[0], weight.shape[1]))
    for start in range(0, flat.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        pruned = prune_features(flat[rows], config)
        torch.mm(pruned, weight, out=out[rows])
    return out.view(*grad_output.shape[:-1], weight.shape[1])


def prune_features(grad_output: Tensor, config: SDGPConfig) -> Tensor:
    """Prune [..., out_features] along the features, over which grad_input reduces."""
    kept = prune(grad_output, method=config.prune, n=config.n, m=config.m)
    return decayed(kept, grad_output, config.beta)


def decayed(kept: Tensor, grad_output: Tensor, beta: float) -> Tensor:
    """Return kept + beta * (grad_output - kept), where unscaled kept values keep their bits."""
    if not 0 < beta < 1:
        return kept if beta == 0 else grad_output
    # An Inf that is kept would become Inf - Inf.
    return torch.where(kept == grad_output, kept, kept + beta * (grad_output - kept))


def prune_tokens(grad_output: Tensor, config: SDGPConfig) -> Tensor:
    """Prune [tokens, out_features] along the tokens, over which grad_weight reduces."""
    return prune(grad_output, method=config.grad_weight_prune, n=config.n, m=config.m, dim=0)


def prune_pixels(grad_output: Tensor, config: SDGPConfig) -> Tensor:
    """Prune [N, C, H, W] along its pixels in (n, h, w) order."""
    pixels = grad_output.permute(0, 2, 3, 1)
    pruned = prune_tokens(pixels.reshape(-1, pixels.shape[-1]), config)
    return pruned.reshape(pixels.shape).permute(0, 3, 1, 2)


def prune_channels(grad_output: Tensor, groups: int, config: SDGPConfig) -> Tensor:
    """Prune [N, C, H, W] along the channels that one product reduces over: those of a group."""
    pattern = {"method": config.prune, "n": config.n, "m": config.m}
    if groups == 1:
        kept = prune(grad_output, dim=1, scale_dims=(2, 3), **pattern)  # type: ignore[arg-type]
    else:
        grouped = torch.unflatten(grad_output, 1, (groups, -1))
        kept = prune(grouped, dim=2, scale_dims=(3, 4), **pattern)  # type: ignore[arg-type]
        kept = kept.flatten(1, 2)
    return decayed(kept, grad_output, config.beta)


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
