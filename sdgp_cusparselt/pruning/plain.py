"""Which members of a group are kept, in plain torch: any n of m, any dtype, any device.

Everything here is deterministic on every device: sums and running sums are of integers.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt.pruning.bits import SUBSETS, magnitude_bits, overflows, where

#: mvue's sizes are whole numbers of this part of the largest: sums of 32, n times, fit 63 bits.
_UNIT = 2.0**-40


def prune_groups(
    groups: Tensor, at: int, method: str, n: int, generator: torch.Generator | None
) -> Tensor:
    """Return groups with at most n members of each kept, else +0.

    Args:
        groups: [..., m, ...] any float dtype, on any device.
        at: dimension of the m members.
        method: random, magnitude or mvue.
        n: kept members, 1 <= n < m.
        generator: source of random numbers; torch's own if None.

    Returns:
        Tensor like groups.
    """
    if method == "mvue":
        return _mvue(groups, at, n, generator)
    if method == "random":
        return where(_random_mask(groups, at, n, generator), groups)
    return where(largest_mask(magnitude_bits(groups), at, n), groups)


def largest_mask(keys: Tensor, at: int, n: int) -> Tensor:
    """Return the mask of the n largest keys along ``at``; on a tie the lowest index wins."""
    return _largest_of_four(keys, at, n) if keys.shape[at] == 4 else _top(keys, at, n)


def _largest_of_four(keys: Tensor, at: int, n: int) -> Tensor:
    """Return the mask of the n largest of four by the six comparisons between them."""
    k = keys.unbind(at)
    # beats[i][j]: member i goes before member j; on a tie the lower index does.
    beats: list[list[Tensor]] = [[k[0]] * 4 for _ in range(4)]
    for i in range(4):
        for j in range(i + 1, 4):
            beats[i][j] = k[i] >= k[j]
            beats[j][i] = ~beats[i][j]
    masks = []
    for i in range(4):
        a, b, c = (beats[i][j] for j in range(4) if j != i)
        masks.append(a & b & c if n == 1 else a | b | c if n == 3 else (a & b) | (c & (a | b)))
    return torch.stack(masks, at)


def _top(keys: Tensor, at: int, n: int) -> Tensor:
    """Return the mask of the n largest along ``at``; on a tie the lowest index wins."""
    if torch.compiler.is_compiling():
        return _rank(keys, at) < n
    threshold = keys.topk(n, dim=at, sorted=False).values.amin(at, keepdim=True)
    above, tied = keys > threshold, keys == threshold
    room = n - above.sum(at, keepdim=True)
    return above | (tied & (tied.cumsum(at) <= room))


def _rank(keys: Tensor, at: int) -> Tensor:
    """Return how many others go before each key: m comparisons each, but one pass if compiled."""
    mine, other = keys.unsqueeze(at + 1), keys.unsqueeze(at)
    place = torch.arange(keys.shape[at], device=keys.device)
    earlier = (place[None, :] < place[:, None]).view(
        -1, keys.shape[at], *[1] * (keys.ndim - at - 1)
    )
    return ((other > mine) | ((other == mine) & earlier)).sum(at + 1)


def _random_mask(groups: Tensor, at: int, n: int, generator: torch.Generator | None) -> Tensor:
    """Return the mask of n drawn elements, but of the n largest where one is Inf or NaN."""
    shape = list(groups.shape)
    size = magnitude_bits(groups)
    overflow = overflows(size.amax(at, keepdim=True), groups.dtype)
    if shape[at] == 4:
        codes, count = SUBSETS[n]
        left = shape[:at] + shape[at + 1 :]
        pick = torch.randint(count, left, device=groups.device, **_source(generator))
        code = codes >> (4 * pick) & 15
        drawn = torch.stack([(code >> i & 1).bool() for i in range(4)], at)
        return torch.where(overflow, _largest_of_four(size, at, n), drawn)
    keys = torch.randint(
        2**31 - 1, shape, dtype=torch.int32, device=groups.device, **_source(generator)
    )
    return _top(torch.where(overflow, size, keys), at, n)


def _source(generator: torch.Generator | None) -> dict[str, Any]:
    """Return the keyword of a generator; none for torch's own, which alone can be compiled."""
    return {} if generator is None else {"generator": generator}


def _mvue(groups: Tensor, at: int, n: int, generator: torch.Generator | None) -> Tensor:
    """Return the minimum-variance unbiased estimate of groups with n elements kept.

    Any sampling of exactly n elements with inclusion probabilities p is unbiased for x / p, and
    its variance sum x^2 (1/p - 1) depends on p alone; p proportional to |x|, capped at 1, is the
    minimum. An element whose share n |x| / sum|x| reaches 1 is sure: it is kept as it is, and the
    rest share what is left. Of these, as stretches on a line of length R, ``left`` are hit by
    points R / left apart (systematic sampling): no stretch is longer, so none is hit twice.
    Sizes are whole numbers, so that this holds exactly, not but for rounding.
    """
    wide = torch.float64 if groups.dtype == torch.float64 else torch.float32
    x = groups.to(wide)
    largest = x.abs().amax(at, keepdim=True)
    finite = torch.isfinite(largest)
    part = torch.where(finite & (largest > 0), largest, torch.ones_like(largest)) * _UNIT
    size = torch.where(finite, x.abs() / part, torch.zeros_like(x)).ceil().to(torch.int64)
    size = torch.maximum(size, (x != 0).to(torch.int64))
    sure = _sure(size, at, n)
    rest = size.masked_fill(sure, 0)
    total, left = rest.sum(at, keepdim=True), n - sure.sum(at, keepdim=True)
    u = torch.rand(total.shape, dtype=torch.float64, device=groups.device, **_source(generator))
    first = torch.minimum((u * total).to(torch.int64), (total - 1).clamp(min=0))
    # In units of part / left: the stretches, and points at first + i * total.
    end, length = rest.cumsum(at) * left, rest * left
    start = end - length
    passed = (start - first + total - 1).clamp(min=0) // total.clamp(min=1)  # points before start
    drawn = first + passed * total < end
    amount = total.to(wide) / left.clamp(min=1) * part
    estimate = torch.where(sure, x, torch.where(drawn, amount.copysign(x), torch.zeros_like(x)))
    by_magnitude = where(largest_mask(magnitude_bits(groups), at, n), groups)
    return where(finite, estimate.to(groups.dtype), by_magnitude)


def _sure(size: Tensor, at: int, n: int) -> Tensor:
    """Return where min(1, c * size) is 1 with c such that its sum over the group is n."""

    def step(sure: Tensor, _: int) -> Tensor:
        rest = size.masked_fill(sure, 0)
        left = n - sure.sum(at, keepdim=True)
        return sure | ((rest > 0) & (rest * left >= rest.sum(at, keepdim=True)))

    # Each round can only add sure elements, and n rounds reach the fixed point: a round that adds
    # none ends it, and once n are sure nothing is left to share.
    return reduce(step, range(n), torch.zeros_like(size, dtype=torch.bool))
