"""N:M pruning on any device: the truth that every kernel is tested against.

A group is m consecutive elements along ``dim``; a short last group behaves as if padded with
zeros. Magnitudes are compared as bits with the sign cleared, so NaN > Inf > finite, and on a tie
the lowest index wins. What is not kept becomes +0.0. A group that holds an Inf or a NaN is pruned
by magnitude under every method, so that an overflow stays visible.

mvue keeps exactly n of m, or what is not zero where that is less. The sums of rescaled_magnitude
are taken in float64, which for float32 and smaller numbers leaves nothing of their order, of blocks
or of threads once their ratio is rounded to float32 (see ``sums``). Every method runs in torch's
deterministic mode on every device: no sum whose order is left open, no running sum of floats.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdgp_cusparselt.config.patterns import check_pattern, checked_int
from sdgp_cusparselt.errors import type_error, value_error
from sdgp_cusparselt.pruning import cpu
from sdgp_cusparselt.pruning.bits import BITS, FLOAT_DTYPES
from sdgp_cusparselt.pruning.sums import magnitude_sums, rescale_ratio, scaled


def prune(
    x: Tensor,
    *,
    method: str = "magnitude",
    n: int = 2,
    m: int = 4,
    dim: int = -1,
    scale_dims: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep at most n of every m consecutive elements of x along dim; the rest becomes zero.

    magnitude:          y = x where |x| is among the n largest of its group, else 0
    rescaled_magnitude: y * sum|x| / sum|y|, float64 sums over ``scale_dims``
    random:             a uniform subset of n per group, values as they are
    mvue:               y[i] = x[i] / p[i] with probability p[i] = min(1, c * abs(x[i])), sum p = n

    Args:
        x: [...] any float dtype, any device, any strides. Not differentiated through.
        method: one of none, random, magnitude, rescaled_magnitude, mvue. Under random and mvue a
            group that holds Inf or NaN is pruned by magnitude, so that an overflow stays visible;
            the other groups draw what they would draw without it.
        n: kept elements per group, 1 <= n <= m.
        m: group size, at most 32.
        dim: dimension along which groups run: the reduction dimension of the product.
        scale_dims: dimensions that rescaled_magnitude sums over. By default every dimension but
            the first and ``dim`` (per sample and channel), and the tokens of a 2-D x.
        generator: source of random numbers for random and mvue; torch's own if None.

    Returns:
        Tensor of x's shape, dtype, device and memory format. x itself where nothing is pruned
        (method none, or n == m).

    Raises:
        ValueError: unknown method, n or m out of range, dim or scale_dims outside x.
        TypeError: x is not a float tensor, or n, m, dim are not integers.

    Source:
        SDGP (arXiv 2202.00774) for random, magnitude and rescaled_magnitude; Chmiel et al.
        (arXiv 2203.10991) for mvue, here for every n:m by systematic sampling.
    """
    check_tensor("prune", x)
    check_pattern("prune", method, n, m)
    dim = _checked_dim(x, dim)
    if method == "none" or n == m or x.numel() == 0:
        return x
    with torch.no_grad():
        if method == "rescaled_magnitude":
            return _rescaled(x, n, m, dim, _checked_scale_dims(x, dim, scale_dims))
        return _on_groups(x, m, dim, lambda g, at: _prune_groups(g, at, method, n, generator))


def check_tensor(function: str, x: object) -> None:
    """Raise TypeError unless x is a tensor of a float dtype that has a zero and a sign."""
    if not isinstance(x, Tensor):
        raise type_error(function, "x", "a torch.Tensor", type(x).__name__, "Convert it first.")
    if x.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise type_error(function, "x", f"of a dtype in ({names})", x.dtype, "Cast it first.")


def _checked_dim(x: Tensor, dim: int) -> int:
    checked_int("prune", "dim", dim)
    if not -x.ndim <= dim < x.ndim:
        rule = f"in {-x.ndim}..{x.ndim - 1} for a {x.ndim}-D x"
        raise value_error("prune", "dim", rule, dim, "Name one dimension of x.")
    return dim % x.ndim


def _checked_scale_dims(x: Tensor, dim: int, scale_dims: Sequence[int] | None) -> list[int]:
    if scale_dims is None:
        return default_scale_dims(x.ndim, dim)
    for d in scale_dims:
        if not -x.ndim <= checked_int("prune", "scale_dims", d) < x.ndim:
            rule = f"dimensions in {-x.ndim}..{x.ndim - 1}"
            raise value_error("prune", "scale_dims", rule, tuple(scale_dims), "See prune.")
    return sorted({d % x.ndim for d in scale_dims})


def default_scale_dims(ndim: int, dim: int) -> list[int]:
    """Return what the rescale ratio sums over: space or sequence, or the tokens of a 2-D x."""
    others = [d for d in range(ndim) if d != dim]
    return others if ndim <= 2 else others[1:] if dim != 0 else others


def _on_groups(x: Tensor, m: int, dim: int, fn: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Apply fn(groups, at) to x seen as [..., G, m, ...] with m at ``at``; keep x's strides."""
    order = _memory_order(x)
    in_order = order == list(range(x.ndim))
    physical, at = (x if in_order else x.permute(order)).contiguous(), order.index(dim)
    size = physical.shape[at]
    missing = -size % m
    if missing:
        pad = [0, 0] * (x.ndim - 1 - at) + [0, missing]
        physical = torch.nn.functional.pad(physical.view(BITS[x.element_size()]), pad)
        physical = physical.view(x.dtype)
    groups = torch.unflatten(physical, at, (-1, m))
    out = fn(groups, at + 1).flatten(at, at + 1)
    if missing:
        out = out.narrow(at, 0, size).contiguous()
    return out if in_order else out.permute([order.index(d) for d in range(x.ndim)])


def _memory_order(x: Tensor) -> list[int]:
    """Return the dimensions from the outermost in memory to the innermost."""
    strides = x.stride()
    if x.is_contiguous() or any(s == 0 for s in strides):
        return list(range(x.ndim))
    return sorted(range(x.ndim), key=lambda d: (-strides[d], d))


def _prune_groups(
    groups: Tensor, at: int, method: str, n: int, generator: torch.Generator | None
) -> Tensor:
    if cpu.takes(groups, at, method, n):
        return cpu.prune_fours(groups, at, method, n, generator)
    return cpu.prune_plainly(groups, at, method, n, generator)


def _rescaled(x: Tensor, n: int, m: int, dim: int, scale_dims: list[int]) -> Tensor:
    kept = _on_groups(x, m, dim, lambda g, at: _prune_groups(g, at, "magnitude", n, None))
    if not scale_dims:
        return kept
    total, kept_sum = (magnitude_sums(t, scale_dims) for t in (x, kept))
    return scaled(kept, rescale_ratio(total, kept_sum, x.dtype))
