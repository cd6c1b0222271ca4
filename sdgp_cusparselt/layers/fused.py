"""The autograd functions of linear layers that an activation follows.

    hidden = dropout(act(pre) [* up]),  pre = linear(input),  up = a second linear of the input

The activation's backward makes the layers' grad_output. Here both are one node of the graph, so
that one kernel can make a gradient and pack it. Saved are the inputs, pre, up and the mask, never
more than the separate layers save: hidden is kept by the layer that reads it and needs it for its
own grad_weight, and computing it again would cost the pass that is saved here. Of ReLU hidden takes
the place of pre, as in torch. A GELU written out in elementary operations saves four tensors less.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import SDGPError
from sdgp_cusparselt.layers import activations, casting
from sdgp_cusparselt.layers.autograd import NO_JVP, constants_of
from sdgp_cusparselt.layers.plain import ORDINARY
from sdgp_cusparselt.layers.refusals import check_one_gradient, once
from sdgp_cusparselt.products.produced import FusedLinear, Needs, produced_grads
from sdgp_cusparselt.pruning.producers import ActivationBackward
from sdgp_cusparselt.recording.records import LayerRecord


class Part(NamedTuple):
    """A linear layer whose output goes into the activation, or is what a gated one multiplies by.

    Attributes:
        weight: [out_features, in_features], any strides.
        bias: [out_features] or None.
        config: how it prunes.
        record: where its calls are counted.
    """

    weight: Tensor
    bias: Tensor | None
    config: SDGPConfig
    record: LayerRecord


def can_fuse(input: Tensor, *weights: Tensor) -> bool:
    """Whether these operands are nothing but memory, outside of ``torch.func``'s transforms."""
    if torch._C._are_functorch_transforms_active():
        return False
    return torch.compiler.is_compiling() or (
        type(input) is Tensor and all(type(weight) in ORDINARY for weight in weights)
    )


def activated_linear(
    input: Tensor, layers: tuple[Part, ...], spelling: str, dropout: float = 0.0
) -> Tensor:
    """Return dropout(act(linear(input)) [* linear(input)]) whose gradients are pruned.

    Args:
        input: [..., in_features].
        layers: that before the activation; if gated, then that which it is multiplied by.
        spelling: of the activation, one of ``activations.SPELLINGS``.
        dropout: probability; 0 outside of training.

    Returns:
        [..., out_features].

    Note:
        Some product of each layer is pruned, ``plain.linear_prunes`` says so, and ``can_fuse``
        holds. Draws the random numbers that ``torch.nn.functional.dropout`` would.
    """
    dtype = casting.autocast_dtype(input)
    first, second = layers[0], layers[1] if len(layers) > 1 else None
    operands = [input, first.weight, first.bias]
    operands += [None, None] if second is None else [second.weight, second.bias]
    if dtype is not None:
        operands = [None if x is None else casting.cast(x, dtype) for x in operands]
    hidden: Tensor
    if torch.compiler.is_compiling():
        choices = (*_constants(layers[0]), *_constants(layers[-1]))
        hidden = _Activated.apply(*operands, spelling, dropout, *choices)  # type: ignore[no-untyped-call]
    else:
        choices = (*_chosen(layers[0]), *_chosen(layers[-1]))
        hidden = _ActivatedEager.apply(*operands, spelling, dropout, *choices)  # type: ignore[no-untyped-call]
    return hidden


def _chosen(part: Part) -> tuple[Any, ...]:
    """Return what ``FusedLinear`` takes of a layer's configuration."""
    config = part.config
    return config, part.record, (config.prunes, config.grad_weight == "sparse")


def _constants(part: Part) -> tuple[Any, ...]:
    """Return the same as constants that compiled code can carry."""
    prunes, sparse_grad_weight, text, token = constants_of(part.config, part.record)
    return text, token, (prunes, sparse_grad_weight)


class _Activated(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up_weight: Tensor | None,
        up_bias: Tensor | None,
        spelling: str,
        dropout: float,
        *choices: Any,
    ) -> Tensor:
        pre = F.linear(input, weight, bias)
        hidden = activations.computed(spelling, pre)
        if spelling == "relu":  # has the same sign, and is saved already by what reads it
            pre = hidden
        up = None
        if up_weight is not None:
            up = F.linear(input, up_weight, up_bias)
            hidden = hidden * up
        hidden, mask, ctx.scale = _dropped(hidden, dropout)
        needs = ctx.needs_input_grad
        ctx.save_for_backward(
            input if needs[1] or needs[3] else None,
            weight if needs[0] else None,
            up_weight if needs[0] else None,
            pre,
            up,
            mask,
        )
        ctx.activation = activations.derivative_of(spelling)
        ctx.gated = up_weight is not None
        ctx.row_major = _is_row_major(weight), up_weight is not None and _is_row_major(up_weight)
        ctx.choices = choices[:3], choices[3:]
        return hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = grads
        if not torch.compiler.is_compiling():
            casting.forget()
            check_one_gradient(grad_hidden)
        if not torch.is_grad_enabled():
            return *_gradients(ctx, grad_hidden), *[None] * 8
        with torch.no_grad():
            found = _gradients(ctx, grad_hidden)
        return once(ctx, grad_hidden, *found, *[None] * 8)


class _ActivatedEager(_Activated):
    """With what eager mode asks for, and the compiler takes from no function."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.biases = inputs[2], inputs[4]  # keeps autocast's copies as long as those of weights
        return _Activated.forward(ctx, *inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise SDGPError(NO_JVP)


def _gradients(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of input, weight, bias, up_weight and up_bias, where they are needed."""
    input, weight, up_weight, pre, up, mask = ctx.saved_tensors
    need_input, *need = ctx.needs_input_grad[:5]
    # Under autocast some operations of an activation that is written out return float32.
    upstream = grad_hidden.to(pre.dtype)
    producer = ActivationBackward(ctx.activation, upstream, pre, up, mask, ctx.scale)
    layers = [
        FusedLinear(
            held,
            input if needs_weight else None,
            Needs(need_input, needs_weight, needs_bias),
            row_major,
            *choices,
        )
        for held, needs_weight, needs_bias, row_major, choices in (
            (weight, *need[:2], ctx.row_major[0], ctx.choices[0]),
            (up_weight, *need[2:], ctx.row_major[1], ctx.choices[1]),
        )[: 2 if ctx.gated else 1]
    ]
    first, *rest = produced_grads(producer, tuple(layers))
    if not rest:
        return *first, None, None
    (second,) = rest
    grad_input = None
    if first.input is not None and second.input is not None:
        grad_input = first.input + second.input
    return grad_input, first.weight, first.bias, second.weight, second.bias


def _dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor | None, float]:
    """Return x after dropout, which elements were kept, and what they were multiplied by.

    The numbers drawn and the roundings are those of ``torch.nn.functional.dropout``, which on a
    CPU multiplies by noise and elsewhere is one kernel.
    """
    if p == 0:
        return x, None, 1.0
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        dropped, mask = torch.native_dropout(x, p, True)
        return dropped, mask, 0.0 if p == 1 else 1 / (1 - p)
    noise = F.dropout(torch.ones_like(x), p)
    scale = 0.0 if p == 1 else float(torch.ones((), dtype=x.dtype).div_(1 - p))
    return x * noise, noise != 0, scale


def _is_row_major(weight: Tensor) -> bool:
    return weight.stride() == (weight.shape[1], 1)
