"""The products with a pruned weight, as a layer asks for them.

output     = input @ W.T + bias                  W = the weight, pruned along in_features
grad_input = grad_output @ W                     W pruned along out_features as well
"""

from torch import Tensor

from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.products.dispatch import run
from sdgp_cusparselt.products.packed_weights import PrunedWeight
from sdgp_cusparselt.products.weight_operands import (
    Conv2dOutput,
    Conv2dWeightGradInput,
    LinearOutput,
    LinearWeightGradInput,
)
from sdgp_cusparselt.recording.records import LayerRecord


def linear_output(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    keeps: bool,
    config: SDGPConfig,
    record: LayerRecord,
) -> Tensor:
    """Return input @ W.T + bias: [..., I] -> [..., O].

    Args:
        input: [..., I].
        weight: [O, I], of any float dtype: pruned in input's.
        bias: [O] of input's dtype, or None.
        mask: bool [O, I], or None for the largest.
        keeps: whether the weight's version says when it changes.
        config: pattern, and what is allowed.
        record: of the layer.
    """
    kept = PrunedWeight(weight, mask, None, input.dtype, config, keeps)
    return run(LinearOutput(input, kept, bias), config, record)


def linear_weight_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    mask_t: Tensor | None,
    keeps: bool,
    config: SDGPConfig,
    record: LayerRecord,
) -> Tensor:
    """Return grad_output @ W: [..., O] -> [..., I]; arguments as of ``linear_output``."""
    kept = PrunedWeight(weight, mask, mask_t, grad_output.dtype, config, keeps)
    return run(LinearWeightGradInput(grad_output, kept), config, record)


def conv2d_output(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    conv: ConvGeometry,
    keeps: bool,
    config: SDGPConfig,
    record: LayerRecord,
) -> Tensor:
    """Return conv2d(input, W) + bias; groups along the input channels of a tap."""
    kept = PrunedWeight(weight, mask, None, input.dtype, config, keeps)
    return run(Conv2dOutput(input, kept, conv, bias), config, record)


def conv2d_weight_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    mask_t: Tensor | None,
    input_like: Tensor,
    conv: ConvGeometry,
    keeps: bool,
    config: SDGPConfig,
    record: LayerRecord,
) -> Tensor:
    """Return the transposed convolution of grad_output with W; strides as input_like."""
    kept = PrunedWeight(weight, mask, mask_t, grad_output.dtype, config, keeps)
    return run(Conv2dWeightGradInput(grad_output, kept, input_like, conv), config, record)


def pruned_weight(
    weight: Tensor, mask: Tensor | None, like: Tensor, keeps: bool, config: SDGPConfig
) -> Tensor:
    """Return W with its zeros in like's dtype, for the products that prune the gradient or none."""
    return PrunedWeight(weight, mask, None, like.dtype, config, keeps).dense()
