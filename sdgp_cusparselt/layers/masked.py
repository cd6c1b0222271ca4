"""The autograd functions of layers with a pruned weight; ``autograd`` has those of the others.

output      = input @ W.T + bias            W = the weight, pruned along in_features
grad_input  = grad_output @ W, or prune(grad_output) @ W, or with W pruned along out_features too
grad_weight = grad_output.T @ input         straight through: that of W reaches the whole weight

What is saved for backward is the weight itself: pruned and packed forms are kept by version.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.backends.dense import (
    dense_conv2d_grad_input,
    dense_conv2d_grad_parameters,
    dense_linear_grad_input,
)
from sdgp_cusparselt.backends.masking import masked
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import NotSupportedError
from sdgp_cusparselt.layers import casting, shards
from sdgp_cusparselt.layers.autograd import gradient_means, owned, token_matrix
from sdgp_cusparselt.layers.plain import ORDINARY, reason_against_weight
from sdgp_cusparselt.layers.refusals import once
from sdgp_cusparselt.products import backward as products
from sdgp_cusparselt.products import operators as ops
from sdgp_cusparselt.products import weight_operators as weight_ops
from sdgp_cusparselt.products import weights as of_weights
from sdgp_cusparselt.recording.records import COMPILED, LayerRecord

_COMPILED_TOKEN = COMPILED.token
#: Of the functions below that are no tensors: keeps, both_ways, prunes, sparse_grad_weight, config
#: and record.
_CHOICES = 6


def masked_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    masks: tuple[Tensor | None, Tensor | None],
    keeps: bool,
    config: SDGPConfig,
    record: LayerRecord,
) -> Tensor:
    """Return input @ W.T + bias with gradients as ``config`` says.

    Args:
        input: [..., in_features].
        weight: [out_features, in_features], any strides.
        bias: [out_features] or None.
        masks: bool of weight's shape or None: what output keeps, what grad_input keeps of that.
        keeps: whether the weight's version says when it changes.
        config: with ``masks_weight``.
        record: of the layer.

    Raises:
        NotSupportedError: the weight is none that can be pruned, or a product cannot run as asked.
    """
    _check(weight, config, record)
    input, bias = _cast(input, bias)
    if input.dtype != weight.dtype and not _autocasts(input):
        return F.linear(input, weight, bias)  # which says what is wrong
    if _is_composed(input, weight):
        kept = _StraightThrough.apply(weight.to(input.dtype), _masks(weight, input, masks, config))  # type: ignore[no-untyped-call]
        _check_composed(config)
        return F.linear(input, kept, bias)
    output: Tensor = _applied(_MaskedLinear, (input, weight, bias, *masks), keeps, config, record)
    return output


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    masks: tuple[Tensor | None, Tensor | None],
    conv: ConvGeometry,
    keeps: bool,
    config: SDGPConfig,
    record: LayerRecord,
) -> Tensor:
    """Return conv2d(input, W) + bias with gradients as ``config`` says; see ``masked_linear``.

    Args:
        input: [N, in_channels, H, W].
        weight: [out_channels, in_channels / groups, kH, kW]; groups of four run along its channels.
        bias, masks, keeps, config, record: see ``masked_linear``.
        conv: stride, padding, dilation, groups.
    """
    _check(weight, config, record)
    input, bias = _cast(input, bias)
    steps = conv.stride, conv.padding, conv.dilation, conv.groups
    if input.dtype != weight.dtype and not _autocasts(input):
        return F.conv2d(input, weight, bias, *steps)
    if _is_composed(input, weight):
        kept = _StraightThrough.apply(weight.to(input.dtype), _masks(weight, input, masks, config))  # type: ignore[no-untyped-call]
        _check_composed(config)
        return F.conv2d(input, kept, bias, *steps)
    tensors = (input, weight, bias, *masks)
    output: Tensor = _applied(
        _MaskedConv2d, tensors, keeps, config, record, *ops.flat_geometry(conv)
    )
    return output


class _MaskedLinear(Function):
    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        mask_t: Tensor | None,
        keeps: bool,
        both_ways: bool,
        prunes: bool,
        sparse_grad_weight: bool,
        config: Any,
        record: Any,
    ) -> Tensor:
        calls = weight_ops if isinstance(config, str) else of_weights
        return owned(calls.linear_output(input, weight, bias, mask, keeps, config, record))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs)
        ctx.row_major = inputs[1].stride() == (inputs[1].shape[1], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        with torch.no_grad():
            found = _linear_gradients(ctx, grad_output)
        return once(ctx, grad_output, *found, *[None] * (2 + _CHOICES))


class _MaskedConv2d(Function):
    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        mask_t: Tensor | None,
        keeps: bool,
        both_ways: bool,
        prunes: bool,
        sparse_grad_weight: bool,
        config: Any,
        record: Any,
        *geometry: int,
    ) -> Tensor:
        output: Tensor
        if isinstance(config, str):
            output = weight_ops.conv2d_output(
                input, weight, bias, mask, geometry, keeps, config, record
            )
        else:
            conv = ops.geometry_of(geometry)
            output = of_weights.conv2d_output(
                input, weight, bias, mask, conv, keeps, config, record
            )
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs)
        ctx.geometry = inputs[5 + _CHOICES :]
        ctx.input_layout = inputs[0].shape, inputs[0].stride()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        with torch.no_grad():
            found = _conv2d_gradients(ctx, grad_output)
        return once(ctx, grad_output, *found, *[None] * (2 + _CHOICES + 7))


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    input, weight, _, mask, mask_t = inputs[:5]
    ctx.keeps, ctx.both_ways, ctx.prunes, ctx.sparse_grad_weight = inputs[5:9]
    ctx.config, ctx.record = inputs[9:11]
    ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight, mask, mask_t)


def _linear_gradients(ctx: Any, grad_output: Tensor) -> shards.Gradients:
    """Return grad_input, grad_weight and grad_bias, where they are needed."""
    calls, config, record = gradient_means(ctx, grad_output)
    weights: Any = of_weights if calls is products else weight_ops
    input, weight, mask, mask_t = ctx.saved_tensors
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    flat, keeps = token_matrix(grad_output), ctx.keeps
    tokens = token_matrix(input) if need_weight else None
    grad_input = grad_weight = None
    if need_input and ctx.both_ways:
        grad_input = weights.linear_weight_grad_input(
            grad_output, weight, mask, mask_t, keeps, config, record
        )
    elif need_input:
        kept = weights.pruned_weight(weight, mask, grad_output, keeps, config)
        if not ctx.prunes:
            grad_input = dense_linear_grad_input(grad_output, kept)
        elif tokens is not None and ctx.sparse_grad_weight:
            grad_input, grad_weight = calls.linear_grads(grad_output, kept, tokens, config, record)
        else:
            grad_input = calls.linear_grad_input(grad_output, kept, config, record)
    if tokens is not None and grad_weight is None:
        if ctx.sparse_grad_weight:
            grad_weight = calls.linear_grad_weight(flat, tokens, ctx.row_major, config, record)
        else:
            grad_weight = flat.t().mm(tokens) if ctx.row_major else tokens.t().mm(flat).t()
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return grad_input, grad_weight, flat.sum(0) if need_bias else None


def _conv2d_gradients(ctx: Any, grad_output: Tensor) -> shards.Gradients:
    """Return grad_input, grad_weight and grad_bias, where they are needed."""
    calls, config, record = gradient_means(ctx, grad_output)
    eager = calls is products
    weights: Any = of_weights if eager else weight_ops
    conv = ops.geometry_of(ctx.geometry)
    geometry = conv if eager else ctx.geometry
    input, weight, mask, mask_t = ctx.saved_tensors
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    like = input
    if like is None:
        shape, stride = ctx.input_layout
        like = torch.empty_strided(
            shape, stride, dtype=grad_output.dtype, device=grad_output.device
        )
    grad_input = None
    if need_input and ctx.both_ways:
        grad_input = weights.conv2d_weight_grad_input(
            grad_output, weight, mask, mask_t, like, geometry, ctx.keeps, config, record
        )
    elif need_input:
        kept = weights.pruned_weight(weight, mask, grad_output, ctx.keeps, config)
        if ctx.prunes:
            grad_input = calls.conv2d_grad_input(grad_output, kept, like, geometry, config, record)
        else:
            grad_input = dense_conv2d_grad_input(grad_output, kept, like, conv)
    sparse = need_weight and ctx.sparse_grad_weight
    # Only the weight's shape matters to its gradient.
    shaped = weight.to(grad_output.dtype)
    grad_weight, grad_bias = dense_conv2d_grad_parameters(
        grad_output, like, shaped, conv, (need_weight and not sparse, need_bias)
    )
    if sparse:
        grad_weight = calls.conv2d_grad_weight(grad_output, like, shaped, geometry, config, record)
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return grad_input, grad_weight, grad_bias


def _applied(
    function: type[Function],
    tensors: tuple[Tensor | None, ...],
    keeps: bool,
    config: SDGPConfig,
    record: LayerRecord,
    *geometry: int,
) -> Any:
    choices: tuple[Any, ...] = (config, record)
    if torch.compiler.is_compiling():
        token = record.token if config.telemetry_every else _COMPILED_TOKEN
        choices = (config.text, token)
    kinds = config.grad_input == "weight", config.prunes, config.grad_weight == "sparse"
    return function.apply(*tensors, keeps, *kinds, *choices, *geometry)  # type: ignore[no-untyped-call]


class _StraightThrough(Function):
    """The pruned weight in place of a weight, whose gradient it hands through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, kept: Tensor) -> Tensor:
        return kept.view_as(kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


def _check_composed(config: SDGPConfig) -> None:
    if config.prunes or config.grad_weight == "sparse" or config.grad_input == "weight":
        raise NotSupportedError(
            "SDGP: torch.func, torch.jit.trace and nested or sparse inputs take a layer with a "
            "pruned weight only with prune='none', grad_weight='dense' and "
            "grad_input='grad_output'. Use sdgp.set_enabled_(model, False) for a dense layer there."
        )


def _masks(
    weight: Tensor,
    input: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    config: SDGPConfig,
) -> Tensor:
    with torch.no_grad():
        return masked(weight.detach().to(input.dtype), masks[0], config)


def _check(weight: Tensor, config: SDGPConfig, record: LayerRecord) -> None:
    """Raise where a weight cannot be pruned: to go on with it unpruned is another function."""
    reason = reason_against_weight(weight, config)
    if reason is None and shards.is_sharded(weight):
        reason = "its weight is a DTensor, and groups of a tensor-parallel weight are not pruned"
    if reason is not None:
        raise NotSupportedError(f"{record.name}: a pruned weight cannot be used: {reason}.")


def _autocasts(input: Tensor) -> bool:
    return casting.autocast_dtype(input) is not None


def _cast(input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cast as autocast does, but the weight, which is cast when it is pruned."""
    dtype = casting.autocast_dtype(input)
    if dtype is None:
        return input, bias
    return casting.cast(input, dtype), None if bias is None else casting.cast(bias, dtype)


def _is_composed(input: Tensor, weight: Tensor) -> bool:
    """Whether only torch's own operations can take these operands."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or input.is_nested
        or input.layout is not torch.strided
        or type(weight) not in ORDINARY
    )
