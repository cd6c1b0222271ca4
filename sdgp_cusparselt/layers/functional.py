"""linear and conv2d with a pruned data gradient: the only place that saves tensors for backward.

M, N, K name the sizes of the product at hand. For grad_input that is [M, N] = [M, K] @ [K, N] with
M = tokens, K = out_features, N = in_features; groups of the pruned operand run along K.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.backends.dense import (
    dense_conv2d_grad_input,
    dense_conv2d_grad_parameters,
    dense_linear_grad_input,
)
from sdgp_cusparselt.config.choices import SDGPConfig, check_config
from sdgp_cusparselt.errors import SDGPError, value_error
from sdgp_cusparselt.products import backward as products
from sdgp_cusparselt.products import operators as ops
from sdgp_cusparselt.recording.records import COMPILED, LayerRecord, record_of

_NO_RECORD = LayerRecord()
_COMPILED_TOKEN = COMPILED.token
_NO_DOUBLE_BACKWARD = (
    "SDGP: a second derivative was asked for, but a pruned gradient is not the derivative of any "
    "function. Use sdgp.set_enabled_(model, False), or SDGPConfig(prune='none') with plain layers, "
    "where double backward is needed."
)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    config: SDGPConfig,
    record: LayerRecord | None = None,
) -> Tensor:
    """Apply a linear layer whose data gradient is pruned.

    output      = input @ weight.T + bias
    grad_input  = prune(grad_output) @ weight
    grad_weight = grad_output.T @ input          (grad_output pruned along tokens if so configured)
    grad_bias   = grad_output summed over tokens

    Args:
        input: [..., in_features] float, any strides.
        weight: [out_features, in_features], any strides.
        bias: [out_features] or None.
        config: how to prune and on what backend.
        record: where calls and fallbacks are counted; a shared one if None.

    Returns:
        [..., out_features].

    Raises:
        TypeError: config is not an SDGPConfig.
        ValueError: it has a schedule.
        NotSupportedError: in backward, where the wanted backend cannot run the product and
            ``config.on_unsupported`` is "raise".
        SDGPError: in double backward.

    Note:
        Under autocast the operands are cast as ``torch.nn.functional.linear`` casts them.

    Source:
        SDGP (arXiv 2202.00774), section on the data gradient.
    """
    _check_constant("linear", config)
    input, weight, bias = _autocast(input, weight, bias)
    output: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, *_choices(config, record)
    )
    return output


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    config: SDGPConfig,
    record: LayerRecord | None = None,
) -> Tensor:
    """Apply a convolution whose data gradient is pruned along its channels.

    output     = conv2d(input, weight) + bias
    grad_input = conv_transpose2d(prune(grad_output along channels), weight)
    grad_weight and grad_bias from the dense grad_output   (pixels pruned if so configured)

    Args:
        input: [N, in_channels, H, W] or [in_channels, H, W] float, any memory format.
        weight: [out_channels, in_channels / groups, kH, kW].
        bias: [out_channels] or None.
        stride: in pixels.
        padding: in pixels, or "valid" or "same" (stride 1 only).
        dilation: in pixels.
        groups: number of convolution groups; pruning groups never cross their borders.
        config: how to prune and on what backend.
        record: where calls and fallbacks are counted; a shared one if None.

    Returns:
        [N, out_channels, H_out, W_out] or without N, as input.

    Raises:
        TypeError: config is not an SDGPConfig.
        ValueError: config has a schedule, padding is an unknown word, or "same" with a stride.
        NotSupportedError, SDGPError: as ``linear``.

    Source:
        SDGP (arXiv 2202.00774); groups along channels whatever the memory format is.
    """
    _check_constant("conv2d", config)
    input, weight, bias = _autocast(input, weight, bias)
    stride, dilation = _pair(stride), _pair(dilation)
    input, pads = _resolve_padding(input, weight, stride, padding, dilation)
    conv = ConvGeometry(stride, pads, dilation, groups)
    batched = input if input.ndim == 4 else input.unsqueeze(0)
    output: Tensor = _Conv2d.apply(  # type: ignore[no-untyped-call]
        batched, weight, bias, *_choices(config, record), *ops.flat_geometry(conv)
    )
    return output if input.ndim == 4 else output.squeeze(0)


def _check_constant(function: str, config: SDGPConfig) -> None:
    check_config(function, config)
    if config.schedule is not None:
        fix = "Pass config.at(step); only layers that convert_ made follow a schedule."
        raise value_error(function, "config", "one without a schedule", config.describe(), fix)


def _choices(config: SDGPConfig, record: LayerRecord | None) -> tuple[bool, bool, str, int]:
    """Return what backward needs of a configuration, as constants that a compiler can carry."""
    shared = torch.compiler.is_compiling() and not config.telemetry_every
    token = _COMPILED_TOKEN if shared else (_NO_RECORD if record is None else record).token
    return config.prunes, config.grad_weight == "sparse", config.text, token


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prunes: bool,
        sparse_grad_weight: bool,
        config: str,
        token: int,
    ) -> Tensor:
        return F.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.prunes, ctx.sparse_grad_weight, ctx.config, ctx.token = inputs
        ctx.save_for_backward(
            input if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
        )
        ctx.weight_is_row_major = weight.stride() == (weight.shape[1], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        with torch.no_grad():
            flat = _tokens(grad_output)
            if ctx.prunes and ctx.sparse_grad_weight and all(ctx.needs_input_grad[:2]):
                grad_input, grad_weight = _linear_grads(grad_output, weight, _tokens(input), ctx)
            else:
                if ctx.needs_input_grad[0]:
                    grad_input = _linear_grad_input(grad_output, weight, ctx)
                if ctx.needs_input_grad[1]:
                    grad_weight = _linear_grad_weight(flat, _tokens(input), ctx)
            if ctx.needs_input_grad[2]:
                grad_bias = flat.sum(0)
        return _once(ctx, grad_output, grad_input, grad_weight, grad_bias, *[None] * 4)


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _linear_grads(
    grad_output: Tensor, weight: Tensor, tokens: Tensor, ctx: Any
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        both: tuple[Tensor, Tensor] = ops.linear_grads(
            grad_output, weight, tokens, ctx.config, ctx.token
        )
        return both
    return products.linear_grads(grad_output, weight, tokens, *_looked_up(ctx))


def _linear_grad_input(grad_output: Tensor, weight: Tensor, ctx: Any) -> Tensor:
    if not ctx.prunes:
        return dense_linear_grad_input(grad_output, weight)
    if torch.compiler.is_compiling():
        compiled: Tensor = ops.linear_grad_input(grad_output, weight, ctx.config, ctx.token)
        return compiled
    return products.linear_grad_input(grad_output, weight, *_looked_up(ctx))


def _linear_grad_weight(flat: Tensor, tokens: Tensor, ctx: Any) -> Tensor:
    if ctx.sparse_grad_weight:
        if torch.compiler.is_compiling():
            compiled: Tensor = ops.linear_grad_weight(flat, tokens, ctx.config, ctx.token)
            return compiled
        return products.linear_grad_weight(flat, tokens, *_looked_up(ctx))
    # The same two products that autograd's own addmm backward chooses between, for equal bits.
    if ctx.weight_is_row_major:
        return flat.t().mm(tokens)
    return tokens.t().mm(flat).t()


def _looked_up(ctx: Any) -> tuple[SDGPConfig, LayerRecord]:
    return SDGPConfig.from_text(ctx.config), record_of(ctx.token)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prunes: bool,
        sparse_grad_weight: bool,
        config: str,
        token: int,
        *geometry: int,
    ) -> Tensor:
        conv = ops.geometry_of(geometry)
        return F.conv2d(input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.prunes, ctx.sparse_grad_weight, ctx.config, ctx.token = inputs[:7]
        ctx.geometry = inputs[7:]
        ctx.save_for_backward(
            input if ctx.needs_input_grad[1] else None,
            weight,
        )
        ctx.input_shape = input.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        with torch.no_grad():
            input_like = _like_input(grad_output, ctx.input_shape) if input is None else input
            if ctx.needs_input_grad[0]:
                grad_input = _conv2d_grad_input(grad_output, input_like, weight, ctx)
            grad_weight, grad_bias = _conv2d_grad_parameters(grad_output, input_like, weight, ctx)
        return _once(ctx, grad_output, grad_input, grad_weight, grad_bias, *[None] * 11)


def _conv2d_grad_input(grad_output: Tensor, input_like: Tensor, weight: Tensor, ctx: Any) -> Tensor:
    conv = ops.geometry_of(ctx.geometry)
    if not ctx.prunes:
        return dense_conv2d_grad_input(grad_output, weight, input_like, conv)
    if torch.compiler.is_compiling():
        compiled: Tensor = ops.conv2d_grad_input(
            grad_output, weight, input_like, ctx.geometry, ctx.config, ctx.token
        )
        return compiled
    return products.conv2d_grad_input(grad_output, weight, input_like, conv, *_looked_up(ctx))


def _like_input(grad_output: Tensor, input_shape: torch.Size) -> Tensor:
    """Return uninitialised memory in place of an input that a frozen weight left unsaved."""
    channels_last = grad_output.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    dtype, device = grad_output.dtype, grad_output.device
    return torch.empty(input_shape, dtype=dtype, device=device, memory_format=memory_format)


def _conv2d_grad_parameters(
    grad_output: Tensor, input: Tensor, weight: Tensor, ctx: Any
) -> tuple[Tensor | None, Tensor | None]:
    conv = ops.geometry_of(ctx.geometry)
    _, need_weight, need_bias = ctx.needs_input_grad[:3]
    sparse = need_weight and ctx.sparse_grad_weight
    # One call for both, as autograd makes it: the bits of the bias gradient depend on it.
    grad_weight, grad_bias = dense_conv2d_grad_parameters(
        grad_output, input, weight, conv, (need_weight and not sparse, need_bias)
    )
    if sparse and torch.compiler.is_compiling():
        grad_weight = ops.conv2d_grad_weight(
            grad_output, input, weight, ctx.geometry, ctx.config, ctx.token
        )
    elif sparse:
        grad_weight = products.conv2d_grad_weight(
            grad_output, input, weight, conv, *_looked_up(ctx)
        )
    return grad_weight, grad_bias


class _NoDoubleBackward(torch.autograd.Function):
    """Hands gradients through and raises when they are differentiated."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in grads)

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


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast as autocast casts the operands of a product: every float but float64."""
    device_type = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _resolve_padding(
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: int | tuple[int, int] | str,
    dilation: tuple[int, int],
) -> tuple[Tensor, tuple[int, int]]:
    """Return the input, padded where the padding is lopsided, and what the convolution pads."""
    if not isinstance(padding, str):
        return input, _pair(padding)
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        rule = 'a number, a pair, "valid" or "same"'
        raise value_error("conv2d", "padding", rule, repr(padding), "Pick one of these.")
    if stride != (1, 1):
        fix = "Pass the padding in pixels."
        raise value_error("conv2d", "stride", 'one with padding="same"', stride, fix)
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    low = (total[0] // 2, total[1] // 2)
    odd_h, odd_w = total[0] % 2, total[1] % 2
    return (F.pad(input, (0, odd_w, 0, odd_h)) if odd_h or odd_w else input), low
