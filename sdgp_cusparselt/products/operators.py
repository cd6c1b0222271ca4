"""The operator contract: what torch.compile sees of this package, as schemas and shapes.

Each operator is opaque to the compiler; inside, ``products`` chooses a backend as it does in eager
mode. A configuration travels as text and a layer's record as its token, because an operator takes
only tensors, numbers and strings.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import SDGPError
from sdgp_cusparselt.packing.layout import MetadataLayout
from sdgp_cusparselt.packing.pack import matmul as _matmul
from sdgp_cusparselt.packing.pack import pack as _pack
from sdgp_cusparselt.packing.packed import Packed24, buffer_nbytes
from sdgp_cusparselt.products import backward as products
from sdgp_cusparselt.pruning import methods as _pruning
from sdgp_cusparselt.recording.records import record_of

# Defined by hand and not by torch.library.custom_op, whose wrappers cost 60 us a call.
_LIBRARY = torch.library.Library("sdgp", "DEF")  # type: ignore[no-untyped-call]
# random and mvue draw from torch's generator, so the compiler must not merge or repeat calls.
_DRAWS = (torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded)
PURE = (torch.Tag.pt2_compliant_tag,)


def as_operator(
    fake: Callable[..., Any], tags: Sequence[torch.Tag] = _DRAWS
) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that makes an operator of a function, and of ``fake`` its shapes."""

    def define(kernel: Callable[..., Any]) -> Any:
        name = kernel.__name__
        schema = torch.library.infer_schema(kernel, mutates_args=())
        _LIBRARY.define(name + schema, tags=tuple(tags))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"sdgp::{name}", fake, lib=_LIBRARY)
        torch.library.register_autograd(f"sdgp::{name}", _not_differentiable, lib=_LIBRARY)
        return getattr(torch.ops.sdgp, name).default

    return define


def _not_differentiable(ctx: Any, *grads: Tensor) -> None:
    raise SDGPError(
        "SDGP: an operator was differentiated, but a pruned gradient is not the derivative of any "
        "function. Call it under torch.no_grad(), or on tensors that require no gradient."
    )


def _prune_fake(
    x: Tensor, method: str, n: int, m: int, dim: int, scale_dims: Sequence[int] | None = None
) -> Tensor:
    return torch.empty_like(x)


@as_operator(_prune_fake)
def prune(
    x: Tensor, method: str, n: int, m: int, dim: int, scale_dims: Sequence[int] | None = None
) -> Tensor:
    """Return ``sdgp.prune(x)``; see there. Never x itself."""
    pruned = _pruning.prune(x, method=method, n=n, m=m, dim=dim, scale_dims=scale_dims)
    return pruned.clone() if pruned is x else pruned


def _pack_fake(x: Tensor, method: str, transpose: bool, layout: str) -> Tensor:
    rows, cols = x.shape[::-1] if transpose else x.shape
    size = buffer_nbytes((rows, cols), x.dtype, MetadataLayout.from_json(layout))
    return x.new_empty(size, dtype=torch.uint8)


@as_operator(_pack_fake)
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


def _matmul_fake(packed: Tensor, dense: Tensor, rows: int, layout: str) -> Tensor:
    return dense.new_empty((rows, dense.shape[1]))


@as_operator(_matmul_fake, (torch.Tag.pt2_compliant_tag,))
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


def _linear_grad_input_fake(grad_output: Tensor, weight: Tensor, config: str, token: int) -> Tensor:
    return grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1]))


@as_operator(_linear_grad_input_fake)
def linear_grad_input(grad_output: Tensor, weight: Tensor, config: str, token: int) -> Tensor:
    """Return prune(grad_output) @ weight: [..., K] @ [K, N] -> [..., N], contiguous."""
    result = products.linear_grad_input(
        grad_output, weight, SDGPConfig.from_text(config), record_of(token)
    )
    return result.contiguous()


def _linear_grad_weight_fake(
    grad_output: Tensor, input: Tensor, row_major: bool, config: str, token: int
) -> Tensor:
    return grad_output.new_empty((grad_output.shape[1], input.shape[1]))


@as_operator(_linear_grad_weight_fake)
def linear_grad_weight(
    grad_output: Tensor, input: Tensor, row_major: bool, config: str, token: int
) -> Tensor:
    """Return prune(grad_output along tokens).T @ input: [K, M].T @ [K, N] -> [M, N]."""
    result = products.linear_grad_weight(
        grad_output, input, row_major, SDGPConfig.from_text(config), record_of(token)
    )
    return result.contiguous()


def _linear_grads_fake(
    grad_output: Tensor, weight: Tensor, input: Tensor, config: str, token: int
) -> tuple[Tensor, Tensor]:
    grad_input = grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1]))
    return grad_input, grad_output.new_empty((weight.shape[0], input.shape[1]))


@as_operator(_linear_grads_fake)
def linear_grads(
    grad_output: Tensor, weight: Tensor, input: Tensor, config: str, token: int
) -> tuple[Tensor, Tensor]:
    """Return grad_input and grad_weight of a linear layer; from one read where both are sparse."""
    grad_input, grad_weight = products.linear_grads(
        grad_output, weight, input, SDGPConfig.from_text(config), record_of(token)
    )
    return grad_input.contiguous(), grad_weight.contiguous()


def _conv2d_grad_input_fake(
    grad_output: Tensor,
    weight: Tensor,
    input_like: Tensor,
    geometry: Sequence[int],
    config: str,
    token: int,
) -> Tensor:
    return torch.empty_like(input_like)


@as_operator(_conv2d_grad_input_fake)
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


def _conv2d_grad_weight_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    config: str,
    token: int,
) -> Tensor:
    return torch.empty_like(weight)


@as_operator(_conv2d_grad_weight_fake)
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


def flat_geometry(conv: ConvGeometry) -> list[int]:
    """Return a geometry as the list of integers that an operator takes."""
    return [*conv.stride, *conv.padding, *conv.dilation, conv.groups]


def geometry_of(flat: Sequence[int]) -> ConvGeometry:
    """Return the geometry that ``flat_geometry`` flattened."""
    a, b, c, d, e, f, groups = flat
    return ConvGeometry((a, b), (c, d), (e, f), groups)
