"""The mask of a layer's weight: buffers beside the Parameter, of its shape and in its memory.

weight_mask    bool, True where the products use the weight; without it the largest are kept
weight_mask_t  bool, what grad_input keeps of that along the outputs; without it the largest
"""

from typing import Any

import torch
from torch import Tensor, nn

from sdgp_cusparselt.backends.masking import INPUTS, OUTPUTS, masked
from sdgp_cusparselt.errors import type_error, value_error

MASK, MASK_T = "weight_mask", "weight_mask_t"


def groups_along(layer: nn.Module) -> tuple[int, int]:
    """Return the dimensions of the Parameter along which groups run.

    Returns:
        (that of the inputs, which output reduces; that of the outputs, which grad_input reduces):
        (1, 0) of nn.Linear and nn.Conv2d, (0, 1) of transformers' Conv1D.
    """
    return (INPUTS, OUTPUTS) if isinstance(layer, (nn.Linear, nn.Conv2d)) else (OUTPUTS, INPUTS)


def as_outputs_inputs(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a tensor that lies like a layer's weight as [outputs, inputs, ...]; a view."""
    return x if groups_along(layer)[0] == INPUTS else x.t()


def set_weight_mask_(
    layer: nn.Module, mask: Tensor, mask_t: Tensor | None = None, *, check: bool = True
) -> None:
    """Give a converted layer the mask of its weight; in place where it has one of that shape.

    Args:
        layer: with a weight, converted with ``forward="sparse_weight"``.
        mask: bool of the Parameter's shape, True where the weight is kept.
        mask_t: bool of the same shape: what grad_input keeps of the masked weight; the largest
            along the outputs if None.
        check: whether every group is counted, which waits for the device; False only for a mask
            that was made to fit.

    Raises:
        TypeError: a mask that is not bool.
        ValueError: a mask of another shape, or one that keeps more than n of a group of m. The
            layer is then unchanged.
    """
    weight: Any = layer.weight
    wanted = [(MASK, mask, groups_along(layer)[0])]
    if mask_t is not None:
        wanted.append((MASK_T, mask_t, groups_along(layer)[1]))
    for name, given, dim in wanted:
        if not isinstance(given, Tensor) or given.dtype != torch.bool:
            got = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise type_error("set_weight_mask_", name, "a bool tensor", got, "Use mask.bool().")
        if given.shape != weight.shape:
            rule, shape = f"of the weight's shape {tuple(weight.shape)}", tuple(given.shape)
            raise value_error("set_weight_mask_", name, rule, shape, "True keeps a weight.")
        if check:
            _check_groups(layer, name, given, dim)
    if mask_t is None:
        layer._buffers.pop(MASK_T, None)
    for name, given, _ in wanted:
        held = layer._buffers.get(name)
        if held is None or held.shape != given.shape or held.device != weight.device:
            layer.register_buffer(name, torch.empty_like(weight, dtype=torch.bool).copy_(given))
        else:
            held.copy_(given)


def clear_weight_mask_(layer: nn.Module) -> None:
    """Remove the masks of a layer's weight."""
    for name in (MASK, MASK_T):
        layer._buffers.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)


def weight_mask(layer: nn.Module) -> Tensor | None:
    """Return the mask of a layer's weight, or None where the largest are kept."""
    return layer._buffers.get(MASK)


def effective_weight(layer: Any) -> Tensor:
    """Return the weight that a converted layer's products use now, with its zeros.

    Returns:
        Tensor of the Parameter's shape and dtype, detached; the weight itself where nothing is
        pruned.
    """
    weight: Tensor = layer.weight.detach()
    if not layer.sdgp_config.masks_weight or not layer.sdgp_enabled:
        return weight
    mask = weight_mask(layer)
    mask = None if mask is None else as_outputs_inputs(layer, mask)
    return as_outputs_inputs(
        layer, masked(as_outputs_inputs(layer, weight), mask, layer.sdgp_config)
    )


def _check_groups(layer: Any, name: str, mask: Tensor, dim: int) -> None:
    config = getattr(layer, "sdgp_config", None)
    n, m = (2, 4) if config is None else (config.weight_n, config.weight_m)
    size = mask.shape[dim]
    if size % m:
        rule = f"of a weight whose dimension {dim} is a multiple of {m}"
        raise value_error("set_weight_mask_", name, rule, size, "Leave the layer dense.")
    kept = torch.unflatten(mask, dim, (-1, m)).sum(dim + 1)
    most = int(kept.max()) if kept.numel() else 0
    if most > n:
        fix = "Make it with weights.masks, or give the layer's configuration that pattern."
        raise value_error(
            "set_weight_mask_", name, f"{n}:{m} along dimension {dim}", f"{most} of {m}", fix
        )
