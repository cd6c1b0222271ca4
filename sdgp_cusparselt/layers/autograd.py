"""The autograd functions of pruned layers: the only place that saves tensors for backward.

M, N, K name the sizes of the product at hand. For grad_input that is [M, N] = [M, K] @ [K, N] with
M = tokens, K = out_features, N = in_features; groups of the pruned operand run along K.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
from sdgp_cusparselt.products import backward as products
from sdgp_cusparselt.products import operators as ops
from sdgp_cusparselt.recording.records import COMPILED, LayerRecord

_COMPILED_TOKEN = COMPILED.token
_INSTEAD = (
    "Use sdgp.set_enabled_(model, False) or SDGPConfig(prune='none') where that is needed: layers "
    "that do not prune are torch's own."
)
_NO_DOUBLE_BACKWARD = (
    "SDGP: a second derivative was asked for, but a pruned gradient is not the derivative of any "
    f"function. {_INSTEAD}"
)
_NO_JVP = f"SDGP: forward-mode derivatives of a pruned layer are not defined. {_INSTEAD}"
_NO_BATCHED_GRADIENTS = (
    "SDGP: a pruned layer takes one gradient at a time, not a batch of them as is_grads_batched, "
    f"jacrev and vmap over gradients make them. {_INSTEAD}"
)
_NO_BATCHED_PARAMETERS = (
    f"SDGP: a pruned layer cannot be mapped over its weight or bias by vmap. {_INSTEAD}"
)


def pruned_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, config: SDGPConfig, record: LayerRecord
) -> Tensor:
    """Return input @ weight.T + bias whose gradients are pruned; see ``functional.linear``."""
    dtype = casting.autocast_dtype(input)
    if dtype is not None:
        input, weight, bias = _cast(dtype, input, weight, bias)
    return _LINEAR(input, weight, bias, *_choices(config, record))


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
    batched = input if input.ndim == 4 else input.unsqueeze(0)
    choices, geometry = _choices(config, record), ops.flat_geometry(conv)
    output = _CONV2D(batched, weight, bias, *choices, *geometry)
    return output if input.ndim == 4 else output.squeeze(0)


def _cast(dtype: torch.dtype, *operands: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else casting.cast(x, dtype) for x in operands)


def _choices(config: SDGPConfig, record: LayerRecord) -> tuple[bool, bool, Any, Any]:
    """Return what backward needs of a configuration; in compiled code as constants it can carry."""
    prunes, sparse = config.prunes, config.grad_weight == "sparse"
    if not torch.compiler.is_compiling():
        return prunes, sparse, config, record
    token = record.token if config.telemetry_every else _COMPILED_TOKEN
    return prunes, sparse, config.text, token


class _Applied(NamedTuple):
    """One autograd function as each of its callers needs it.

    Attributes:
        compiled: for the compiler, which takes no function that has a ``jvp``.
        transformed: the same one for ``torch.func``, with what that asks of it.
        apply: what ``transformed.apply`` calls at last. On its way there that binds the arguments
            through ``inspect.signature``, 15 us.
    """

    compiled: type[Function]
    transformed: type[Function]
    apply: Callable[..., Any]

    def __call__(self, *args: Any) -> Tensor:
        """Apply it."""
        output: Tensor
        if torch.compiler.is_compiling():
            output = self.compiled.apply(*args)  # type: ignore[no-untyped-call]
        elif torch._C._are_functorch_transforms_active():
            output = self.transformed.apply(*args)  # type: ignore[no-untyped-call]
        else:
            output = self.apply(*args)
        return output


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
        return F.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, ctx.prunes, ctx.sparse_grad_weight, ctx.config, ctx.record = inputs
        _keep(ctx, bias)
        ctx.save_for_backward(
            input if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
        )
        ctx.weight_is_row_major = weight.stride() == (weight.shape[1], 1)
        ctx.sharding = shards.sharding_of(input, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        _begin(grad_output)
        input, weight = ctx.saved_tensors
        with torch.no_grad():
            if ctx.sharding is None:
                found = _linear_gradients(ctx, grad_output, input, weight)
            else:
                local = partial(_linear_gradients, ctx)
                found = shards.linear_gradients(
                    ctx.sharding, grad_output, input, weight, ctx.config, local
                )
        return _once(ctx, grad_output, *found, None, None, None, None)


class _LinearTransformed(_Linear):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise SDGPError(_NO_JVP)

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
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_input = grad_weight = None
    flat = _tokens(grad_output)
    if need_input and need_weight and ctx.prunes and ctx.sparse_grad_weight:
        assert input is not None and weight is not None  # saved, because both are needed
        grad_input, grad_weight = _linear_grads(ctx, grad_output, weight, _tokens(input))
    else:
        if need_input:
            assert weight is not None  # likewise
            grad_input = _linear_grad_input(ctx, grad_output, weight)
        if need_weight:
            assert input is not None  # likewise
            grad_weight = _linear_grad_weight(ctx, flat, _tokens(input))
    return grad_input, grad_weight, flat.sum(0) if need_bias else None


def _tokens(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _linear_grads(
    ctx: Any, grad_output: Tensor, weight: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    if _opaque(grad_output):
        both: tuple[Tensor, Tensor] = ops.linear_grads(grad_output, weight, tokens, *_names(ctx))
        return both
    return products.linear_grads(grad_output, weight, tokens, ctx.config, ctx.record)


def _linear_grad_input(ctx: Any, grad_output: Tensor, weight: Tensor) -> Tensor:
    if not ctx.prunes:
        return dense_linear_grad_input(grad_output, weight)
    if _opaque(grad_output):
        compiled: Tensor = ops.linear_grad_input(grad_output, weight, *_names(ctx))
        return compiled
    return products.linear_grad_input(grad_output, weight, ctx.config, ctx.record)


def _linear_grad_weight(ctx: Any, flat: Tensor, tokens: Tensor) -> Tensor:
    if ctx.sparse_grad_weight:
        if _opaque(flat):
            compiled: Tensor = ops.linear_grad_weight(flat, tokens, *_names(ctx))
            return compiled
        return products.linear_grad_weight(flat, tokens, ctx.config, ctx.record)
    # The same two products that autograd's own addmm backward chooses between, for equal bits.
    if ctx.weight_is_row_major:
        return flat.t().mm(tokens)
    return tokens.t().mm(flat).t()


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
        input, weight, bias, ctx.prunes, ctx.sparse_grad_weight, ctx.config, ctx.record = inputs[:7]
        _keep(ctx, bias)
        ctx.geometry = inputs[7:]
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        ctx.input_layout = input.shape, input.stride()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        _begin(grad_output)
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        with torch.no_grad():
            input_like = _unsaved(ctx, grad_output) if input is None else input
            if ctx.needs_input_grad[0]:
                grad_input = _conv2d_grad_input(ctx, grad_output, input_like, weight)
            grad_weight, grad_bias = _conv2d_grad_parameters(ctx, grad_output, input_like, weight)
        return _once(ctx, grad_output, grad_input, grad_weight, grad_bias, *[None] * 11)


class _Conv2dTransformed(_Conv2d):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise SDGPError(_NO_JVP)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], input: Tensor, *others: Any
    ) -> tuple[Tensor, int]:
        images = input.movedim(_dim_of_input(in_dims), 0)
        output: Tensor = _Conv2dTransformed.apply(images.flatten(0, 1), *others)  # type: ignore[no-untyped-call]
        return torch.unflatten(output, 0, images.shape[:2]), 0


def _unsaved(ctx: Any, grad_output: Tensor) -> Tensor:
    """Return uninitialised memory in place of an input that a frozen weight left unsaved."""
    shape, stride = ctx.input_layout
    return torch.empty_strided(shape, stride, dtype=grad_output.dtype, device=grad_output.device)


def _conv2d_grad_input(ctx: Any, grad_output: Tensor, input_like: Tensor, weight: Tensor) -> Tensor:
    conv = ops.geometry_of(ctx.geometry)
    if not ctx.prunes:
        return dense_conv2d_grad_input(grad_output, weight, input_like, conv)
    if _opaque(grad_output):
        compiled: Tensor = ops.conv2d_grad_input(
            grad_output, weight, input_like, ctx.geometry, *_names(ctx)
        )
        return compiled
    return products.conv2d_grad_input(grad_output, weight, input_like, conv, ctx.config, ctx.record)


def _conv2d_grad_parameters(
    ctx: Any, grad_output: Tensor, input: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    conv = ops.geometry_of(ctx.geometry)
    _, need_weight, need_bias = ctx.needs_input_grad[:3]
    sparse = need_weight and ctx.sparse_grad_weight
    # One call for both, as autograd makes it: the bits of the bias gradient depend on it.
    grad_weight, grad_bias = dense_conv2d_grad_parameters(
        grad_output, input, weight, conv, (need_weight and not sparse, need_bias)
    )
    if sparse and _opaque(grad_output):
        grad_weight = ops.conv2d_grad_weight(grad_output, input, weight, ctx.geometry, *_names(ctx))
    elif sparse:
        grad_weight = products.conv2d_grad_weight(
            grad_output, input, weight, conv, ctx.config, ctx.record
        )
    return grad_weight, grad_bias


def _keep(ctx: Any, bias: Tensor | None) -> None:
    """Keep the copy of a bias that autocast made for as long as the graph, as weights' are."""
    if not torch.compiler.is_compiling():
        ctx.bias = bias


def _opaque(grad_output: Tensor) -> bool:
    """Whether a product has to go through its operator: only that knows what is no plain tensor."""
    return (
        torch.compiler.is_compiling()
        or type(grad_output) is not Tensor
        or torch._C._are_functorch_transforms_active()
    )


def _names(ctx: Any) -> tuple[str, int]:
    """Return configuration and record as an operator takes them."""
    if isinstance(ctx.config, str):
        return ctx.config, ctx.record
    return ctx.config.text, ctx.record.token


def _begin(grad_output: Tensor) -> None:
    """Start a backward pass: raise SDGPError for a batch of gradients, forget cast weights."""
    if torch.compiler.is_compiling():
        return
    casting.forget()
    if _is_batched(grad_output):
        raise SDGPError(_NO_BATCHED_GRADIENTS)


def _is_batched(x: Tensor) -> bool:
    """Whether vmap maps over x, at whatever depth of other transforms."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return _functorch.is_legacy_batchedtensor(x)


def _dim_of_input(in_dims: tuple[int | None, ...]) -> int:
    """Return the dimension of the input that vmap maps over; raise where it maps over others."""
    dim, *others = in_dims
    if dim is None or any(other is not None for other in others):
        raise SDGPError(_NO_BATCHED_PARAMETERS)
    return dim


class _NoDoubleBackward(Function):
    """Hands gradients through and raises when they are differentiated."""

    @staticmethod
    def forward(anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise SDGPError(_NO_DOUBLE_BACKWARD)


def _once(ctx: Any, grad_output: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return grads; with create_graph=True, such that differentiating them raises."""
    if not torch.is_grad_enabled():
        return grads
    sources = (grad_output, *ctx.saved_tensors)
    anchor = next((t for t in sources if t is not None and t.requires_grad), None)
    if anchor is None:
        return grads
    present = [g for g in grads if g is not None]
    guarded = iter(_NoDoubleBackward.apply(anchor, *present))  # type: ignore[no-untyped-call]
    return tuple(None if g is None else next(guarded) for g in grads)


_LINEAR = _Applied(_Linear, _LinearTransformed, super(Function, _LinearTransformed).apply)
_CONV2D = _Applied(_Conv2d, _Conv2dTransformed, super(Function, _Conv2dTransformed).apply)
