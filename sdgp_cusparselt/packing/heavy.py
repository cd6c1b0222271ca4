"""Heavy tokens: the rows of largest norm exactly, as pairs of 2:4 rows.

x[r] = top(x[r]) + rest(x[r]), top the two largest of each group, rest the other two

Both are 2:4. Where r is heavy, row r of the packed operand holds ``top`` in place of a draw, and
``rest`` rides as an extra row whose product is added to that of row r. Every other row is drawn as
always. Which rows are heavy depends on their norms alone, not on what is drawn: the product stays
unbiased, whatever the capacity is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Rows of the library's structured operand are a multiple of this: padding is filled up first.
_MULTIPLE = 16


def heavy_capacity(rows: int, share: float) -> int:
    """Return how many rows of a gradient are computed exactly.

    The share of the rows, rounded up so that no row of the packed operand is padding; at most all.

    Args:
        rows: of the gradient.
        share: of them, 0 to 1.
    """
    if not share or not rows:
        return 0
    wanted = rows + math.ceil(share * rows - 1e-9)
    return min(rows, -(-wanted // _MULTIPLE) * _MULTIPLE - rows)


def row_energies(x: Tensor) -> Tensor:
    """Return the sum of squares of each row: [M, K] -> [M], float32, or float64 of float64."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.square().sum(dim=1)


def heaviest(energies: Tensor, count: int) -> Tensor:
    """Return the rows of largest energy in increasing order, without waiting for the device.

    NaN is the largest; on a tie the lower row is taken.

    Args:
        energies: [M], not negative.
        count: how many, at most M.

    Returns:
        int64 [count].
    """
    if not count:
        return torch.empty(0, dtype=torch.int64, device=energies.device)
    bits = energies.view(torch.int64 if energies.dtype == torch.float64 else torch.int32)
    bits = torch.where(energies.isnan(), torch.iinfo(bits.dtype).max, bits)
    least = bits.topk(count).values[-1]
    above, level = bits > least, bits == least
    room = count - above.sum()
    chosen = above | (level & (level.cumsum(0) <= room))
    # nonzero would wait for the device: the place of each row among the chosen is known instead.
    place = torch.where(chosen, chosen.cumsum(0) - 1, count)
    rows = torch.arange(len(bits), device=bits.device)
    return rows.new_empty(count + 1).index_copy_(0, place, rows)[:count]
