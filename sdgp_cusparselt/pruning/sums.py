"""The ratio by which rescaled_magnitude makes up for what it took.

ratio = sum|x| / sum|kept|, both in float64 and their quotient rounded once, to float32 (float64 for
a float64 x); 1 where nothing was kept or a sum overflowed. A float64 sum of float32 numbers is as
good as exact, whatever the order, blocks or threads in which it was taken: for float16 it is exact.
"""

import torch
from torch import Tensor


def magnitude_sums(x: Tensor, dims: list[int]) -> Tensor:
    """Return float64 sums of |x| over dims, which stay with size 1."""
    size = x.abs() if x.element_size() > 1 else x.to(torch.float32).abs()
    return size.sum(dims, keepdim=True, dtype=torch.float64)


def rescale_ratio(total: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what kept values of dtype are multiplied with.

    Args:
        total: float64 sums of the magnitudes of all elements.
        kept: float64 sums of those that were kept, like total.
        dtype: of the elements.

    Returns:
        float32, or float64 for float64, like total.
    """
    ratio = total / kept
    ratio = torch.where(torch.isfinite(ratio) & (kept > 0), ratio, torch.ones_like(ratio))
    return ratio.to(torch.float64 if dtype == torch.float64 else torch.float32)


def scaled(kept: Tensor, ratio: Tensor) -> Tensor:
    """Return kept * ratio, rounded once to kept's dtype; kept itself may be overwritten."""
    if kept.dtype == ratio.dtype:
        return kept.mul_(ratio)
    return (kept.to(ratio.dtype) * ratio).to(kept.dtype)
