"""The products of a pruned backward pass, each handed to the dispatcher with all its ways.

grad_input  = prune(grad_output) @ weight, or the transposed convolution of it
grad_weight = prune(grad_output along tokens).T @ input
"""

import torch
from torch import Tensor

from sdgp_cusparselt.backends import convolution
from sdgp_cusparselt.backends.base import ConvGeometry, Problem
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.dense import (
    dense_conv2d_grad_input,
    dense_conv2d_grad_parameters,
    dense_linear_grad_input,
)
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.products.dispatch import Ways, compute, run, settle
from sdgp_cusparselt.recording.records import LayerRecord
from sdgp_cusparselt.tuning import MATMUL, Rival


def linear_grad_input(
    grad_output: Tensor, weight: Tensor, config: SDGPConfig, record: LayerRecord
) -> Tensor:
    """Return prune(grad_output) @ weight: [..., K] @ [K, N] -> [..., N]."""
    problem, ways = _for_input(grad_output, weight, config)
    return run(problem, record, ways)


def linear_grad_weight(
    grad_output: Tensor, input: Tensor, config: SDGPConfig, record: LayerRecord
) -> Tensor:
    """Return prune(grad_output along tokens).T @ input: [K, M].T @ [K, N] -> [M, N]."""
    problem, ways = _for_weight(grad_output, input, config)
    return run(problem, record, ways)


def linear_grads(
    grad_output: Tensor, weight: Tensor, input: Tensor, config: SDGPConfig, record: LayerRecord
) -> tuple[Tensor, Tensor]:
    """Return both products; where both run sparse, from one read of grad_output.

    Args:
        grad_output: [..., out_features].
        weight: [out_features, in_features].
        input: [tokens, in_features].
        config: how to prune for each.
        record: of the layer.
    """
    flat = grad_output.reshape(-1, grad_output.shape[-1])
    pairs = (_for_input(grad_output, weight, config), _for_weight(flat, input, config))
    routes = [settle(problem, record, ways) for problem, ways in pairs]
    backend = routes[0].backend
    chosen = [route.candidate for route in routes if route.candidate is not None]
    # A sampled layer reports each product by itself.
    together = len(chosen) == 2 and not config.telemetry_every
    if isinstance(backend, CusparseLtBackend) and together:
        return backend.linear_grads(grad_output, weight, input, config, (chosen[0], chosen[1]))
    first, second = (
        compute(problem, route, record, ways)
        for (problem, ways), route in zip(pairs, routes, strict=True)
    )
    return first, second


def _for_input(grad_output: Tensor, weight: Tensor, config: SDGPConfig) -> tuple[Problem, Ways]:
    k, n = weight.shape
    m = grad_output.numel() // max(k, 1)
    column_major = weight.stride() == (1, k) != (n, 1)
    problem = Problem(
        "grad_input",
        m,
        n,
        k,
        grad_output.dtype,
        grad_output.device,
        config,
        dense_order="col" if column_major else "row",
    )
    ways = Ways(
        lambda backend, candidate: backend.linear_grad_input(
            grad_output, weight, config, candidate
        ),
        lambda: dense_linear_grad_input(grad_output, weight),
        lambda: (grad_output.reshape(-1, k), weight),
        lambda: MATMUL,
        grad_output,
    )
    return problem, ways


def _for_weight(grad_output: Tensor, input: Tensor, config: SDGPConfig) -> tuple[Problem, Ways]:
    k, m = grad_output.shape
    dtype, device = grad_output.dtype, grad_output.device
    problem = Problem("grad_weight", m, input.shape[1], k, dtype, device, config)
    ways = Ways(
        lambda backend, candidate: backend.linear_grad_weight(
            grad_output, input, config, candidate
        ),
        lambda: grad_output.t().mm(input),
        lambda: (grad_output, input),
        lambda: MATMUL,
        grad_output,
    )
    return problem, ways


def conv2d_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_like: Tensor,
    conv: ConvGeometry,
    config: SDGPConfig,
    record: LayerRecord,
) -> Tensor:
    """Return the transposed convolution of prune(grad_output along channels) with weight."""
    batch, channels, height, width = grad_output.shape
    problem = Problem(
        "grad_input",
        batch * height * width,
        weight[0].numel(),
        channels // conv.groups,
        grad_output.dtype,
        grad_output.device,
        config,
        conv,
        (weight.shape[2], weight.shape[3]),
        grad_output.is_contiguous(memory_format=torch.channels_last),
        spatial=(*grad_output.shape, *input_like.shape[2:]),
    )
    ways = Ways(
        lambda backend, candidate: backend.conv2d_grad_input(
            grad_output, weight, input_like, conv, config, candidate
        ),
        lambda: dense_conv2d_grad_input(grad_output, weight, input_like, conv),
        lambda: (convolution.pixels(grad_output), convolution.weight_columns(weight)),
        lambda: conv_rival(grad_output, weight, input_like, conv),
        grad_output,
    )
    return run(problem, record, ways)


def conv2d_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    conv: ConvGeometry,
    config: SDGPConfig,
    record: LayerRecord,
) -> Tensor:
    """Return the weight gradient of a convolution from grad_output pruned along its pixels."""
    batch, channels, height, width = grad_output.shape
    problem = Problem(
        "grad_weight",
        channels // conv.groups,
        weight[0].numel(),
        batch * height * width,
        grad_output.dtype,
        grad_output.device,
        config,
        conv,
        (weight.shape[2], weight.shape[3]),
        grad_output.is_contiguous(memory_format=torch.channels_last),
    )

    def unpruned() -> Tensor:
        wanted = (True, False)
        found = dense_conv2d_grad_parameters(grad_output, input, weight, conv, wanted)[0]
        return torch.zeros_like(weight) if found is None else found

    ways = Ways(
        lambda backend, candidate: backend.conv2d_grad_weight(
            grad_output, input, weight, conv, config, candidate
        ),
        unpruned,
        lambda: (
            convolution.pixels(grad_output),
            convolution.pixels(convolution.strided_input(input, grad_output, conv)),
        ),
        lambda: MATMUL,
        grad_output,
    )
    return run(problem, record, ways)


def conv_rival(
    grad_output: Tensor, weight: Tensor, input_like: Tensor, conv: ConvGeometry
) -> Rival:
    """Return what a sparse convolution has to beat: torch's own, on the same sizes.

    Args:
        grad_output: [N, out_channels, H_out, W_out]; only its sizes matter.
        weight: [out_channels, in_channels, kH, kW]; only its sizes matter.
        input_like: [N, in_channels, H, W]; only its sizes matter.
        conv: stride, padding, dilation.
    """
    outputs, inputs, kernel = grad_output.shape, input_like.shape, weight.shape
    if convolution.is_plain(conv, (kernel[2], kernel[3])):
        return MATMUL
    batch, _, height, width = outputs

    def dense(left: Tensor, right: Tensor) -> Tensor:
        gradient = convolution.images(left, batch, height, width)
        filters = right.view(kernel[0], *kernel[2:], kernel[1]).permute(0, 3, 1, 2)
        # Made in its format: converting it would be a copy that counts against dense in the race.
        last = torch.channels_last
        like = torch.empty(inputs, dtype=left.dtype, device=left.device, memory_format=last)
        return dense_conv2d_grad_input(gradient, filters, like, conv)

    def finish(product: Tensor) -> Tensor:
        return convolution.scatter_columns(product, outputs, inputs, kernel, conv)

    name = f"conv {tuple(outputs)} x {tuple(kernel)} to {tuple(inputs)}, {conv}"
    return Rival(name, dense, finish)
