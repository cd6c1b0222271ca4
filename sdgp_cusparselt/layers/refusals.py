"""What the backward passes of this package refuse: second derivatives, and batches of gradients."""

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import Function

from sdgp_cusparselt.errors import SDGPError

INSTEAD = (
    "Use sdgp.set_enabled_(model, False) or SDGPConfig(prune='none') where that is needed: layers "
    "that do not prune are torch's own."
)
_NO_DOUBLE_BACKWARD = (
    "SDGP: a second derivative was asked for, but a pruned gradient is not the derivative of any "
    f"function. {INSTEAD}"
)
_NO_BATCHED_GRADIENTS = (
    "SDGP: a pruned layer takes one gradient at a time, not a batch of them as is_grads_batched, "
    f"jacrev and vmap over gradients make them. {INSTEAD}"
)


def check_one_gradient(grad_output: Tensor, why: str = _NO_BATCHED_GRADIENTS) -> None:
    """Raise SDGPError where vmap maps over a gradient, at whatever depth of other transforms."""
    x = grad_output
    is_batched = _functorch.is_legacy_batchedtensor(x)
    while not is_batched and _functorch.is_functorch_wrapped_tensor(x):
        is_batched, x = _functorch.is_batchedtensor(x), _functorch.get_unwrapped(x)
    if is_batched:
        raise SDGPError(why)


def once(
    ctx: Any, grad_output: Tensor, *grads: Tensor | None, why: str = _NO_DOUBLE_BACKWARD
) -> tuple[Tensor | None, ...]:
    """Return grads; with create_graph=True, such that differentiating them raises.

    Args:
        ctx: of the autograd function, for its saved tensors.
        grad_output: what its backward was given.
        grads: what its backward returns.
        why: message of the SDGPError.
    """
    if not torch.is_grad_enabled():
        return grads
    sources = (grad_output, *ctx.saved_tensors)
    anchor = next((t for t in sources if t is not None and t.requires_grad), None)
    if anchor is None:
        return grads
    present = [g for g in grads if g is not None]
    guarded = iter(_NoDoubleBackward.apply(why, anchor, *present))  # type: ignore[no-untyped-call]
    return tuple(None if g is None else next(guarded) for g in grads)


class _NoDoubleBackward(Function):
    """Hands gradients through and raises when they are differentiated."""

    @staticmethod
    def forward(why: str, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.why = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise SDGPError(ctx.why)
