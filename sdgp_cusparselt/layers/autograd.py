"""The autograd functions of layers whose gradient is pruned; with ``masked`` all that save tensors.

M, N, K name the sizes of the product at hand. For grad_input that is [M, N] = [M, K] @ [K, N] with
M = tokens, K = out_features, N = in_features; groups of the pruned operand run along K.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import Function
from torch.nn import functional as F

from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.backends.dense import (
    dense_conv2d_grad_input,
    dense_conv2d_grad_parameters,
    dense_linear_grad_input,
)
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import SDGPError
from sdgp_cusparselt.layers import casting, shards
from sdgp_cusparselt.layers.plain import ORDINARY
from sdgp_cusparselt.layers.refusals import INSTEAD, check_one_gradient, once
from sdgp_cusparselt.products import backward as products
from sdgp_cusparselt.products import operators as ops
from sdgp_cusparselt.recording.records import COMPILED, LayerRecord

_COMPILED_TOKEN = COMPILED.token
NO_JVP = f"SDGP: forward-mode derivatives of a pruned layer are not defined. {INSTEAD}"
_NO_BATCHED_PARAMETERS = (
    f"SDGP: a pruned layer cannot be mapped over its weight or bias by vmap. {INSTEAD}"
)


def pruned_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, config: SDGPConfig, record: LayerRecord
) -> Tensor:
    """Return input @ weight.T + bias whose gradients are pruned; see ``functional.linear``."""
    dtype = casting.autocast_dtype(input)
    if dtype is not None:
        input, weight, bias = _cast(dtype, input, weight, bias)
    output: Tensor
    if torch.compiler.is_compiling():
        constants = constants_of(config, record)
        output = _Linear.apply(input, weight, bias, *constants)  # type: ignore[no-untyped-call]
    else:
        choices = (config.prunes, config.grad_weight == "sparse", config, record)
        output = _applied(_LinearTransformed, _APPLY_LINEAR, input, weight, bias, *choices)
    return output


def pruned_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: ConvGeometry,
    config: SDGPConfig,
    record: LayerRecord,
) -> Tensor:
    """Return the convolution whose gradients are pruned; see ``functional.conv2d``."""
    dtype = casting.autocast_dtype(input)
    if dtype is not None:
        input, weight, bias = _cast(dtype, input, weight, bias)
    output: Tensor
    operands, geometry = (input, weight, bias), ops.flat_geometry(conv)
    if torch.compiler.is_compiling():
        constants = constants_of(config, record)
        output = _Conv2d.apply(*operands, *constants, *geometry)  # type: ignore[no-untyped-call]
    else:
        choices = (config.prunes, config.grad_weight == "sparse", config, record)
        output = _applied(_Conv2dTransformed, _APPLY_CONV2D, *operands, *choices, *geometry)
    return output


def _cast(dtype: torch.dtype, *operands: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else casting.cast(x, dtype) for x in operands)


def constants_of(config: SDGPConfig, record: LayerRecord) -> tuple[bool, bool, str, int]:
    """Return what backward needs of a configuration, as constants that compiled code can carry."""
    token = record.token if config.telemetry_every else _COMPILED_TOKEN
    return config.prunes, config.grad_weight == "sparse", config.text, token


def _applied(
    transformed: type[Function], apply: Any, input: Tensor, weight: Tensor, *others: Any
) -> Any:
    """Apply an autograd function in eager mode; ``apply`` is what its ``apply`` calls at last.

    On its way there that binds the arguments through ``inspect.signature``, 15 us.
    """
    if torch._C._are_functorch_transforms_active():
        return transformed.apply(input, weight, *others)  # type: ignore[no-untyped-call]
    unwrap = _functorch.unwrap_if_dead  # of tensors that outlived a transform
    return apply(unwrap(input), unwrap(weight), *others)


class _Linear(Function):
    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prunes: bool,
        sparse_grad_weight: bool,
        config: Any,
        record: Any,
    ) -> Tensor:
        return owned(F.linear(input, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.prunes, ctx.sparse_grad_weight, ctx.config, ctx.record = inputs
        ctx.save_for_backward(
            input if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
        )
        ctx.weight_is_row_major = weight.stride() == (weight.shape[1], 1)
        ctx.sharding = None if type(weight) in ORDINARY else shards.sharding_of(input, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        input, weight = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *_linear_gradients(ctx, grad_output, input, weight), None, None, None, None
        with torch.no_grad():
            found = _linear_gradients(ctx, grad_output, input, weight)
        return once(ctx, grad_output, *found, None, None, None, None)


class _LinearTransformed(_Linear):
    """With what eager mode and ``torch.func`` ask for, and the compiler takes from no function."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Linear.setup_context(ctx, inputs, output)
        ctx.bias = inputs[2]  # keeps autocast's copy of it for as long as that of the weight

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise SDGPError(NO_JVP)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], input: Tensor, *others: Any
    ) -> tuple[Tensor, int]:
        mapped = input.movedim(_dim_of_input(in_dims), 0)
        return _LinearTransformed.apply(mapped, *others), 0  # type: ignore[no-untyped-call]


def _linear_gradients(
    ctx: Any, grad_output: Tensor, input: Tensor | None, weight: Tensor | None
) -> shards.Gradients:
    """Return grad_input, grad_weight and grad_bias, where they are needed."""
    if ctx.sharding is None:
        return _local_linear_gradients(ctx, grad_output, input, weight)
    local = partial(_local_linear_gradients, ctx)
    return shards.linear_gradients(ctx.sharding, grad_output, input, weight, ctx.config, local)


def _local_linear_gradients(
    ctx: Any, grad_output: Tensor, input: Tensor | None, weight: Tensor | None
) -> shards.Gradients:
    calls, config, record = gradient_means(ctx, grad_output)
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_input: Tensor | None = None
    grad_weight: Tensor | None = None
    flat = token_matrix(grad_output)
    tokens = None if input is None else token_matrix(input)
    if need_input and need_weight and ctx.prunes and ctx.sparse_grad_weight:
        grad_input, grad_weight = calls.linear_grads(grad_output, weight, tokens, config, record)
    else:
        if weight is not None:  # saved, because grad_input is needed
            grad_input = (
                calls.linear_grad_input(grad_output, weight, config, record)
                if ctx.prunes
                else dense_linear_grad_input(grad_output, weight)
            )
        if tokens is not None:  # saved, because grad_weight is needed
            grad_weight = (
                calls.linear_grad_weight(flat, tokens, ctx.weight_is_row_major, config, record)
                if ctx.sparse_grad_weight
                else _dense_grad_weight(ctx, flat, tokens)
            )
    return grad_input, grad_weight, flat.sum(0) if need_bias else None


def token_matrix(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _dense_grad_weight(ctx: Any, flat: Tensor, tokens: Tensor) -> Tensor:
    # The same two products that autograd's own addmm backward chooses between, for equal bits.
    return flat.t().mm(tokens) if ctx.weight_is_row_major else tokens.t().mm(flat).t()


class _Conv2d(Function):
    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prunes: bool,
        sparse_grad_weight: bool,
        config: Any,
        record: Any,
        *geometry: int,
    ) -> Tensor:
        conv = ops.geometry_of(geometry)
        return F.conv2d(input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.prunes, ctx.sparse_grad_weight, ctx.config, ctx.record = inputs[:7]
        ctx.geometry = inputs[7:]
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        ctx.input_layout = input.shape, input.stride()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        input, weight = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *_conv2d_gradients(ctx, grad_output, input, weight), *[None] * 11
        with torch.no_grad():
            found = _conv2d_gradients(ctx, grad_output, input, weight)
        return once(ctx, grad_output, *found, *[None] * 11)


class _Conv2dTransformed(_Conv2d):
    """With what eager mode and ``torch.func`` ask for, and the compiler takes from no function."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Conv2d.setup_context(ctx, inputs, output)
        ctx.bias = inputs[2]  # as for a linear layer

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise SDGPError(NO_JVP)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], input: Tensor, *others: Any
    ) -> tuple[Tensor, int]:
        images = input.movedim(_dim_of_input(in_dims), 0)
        output: Tensor = _Conv2dTransformed.apply(images.flatten(0, 1), *others)  # type: ignore[no-untyped-call]
        return torch.unflatten(output, 0, images.shape[:2]), 0


def _conv2d_gradients(
    ctx: Any, grad_output: Tensor, input: Tensor | None, weight: Tensor
) -> shards.Gradients:
    """Return grad_input, grad_weight and grad_bias, where they are needed."""
    calls, config, record = gradient_means(ctx, grad_output)
    conv = ops.geometry_of(ctx.geometry)
    geometry = conv if calls is products else ctx.geometry
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    like = _unsaved(ctx, grad_output) if input is None else input
    grad_input: Tensor | None = None
    if need_input and ctx.prunes:
        grad_input = calls.conv2d_grad_input(grad_output, weight, like, geometry, config, record)
    elif need_input:
        grad_input = dense_conv2d_grad_input(grad_output, weight, like, conv)
    sparse = need_weight and ctx.sparse_grad_weight
    # One call for both, as autograd makes it: the bits of the bias gradient depend on it.
    grad_weight, grad_bias = dense_conv2d_grad_parameters(
        grad_output, like, weight, conv, (need_weight and not sparse, need_bias)
    )
    if sparse:
        grad_weight = calls.conv2d_grad_weight(grad_output, like, weight, geometry, config, record)
    return grad_input, grad_weight, grad_bias


def _unsaved(ctx: Any, grad_output: Tensor) -> Tensor:
    """Return uninitialised memory in place of an input that a frozen weight left unsaved."""
    shape, stride = ctx.input_layout
    return torch.empty_strided(shape, stride, dtype=grad_output.dtype, device=grad_output.device)


def gradient_means(ctx: Any, grad_output: Tensor) -> tuple[Any, Any, Any]:
    """Return what computes the products, and configuration and record as that takes them.

    That is ``products``, or the operators, which alone know what is no plain tensor.

    Raises:
        SDGPError: grad_output is a batch of gradients.
    """
    if torch.compiler.is_compiling():
        is_plain = False
    else:
        casting.forget()
        is_plain = type(grad_output) is Tensor and not torch._C._are_functorch_transforms_active()
        check_one_gradient(grad_output)
    if is_plain:
        return products, ctx.config, ctx.record
    if isinstance(ctx.config, str):  # compiled forward
        return ops, ctx.config, ctx.record
    return ops, ctx.config.text, ctx.record.token


def owned(output: Tensor) -> Tensor:
    """Return what a function made as no view: those cannot be changed in place, as ReLU may."""
    is_view = output.ndim != 2 if torch.compiler.is_compiling() else output._is_view()
    if is_view and type(output) is Tensor:
        output = torch.ops.aten._unsafe_view(output, output.shape)
    return output


def _dim_of_input(in_dims: tuple[int | None, ...]) -> int:
    """Return the dimension of the input that vmap maps over; raise where it maps over others."""
    dim, *others = in_dims
    if dim is None or any(other is not None for other in others):
        raise SDGPError(_NO_BATCHED_PARAMETERS)
    return dim


# For ``_applied``.
_APPLY_LINEAR = super(Function, _LinearTransformed).apply
_APPLY_CONV2D = super(Function, _Conv2dTransformed).apply
