"""Philox random subsets in plain torch, bit for bit what the kernel draws.

A counter is the number of a run of four groups in the operand, so that a draw depends on the
seeds, the operand's shape and the place of the group, and on nothing else: not on the tile size,
the chunk size or the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

# Every 4-bit mask with two bits set, one per hexadecimal digit.
SUBSETS = 0xCA9653
# A uniform number has 22 bits, so that u * h + h < 2 h survives rounding in fp32.
UNIFORM_BITS = 22

Four = tuple[Tensor, ...]


def philox(counter: Tensor, seeds: Tensor, stream: int) -> list[Tensor]:
    """Return four 32-bit words per counter (Philox4x32-10).

    Args:
        counter: int64, any shape; its two halves are counter words 0 and 1.
        seeds: int64 [2]: the key, and an offset whose low 63 bits are counter words 2 and 3.
        stream: 0 or 1, in the top bit of word 3.

    Returns:
        list of four int64 tensors of counter's shape, each element in [0, 2**32).

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    key, offset = seeds[0], seeds[1]
    k0, k1 = key & _LOW, key >> 32 & _LOW
    c0, c1 = counter & _LOW, counter >> 32 & _LOW
    c2 = (offset & _LOW).expand_as(c0)
    c3 = ((offset >> 32 & 0x7FFFFFFF) | stream << 31).expand_as(c0)
    for _ in range(ROUNDS):
        # int64 products wrap like unsigned ones, so both halves come out right.
        low, high = _ROUND_A * c0, _ROUND_B * c2
        c0, c1, c2, c3 = (
            (high >> 32 & _LOW) ^ c1 ^ k0,
            high & _LOW,
            (low >> 32 & _LOW) ^ c3 ^ k1,
            low & _LOW,
        )
        k0, k1 = k0 + _KEY_A & _LOW, k1 + _KEY_B & _LOW
    return [c0, c1, c2, c3]


def group_words(rows: int, groups: int, first_row: int, seeds: Tensor, stream: int) -> Tensor:
    """Return one 32-bit word per group, int64 [rows, groups]; groups is a multiple of four."""
    device = seeds.device
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    quad = torch.arange(groups // 4, device=device)[None, :]
    words = philox(row * (groups // 4) + quad, seeds, stream)
    return torch.stack(words, -1).view(rows, groups)


def random_subsets(rows: int, groups: int, first_row: int, seeds: Tensor, stream: int) -> Four:
    """Return bool masks of a uniform two-subset of each group."""
    pick = group_words(rows, groups, first_row, seeds, stream) * 6 >> 32
    subset = torch.full_like(pick, SUBSETS) >> 4 * pick
    return tuple((subset >> i & 1).to(torch.bool) for i in range(4))


@dataclass(frozen=True)
class MvueDraw:
    """What mvue keeps: bits per member, and where the group's sums were finite."""

    bits: Four
    usable: Tensor


def mvue_bits(x: Four, dtype: torch.dtype, first_row: int, seeds: Tensor, stream: int) -> MvueDraw:
    """Return the minimum-variance unbiased estimate of each group with two elements kept.

    With S = sum |a|, m = max |a| and T = S - m: if m < T every a[i] is kept with probability
    2 |a[i]| / S as S / 2; else the largest is kept as it is, and one of the others with
    probability |a[i]| / T as T. Signs are the elements'. Which pairs occur is free as long as
    each element has its probability: one uniform number u picks the two elements whose
    stretches of the line [0, 2 h) hold u h and u h + h (systematic sampling).

    Args:
        x: four members [rows, groups] as integer bits of dtype.
        dtype: float dtype of the bits.
        first_row: number of the first row in the operand.
        seeds: int64 [2], see ``philox``.
        stream: 0 or 1, see ``philox``.

    Returns:
        MvueDraw: bits with +0 where not kept; not usable where an element or a sum is not finite
        (there the caller prunes by magnitude, so that an overflow stays visible).

    Source: Chmiel et al. (arXiv 2203.10991), the 2:4 estimator.
    """
    sizes = [member.view(dtype).to(torch.float32).abs() for member in x]
    largest = _largest(sizes)
    zero = torch.zeros_like(sizes[0])
    rest = [torch.where(m, zero, s) for m, s in zip(largest, sizes, strict=True)]
    others = ((rest[0] + rest[1]) + rest[2]) + rest[3]
    peak = torch.maximum(torch.maximum(sizes[0], sizes[1]), torch.maximum(sizes[2], sizes[3]))
    shared = peak < others
    length = [
        torch.where(shared, s + s, torch.where(m, others, s))
        for m, s in zip(largest, sizes, strict=True)
    ]
    ends = [length[0], length[0] + length[1]]
    ends += [ends[1] + length[2]]
    ends += [ends[2] + length[3]]
    half = ends[3] * 0.5
    rows, groups = x[0].shape
    word = group_words(rows, groups, first_row, seeds, stream)
    uniform = (word >> 32 - UNIFORM_BITS).to(torch.float32) * 2.0**-UNIFORM_BITS
    below_half = torch.where(half > 0, half.view(torch.int32) - 1, 0).view(torch.float32)
    first = torch.minimum(uniform * half, below_half)
    second = first + half
    amount = torch.where(shared, half * 0.5, others)
    sign = -0x80 if dtype.itemsize == 1 else -0x8000
    bits, start = [], zero
    for i, member in enumerate(x):
        hit = ((start <= first) & (first < ends[i])) | ((start <= second) & (second < ends[i]))
        estimate = amount.to(dtype).view(member.dtype) | member & sign
        sure = largest[i] & ~shared
        estimate = torch.where(sure, member, estimate)
        magnitude = estimate & ~sign
        bits.append(
            torch.where((hit | sure) & (magnitude != 0), estimate, torch.zeros_like(estimate))
        )
        start = ends[i]
    return MvueDraw(tuple(bits), torch.isfinite(peak) & torch.isfinite(ends[3]))


def _largest(sizes: list[Tensor]) -> list[Tensor]:
    """Return bool masks of the largest of four; on a tie the lowest index."""
    s0, s1, s2, s3 = sizes
    is0 = (s0 >= s1) & (s0 >= s2) & (s0 >= s3)
    is1 = ~is0 & (s1 >= s2) & (s1 >= s3)
    is2 = ~is0 & ~is1 & (s2 >= s3)
    return [is0, is1, is2, ~is0 & ~is1 & ~is2]
