"""The operator contract: what torch.compile sees of this package, as schemas and shapes.

Each operator is opaque to the compiler; inside, ``products`` chooses a backend as it does in eager
mode. A configuration travels as text and a layer's record as its token, because an operator takes
only tensors, numbers and strings.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.packing.layout import MetadataLayout
from sdgp_cusparselt.packing.pack import matmul as _matmul
from sdgp_cusparselt.packing.pack import pack as _pack
from sdgp_cusparselt.packing.packed import Packed24, buffer_nbytes
from sdgp_cusparselt.products import backward as products
from sdgp_cusparselt.pruning import methods as _pruning
from sdgp_cusparselt.recording.records import record_of

# random and mvue draw from torch's generator, so the compiler must not merge or repeat calls.
_TAGS = (torch.Tag.nondeterministic_seeded,)


@torch.library.custom_op("sdgp::prune", mutates_args=(), tags=_TAGS)
def prune(
    x: Tensor, method: str, n: int, m: int, dim: int, scale_dims: Sequence[int] | None = None
) -> Tensor:
    """Return ``sdgp.prune(x)``; see there. Never x itself."""
    pruned = _pruning.prune(x, method=method, n=n, m=m, dim=dim, scale_dims=scale_dims)
    return pruned.clone() if pruned is x else pruned


@prune.register_fake
def _(
    x: Tensor, method: str, n: int, m: int, dim: int, scale_dims: Sequence[int] | None = None
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("sdgp::pack", mutates_args=(), tags=_TAGS)
def pack(x: Tensor, method: str, transpose: bool, layout: str) -> Tensor:
    """Return the buffer of ``sdgp.pack(x)``: values and metadata, uint8.

    Args:
        x: [M, K] of a packed dtype.
        method: how to prune 2:4.
        transpose: pack x.T along tokens.
        layout: ``MetadataLayout.to_json()``.
    """
    order = MetadataLayout.from_json(layout)
    return _pack(x, method=method, transpose=transpose, layout=order).buffer


@pack.register_fake
def _(x: Tensor, method: str, transpose: bool, layout: str) -> Tensor:
    rows, cols = x.shape[::-1] if transpose else x.shape
    size = buffer_nbytes((rows, cols), x.dtype, MetadataLayout.from_json(layout))
    return x.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op("sdgp::matmul", mutates_args=())
def matmul(packed: Tensor, dense: Tensor, rows: int, layout: str) -> Tensor:
    """Return packed @ dense: [rows, K] @ [K, N] -> [rows, N].

    Args:
        packed: uint8 buffer of a [rows, K] operand.
        dense: [K, N].
        rows: of the operand, before padding.
        layout: ``MetadataLayout.to_json()`` of the buffer.
    """
    shape, order = (rows, dense.shape[0]), MetadataLayout.from_json(layout)
    product: Tensor = _matmul(Packed24(packed, shape, dense.dtype, order), dense)
    return product


@matmul.register_fake
def _(packed: Tensor, dense: Tensor, rows: int, layout: str) -> Tensor:
    return dense.new_empty((rows, dense.shape[1]))


@torch.library.custom_op("sdgp::linear_grad_input", mutates_args=(), tags=_TAGS)
def linear_grad_input(grad_output: Tensor, weight: Tensor, config: str, token: int) -> Tensor:
    """Return prune(grad_output) @ weight: [..., K] @ [K, N] -> [..., N], contiguous."""
    result = products.linear_grad_input(
        grad_output, weight, SDGPConfig.from_text(config), record_of(token)
    )
    return result.contiguous()


@linear_grad_input.register_fake
def _(grad_output: Tensor, weight: Tensor, config: str, token: int) -> Tensor:
    return grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1]))


@torch.library.custom_op("sdgp::linear_grad_weight", mutates_args=(), tags=_TAGS)
def linear_grad_weight(grad_output: Tensor, input: Tensor, config: str, token: int) -> Tensor:
    """Return prune(grad_output along tokens).T @ input: [K, M].T @ [K, N] -> [M, N]."""
    result = products.linear_grad_weight(
        grad_output, input, SDGPConfig.from_text(config), record_of(token)
    )
    return result.contiguous()


@linear_grad_weight.register_fake
def _(grad_output: Tensor, input: Tensor, config: str, token: int) -> Tensor:
    return grad_output.new_empty((grad_output.shape[1], input.shape[1]))


@torch.library.custom_op("sdgp::linear_grads", mutates_args=(), tags=_TAGS)
def linear_grads(
    grad_output: Tensor, weight: Tensor, input: Tensor, config: str, token: int
) -> tuple[Tensor, Tensor]:
    """Return grad_input and grad_weight of a linear layer; from one read where both are sparse."""
    grad_input, grad_weight = products.linear_grads(
        grad_output, weight, input, SDGPConfig.from_text(config), record_of(token)
    )
    return grad_input.contiguous(), grad_weight.contiguous()


@linear_grads.register_fake
def _(
    grad_output: Tensor, weight: Tensor, input: Tensor, config: str, token: int
) -> tuple[Tensor, Tensor]:
    grad_input = grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1]))
    return grad_input, grad_output.new_empty((weight.shape[0], input.shape[1]))


@torch.library.custom_op("sdgp::conv2d_grad_input", mutates_args=(), tags=_TAGS)
def conv2d_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_like: Tensor,
    geometry: Sequence[int],
    config: str,
    token: int,
) -> Tensor:
    """Return the transposed convolution of prune(grad_output); strides as input_like."""
    result = products.conv2d_grad_input(
        grad_output,
        weight,
        input_like,
        geometry_of(geometry),
        SDGPConfig.from_text(config),
        record_of(token),
    )
    like = torch.empty_like(input_like)
    return result if result.stride() == like.stride() else like.copy_(result)


@conv2d_grad_input.register_fake
def _(
    grad_output: Tensor,
    weight: Tensor,
    input_like: Tensor,
    geometry: Sequence[int],
    config: str,
    token: int,
) -> Tensor:
    return torch.empty_like(input_like)


@torch.library.custom_op("sdgp::conv2d_grad_weight", mutates_args=(), tags=_TAGS)
def conv2d_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    config: str,
    token: int,
) -> Tensor:
    """Return the weight gradient from pruned pixels; strides as weight."""
    result = products.conv2d_grad_weight(
        grad_output,
        input,
        weight,
        geometry_of(geometry),
        SDGPConfig.from_text(config),
        record_of(token),
    )
    like = torch.empty_like(weight)
    return result if result.stride() == like.stride() else like.copy_(result)


@conv2d_grad_weight.register_fake
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    config: str,
    token: int,
) -> Tensor:
    return torch.empty_like(weight)


def flat_geometry(conv: ConvGeometry) -> list[int]:
    """Return a geometry as the list of integers that an operator takes."""
    return [*conv.stride, *conv.padding, *conv.dilation, conv.groups]


def geometry_of(flat: Sequence[int]) -> ConvGeometry:
    """Return the geometry that ``flat_geometry`` flattened."""
    a, b, c, d, e, f, groups = flat
    return ConvGeometry((a, b), (c, d), (e, f), groups)
