"""The mask of a layer's weight: a buffer beside the Parameter, and the dense masked products.

Interim: the products come from torch, with the weight masked densely.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sdgp_cusparselt.errors import type_error, value_error
from sdgp_cusparselt.pruning.bits import magnitude_bits
from sdgp_cusparselt.pruning.plain import largest_mask

MASK, MASK_T = "weight_mask", "weight_mask_t"


def groups_along(layer: nn.Module) -> tuple[int, int]:
    """Return the dims of the Parameter along which groups of the forward and the backward run."""
    return (1, 0) if isinstance(layer, nn.Linear | nn.Conv2d) else (0, 1)


def set_weight_mask_(
    layer: nn.Module, mask: Tensor, mask_t: Tensor | None = None, *, check: bool = True
) -> None:
    """Register or overwrite the mask buffers of a layer."""
    weight: Any = layer.weight
    for name, given in ((MASK, mask), (MASK_T, mask_t)):
        if given is None:
            layer._buffers.pop(name, None)
            continue
        if given.dtype != torch.bool:
            raise type_error("set_weight_mask_", name, "bool", given.dtype, "Use mask.bool().")
        if given.shape != weight.shape:
            rule, got = f"of the weight's shape {tuple(weight.shape)}", tuple(given.shape)
            raise value_error("set_weight_mask_", name, rule, got, "True keeps a weight.")
        held = layer._buffers.get(name)
        if held is None:
            layer.register_buffer(name, given.to(weight.device))
        else:
            held.copy_(given)


def clear_weight_mask_(layer: nn.Module) -> None:
    """Remove the buffers."""
    for name in (MASK, MASK_T):
        layer._buffers.pop(name, None)


def weight_mask(layer: nn.Module) -> Tensor | None:
    """Return the mask of a layer's weight, or None."""
    return layer._buffers.get(MASK)


class _Masked(torch.autograd.Function):
    """where(mask, weight, beta * weight); the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, beta: float) -> Tensor:
        return torch.where(mask, weight, weight * beta if beta else torch.zeros_like(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _Swap(torch.autograd.Function):
    """input, but its gradient is that of a product with another weight."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, other: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def _by_magnitude(weight: Tensor, n: int, m: int, dim: int) -> Tensor:
    keys = magnitude_bits(weight.detach().contiguous())
    groups = torch.unflatten(keys, dim, (-1, m))
    return largest_mask(groups, dim + 1, n).flatten(dim, dim + 1)


def straight_through(layer: Any) -> Tensor:
    """Return the masked weight of a layer, differentiable straight through."""
    config, mask = layer.sdgp_config, weight_mask(layer)
    if mask is None:
        mask = _by_magnitude(layer.weight, config.weight_n, config.weight_m, groups_along(layer)[0])
    masked: Tensor = _Masked.apply(layer.weight, mask, config.weight_beta)  # type: ignore[no-untyped-call]
    return masked


def effective_weight(layer: Any) -> Tensor:
    """Return the dense masked weight that the products use now."""
    return (
        straight_through(layer).detach()
        if layer.sdgp_config.masks_weight
        else layer.weight.detach()
    )


def masked_forward(layer: Any, input: Tensor, product: Any) -> Tensor:
    """Return product(input, weight) with the masked weight, both ways where so configured."""
    weight = straight_through(layer)
    if layer.sdgp_config.grad_input != "weight":
        return product(input, weight, layer.bias)
    config, dim = layer.sdgp_config, groups_along(layer)[1]
    kept = weight.detach()
    twice = kept * _by_magnitude(kept, config.weight_n, config.weight_m, dim)
    # grad of the input by the other product, grad of the weight by this one.
    exact, other = product(input.detach(), weight, layer.bias), product(input, twice, None)
    return _Swap.apply(exact, other)  # type: ignore[no-untyped-call,no-any-return]
