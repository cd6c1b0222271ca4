"""The products of a pruned backward pass, as a layer's backward asks for them.

grad_input  = prune(grad_output) @ weight, or the transposed convolution of it
grad_weight = prune(grad_output along tokens).T @ input
"""

from torch import Tensor

from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.products.dispatch import run, run_both
from sdgp_cusparselt.products.operands import (
    Conv2dGradInput,
    Conv2dGradWeight,
    LinearGradInput,
    LinearGradWeight,
)
from sdgp_cusparselt.recording.records import LayerRecord


def linear_grad_input(
    grad_output: Tensor, weight: Tensor, config: SDGPConfig, record: LayerRecord
) -> Tensor:
    """Return prune(grad_output) @ weight: [..., K] @ [K, N] -> [..., N]."""
    return run(LinearGradInput(grad_output, weight), config, record)


def linear_grad_weight(
    grad_output: Tensor, input: Tensor, row_major: bool, config: SDGPConfig, record: LayerRecord
) -> Tensor:
    """Return prune(grad_output along tokens).T @ input: [K, M].T @ [K, N] -> [M, N].

    Args:
        grad_output: [tokens, out_features].
        input: [tokens, in_features].
        row_major: whether the weight lies so in memory: torch's own product depends on it.
        config: how to prune.
        record: of the layer.
    """
    return run(LinearGradWeight(grad_output, input, row_major), config, record)


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
    row_major = weight.stride() == (weight.shape[1], 1)
    first = LinearGradInput(grad_output, weight)
    return run_both(first, LinearGradWeight(flat, input, row_major), config, record)


def conv2d_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_like: Tensor,
    conv: ConvGeometry,
    config: SDGPConfig,
    record: LayerRecord,
) -> Tensor:
    """Return the transposed convolution of prune(grad_output along channels) with weight."""
    return run(Conv2dGradInput(grad_output, weight, input_like, conv), config, record)


def conv2d_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    conv: ConvGeometry,
    config: SDGPConfig,
    record: LayerRecord,
) -> Tensor:
    """Return the weight gradient of a convolution from grad_output pruned along its pixels."""
    return run(Conv2dGradWeight(grad_output, input, weight, conv), config, record)
