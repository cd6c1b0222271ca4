"""What makes a layer's grad_output, in plain torch: backward of activations and of cross-entropy.

    output of a layer -> activation -> (times up) -> (dropout) -> hidden
    grad_output = f(upstream, saved),  upstream: the gradient of hidden

These are the twins of what pack kernels compute before they prune: float32 inside (float64 for
float64), one rounding to the dtype at the end. Which roundings autograd of the unfused layers makes
that are saved here:

- gelu, gelu_tanh, silu: none, autograd computes them so as well. relu, relu_squared: none, equal to
  the bit.
- a dropout mask: that of upstream * mask * scale.
- gated: of the first gradient that of upstream * up; of the second that of act(pre), which the
  forward rounded before it multiplied.
- cross_entropy: that of the logarithms of the probabilities, unless the logits were float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sdgp_cusparselt.errors import value_error

#: Elements whose float32 copies exist at a time.
_CHUNK = 1 << 22

_aten = torch.ops.aten


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu": F.relu,
    "relu_squared": _relu_squared,
}
#: Activations that have a twin, by name.
ACTIVATIONS = tuple(_FORWARD)


def forward(
    activation: str,
    pre: Tensor,
    up: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Return what the unfused layers give, by the calls that they make: equal to the bit.

    hidden = act(pre) * up * mask * scale, without the factors that are not given

    Args:
        activation: one of ``ACTIVATIONS``.
        pre: [..., K], output of the layer that is followed by the activation.
        up: [..., K], what a gated one multiplies it by, or None.
        mask: [..., K] bool or uint8, 1 where dropout kept, or None.
        scale: 1 / (1 - p) of dropout.

    Returns:
        [..., K] of pre's dtype.

    Raises:
        ValueError: an activation without a twin.
    """
    hidden = _known("forward", activation)(pre)
    if up is not None:
        hidden = hidden * up
    if mask is not None:
        hidden = hidden.mul(mask).mul_(scale)
    return hidden


def gradient(
    activation: str,
    upstream: Tensor,
    pre: Tensor,
    up: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """Return the gradient of pre and, if gated, of up: float32 inside, rounded once.

    d = upstream [* mask * scale];  grad_pre = d [* up] * act'(pre);  grad_up = d * act(pre)

    Args:
        activation: one of ``ACTIVATIONS``.
        upstream: [..., K], gradient of hidden.
        pre, up, mask, scale: see ``forward``.

    Returns:
        (grad_pre,) or (grad_pre, grad_up): contiguous [..., K] of upstream's dtype.

    Raises:
        ValueError: an activation without a twin.
    """
    _known("gradient", activation)
    if up is None and mask is None and activation != "relu_squared":
        # Already float32 inside, and rounded once.
        return (_activation_backward(activation, upstream, pre).contiguous(),)

    def part(g: Tensor, x: Tensor, u: Tensor | None, m: Tensor | None) -> tuple[Tensor, ...]:
        wide, x = _wide(g), _wide(x)
        if m is not None:
            wide = wide * m * scale
        if u is None:
            return (_activation_backward(activation, wide, x),)
        first = _activation_backward(activation, wide * _wide(u), x)
        return first, wide * _FORWARD[activation](x)

    return _by_rows(part, 1 if up is None else 2, upstream, pre, up, mask)


def cross_entropy_gradient(
    logits: Tensor,
    lse: Tensor,
    target: Tensor,
    row_scale: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    first: int = 0,
    vocabulary: int | None = None,
) -> Tensor:
    """Return the gradient of the logits under cross-entropy with label smoothing and z-loss.

    g[i, j] = row_scale[i] * (exp(logits[i, j] - lse[i]) * (1 + 2 * z_loss * lse[i])
                              - (1 - eps) * [first + j = target[i]] - eps / V)
    eps = label_smoothing

    Args:
        logits: [M, C], all classes or a slice of them; rows may lie further apart.
        lse: [M] float32, logsumexp of each whole row.
        target: [M] int64 or int32. Not looked at where row_scale is 0; a class outside the slice
            is in no column.
        row_scale: [M] float32: what a row's loss weighs times the gradient of the loss. Where it is
            0 the row is zero whatever the logits are: so are ignored rows.
        label_smoothing: eps, 0 to 1.
        z_loss: what lse**2 weighs in the loss.
        first: the class of column 0.
        vocabulary: V, all classes; C if None.

    Returns:
        [M, C] of the logits' dtype, contiguous.
    """

    classes = logits.shape[1]
    vocabulary = classes if vocabulary is None else vocabulary

    def part(x: Tensor, m: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        kept, wide = s != 0, _wide(x)
        m, s = m.to(wide.dtype), s.to(wide.dtype)
        # A row that is ignored may hold anything, and have a target that is no class.
        m, column = torch.where(kept, m, 0.0), t.long() - first
        here = kept & (column >= 0) & (column < classes)
        g = torch.where(kept[:, None], wide - m[:, None], -torch.inf).exp_()
        g.mul_((s * (1 + 2 * z_loss * m))[:, None])
        if label_smoothing:
            g.sub_((s * (label_smoothing / vocabulary))[:, None])
        hit = torch.where(here, s * (label_smoothing - 1), 0.0)
        return (g.scatter_add_(1, torch.where(here, column, 0)[:, None], hit[:, None]),)

    return _by_rows(part, 1, logits, lse, target, row_scale)[0]


@dataclass(slots=True, eq=False)
class ActivationBackward:
    """What makes the grad_output of a layer that an activation follows; of two if gated.

    Attributes:
        activation: one of ``ACTIVATIONS``.
        upstream: [..., K], gradient of hidden.
        pre, up, mask, scale: see ``forward``.
    """

    activation: str
    upstream: Tensor
    pre: Tensor
    up: Tensor | None = None
    mask: Tensor | None = None
    scale: float = 1.0

    def gradients(self) -> tuple[Tensor, ...]:
        """Return ``gradient`` of these."""
        return gradient(self.activation, self.upstream, self.pre, self.up, self.mask, self.scale)


@dataclass(slots=True, eq=False)
class CrossEntropyBackward:
    """What makes the grad_output of a head: see ``cross_entropy_gradient``.

    Attributes:
        logits: [M, C].
        lse: [M] float32.
        target: [M] int64 or int32.
        row_scale: [M] float32, 0 where a row is ignored.
        label_smoothing: eps.
        z_loss: what lse**2 weighs.
        first: the class of column 0.
        vocabulary: all classes; C if None.
    """

    logits: Tensor
    lse: Tensor
    target: Tensor
    row_scale: Tensor
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    first: int = 0
    vocabulary: int | None = None

    def gradients(self) -> tuple[Tensor, ...]:
        """Return ``cross_entropy_gradient`` of these, alone in a tuple."""
        return (
            cross_entropy_gradient(
                self.logits,
                self.lse,
                self.target,
                self.row_scale,
                label_smoothing=self.label_smoothing,
                z_loss=self.z_loss,
                first=self.first,
                vocabulary=self.vocabulary,
            ),
        )


#: Whatever makes a grad_output.
Producer = ActivationBackward | CrossEntropyBackward


def _known(function: str, activation: str) -> Callable[[Tensor], Tensor]:
    if activation not in _FORWARD:
        rule = f"one of {', '.join(ACTIVATIONS)}"
        raise value_error(function, "activation", rule, repr(activation), "Leave it unfused.")
    return _FORWARD[activation]


def _activation_backward(activation: str, g: Tensor, x: Tensor) -> Tensor:
    """Return g * act'(x), in their dtype."""
    found: Tensor
    if activation == "gelu":
        found = _aten.gelu_backward(g, x, approximate="none")
    elif activation == "gelu_tanh":
        found = _aten.gelu_backward(g, x, approximate="tanh")
    elif activation == "silu":
        found = _aten.silu_backward(g, x)
    else:
        g = g * (2 * F.relu(x)) if activation == "relu_squared" else g
        # As autograd has it: the gradient passes where x is NaN.
        found = torch.where(x <= 0, 0.0, g)
    return found


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _by_rows(
    part: Callable[..., tuple[Tensor, ...]], count: int, first: Tensor, *others: Tensor | None
) -> tuple[Tensor, ...]:
    """Return ``count`` results of part, computed for some rows at a time to bound its copies."""
    found: tuple[Tensor, ...]
    if torch.compiler.is_compiling() or first.ndim < 2 or first.numel() <= _CHUNK:
        found = tuple(y.to(first.dtype) for y in part(first, *others))
        return tuple(y.contiguous() for y in found)
    leading = first.shape[:-1]
    lines = first.shape[:-1].numel()
    flat = [None if x is None else x.reshape(lines, *x.shape[len(leading) :])
            for x in (first, *others)]  # fmt: skip
    found = tuple(first.new_empty(first.shape) for _ in range(count))
    step = max(1, _CHUNK // max(1, first.shape[-1]))
    for start in range(0, lines, step):
        rows = [None if x is None else x[start : start + step] for x in flat]
        for whole, piece in zip(found, part(*rows), strict=True):
            whole.view(lines, -1)[start : start + step].copy_(piece)
    return found
