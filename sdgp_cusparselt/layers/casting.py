"""Casting operands as autocast casts those of torch's own products, each weight once.

torch keeps the copy of a weight that autocast made, so that a layer that is used three times casts
once and adds its three gradients in the low precision. Its cache cannot be reached from Python.
"""

import weakref

import torch
from torch import Tensor

#: id of a weight -> the weight, its copy, and the weight's version when it was copied.
_copies: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor], int]] = {}


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts operands on x's device; None where it is off."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # which meta has no answer to
        return None
    return torch.get_autocast_dtype(kind)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x as autocast casts it: every float but float64; a weight's copy is kept.

    Args:
        x: operand of a product.
        dtype: what ``autocast_dtype`` returned.
    """
    if x.dtype == dtype or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    if not _is_kept(x):
        return x.to(dtype)
    found = _copies.get(id(x))
    if found is not None:
        source, copy, version = found[0](), found[1](), found[2]
        if source is x and copy is not None and (copy.dtype, x._version) == (dtype, version):
            return copy
    copy = x.to(dtype)
    _copies[id(x)] = weakref.ref(x), weakref.ref(copy), x._version
    return copy


def forget() -> None:
    """Drop every kept copy; called in backward, after which weights change.

    A copy lives no longer than the graphs that saved it. This is for those that change a weight's
    memory without a word, as sharding does when it gathers it anew.
    """
    _copies.clear()


def _is_kept(x: Tensor) -> bool:
    """Whether torch's own cache would keep the copy of x."""
    return (
        x.dtype == torch.float32
        and x.requires_grad
        and x.is_leaf
        and not torch.compiler.is_compiling()
        and not x._is_view()
        and torch.is_autocast_cache_enabled()
    )
