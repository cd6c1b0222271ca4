"""What random and mvue draw, in plain torch, bit for bit as the kernels draw it.

A counter is a place: four rows and eight columns of x. One Philox call gives it four words, and
each group in it 16 bits: along features row r takes word r, the left group its low half; along
tokens columns 2 w and 2 w + 1 take word w, the even one its low half. So a draw depends on the
seeds, the direction and the place of the group, and on nothing else: not on the tile size, the
chunk size, the width of x or the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

Four = tuple[Tensor, ...]


def philox(counter: Four, key: tuple[Tensor, Tensor]) -> Four:
    """Return four 32-bit words per counter (Philox4x32-10).

    Args:
        counter: four int64 tensors that broadcast, each element in [0, 2**32).
        key: two int64 tensors, likewise.

    Returns:
        four int64 tensors, each element in [0, 2**32).

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
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
    return c0, c1, c2, c3


def place_words(quads: Tensor, octets: Tensor, seeds: Tensor, stream: int) -> Tensor:
    """Return the four words of each place, int64 [quads, octets, 4].

    Args:
        quads: int64 [Q], numbers of four rows of x.
        octets: int64 [O], numbers of eight columns of x.
        seeds: int64 [2]: the key, and an offset whose low 62 bits are counter words 2 and 3.
        stream: 0 along features, 1 along tokens. With it word 3 is at least 2**31, where no
            counter of torch's own kernels is.
    """
    key, offset = seeds[0], seeds[1]
    shape = (len(quads), len(octets))
    c0, c1 = octets[None, :].expand(shape), quads[:, None].expand(shape)
    top = (offset >> 32 & 0x3FFFFFFF) | (2 + stream) << 30
    counter = (c0, c1, (offset & _LOW).expand_as(c0), top.expand_as(c0))
    return torch.stack(philox(counter, (key & _LOW, key >> 32 & _LOW)), -1)


def group_bits(rows: int, groups: int, first_row: int, seeds: Tensor, stream: int) -> Tensor:
    """Return 16 random bits per group of an operand, int32 [rows, groups].

    Args:
        rows: rows of the operand, from first_row on.
        groups: groups per row, an even number.
        first_row: number of the first row.
        seeds: see ``place_words``.
        stream: 0 if the operand is x, 1 if it is x.T.
    """
    period = 8 if stream else 4
    lines = torch.arange(first_row // period, (first_row + rows - 1) // period + 1)
    lines = lines.to(seeds.device)
    across = torch.arange(groups if stream else groups // 2, device=seeds.device)
    if stream:
        words = place_words(across, lines, seeds, stream).permute(1, 2, 0)
        halves = torch.stack((words & 0xFFFF, words >> 16), 2)  # [octets, words, 2, groups]
    else:
        words = place_words(lines, across, seeds, stream).permute(0, 2, 1)
        halves = torch.stack((words & 0xFFFF, words >> 16), 3)  # [quads, words, groups / 2, 2]
    skip = first_row - first_row // period * period
    return halves.reshape(-1, groups)[skip : skip + rows].to(torch.int32)


@dataclass(frozen=True)
class Chosen:
    """Which members of each group were drawn: the first is 0, 1 or 2, the second 1, 2 or 3.

    With one kept of four it is the first, or the second where the first is 2 and ``only_second``.
    """

    is_0: Tensor
    is_1: Tensor
    second_is_1: Tensor
    second_is_2: Tensor
    only_second: Tensor | None = None

    def of(self, members: Four) -> tuple[Tensor, Tensor]:
        """Return the drawn members, in order; 0 for the one that is not kept of two."""
        x0, x1, x2, x3 = members
        first = torch.where(self.is_0, x0, torch.where(self.is_1, x1, x2))
        second = torch.where(self.second_is_1, x1, torch.where(self.second_is_2, x2, x3))
        return first, second

    def nibbles(self) -> Tensor:
        """Return first | second << 2, uint8."""
        first = 2 - self.is_1.to(torch.uint8) - 2 * self.is_0.to(torch.uint8)
        second = 3 - self.second_is_2.to(torch.uint8) - 2 * self.second_is_1.to(torch.uint8)
        return first | second << 2


def random_pair(bits: Tensor) -> Chosen:
    """Return a uniform pair of each group from 16 random bits.

    The six pairs in the order 01, 02, 12, 03, 13, 23; 2**16 is no multiple of six, so that their
    probabilities differ by 2**-16.
    """
    pick = bits * 6 >> 16
    is_1 = (pick == 2) | (pick == 4)
    is_2 = pick == 5
    return Chosen(~is_1 & ~is_2, is_1, pick == 0, (pick == 1) | (pick == 2))


def random_one(bits: Tensor) -> Chosen:
    """Return a uniform member of each group from 16 random bits."""
    pick = bits >> 14
    never = torch.zeros_like(pick, dtype=torch.bool)
    return Chosen(pick == 0, pick == 1, never, never, pick == 3)


def mvue_two(sizes: Four, bits: Tensor) -> tuple[Chosen, Tensor, Tensor]:
    """Return which two members of each group are kept, and what a member is worth at least.

    With S = sum |x|, m = max |x| and T = S - m, the others' sum: if m < T every member is kept
    with probability 2 |x| / S, and worth S / 2. Else the largest is sure and keeps its value, and
    one of the others is kept with probability |x| / T, and worth T. Both are systematic sampling:
    the members' stretches min(|x|, T) lie one after another on a line of length 2 h, where
    h = min(S / 2, T), and the two that hold u h and u h + h are kept. A stretch is at most h long,
    so that two different members are hit, and one of length h is hit for sure. In both cases a
    kept member is worth max(|x|, h), for h is S / 2, at least every |x|, or T.

    The first point lies u h behind the start, the second h - u h before the end, neither further
    than h, at most T: to say which member holds one, no stretch need be cut to T. That two are
    kept, and never three, follows from the comparisons alone, whatever their operands were
    rounded to: the second is 1 only if the first is 0, is 2 only if the first is 0 or 1, and else
    is 3. No member that is zero is taken for one that is not: a point is 16 bits and a half, so
    that it lies on no border of the line, and where h was rounded up past a3 next to a member 2
    of length zero, that member is passed over.

    Args:
        sizes: |x| of the four members, float32.
        bits: 16 random bits a group, int32.

    Returns:
        the members, h, and S, which is not finite where some |x| is not.

    Source: Chmiel et al. (arXiv 2203.10991), the 2:4 estimator; the probabilities are theirs.
    """
    a0, a1, a2, a3 = sizes
    left_two, right_two = a0 + a1, a2 + a3
    total = left_two + right_two
    others = (_smaller(a0, a1) + _smaller(a2, a3)) + _smaller(_larger(a0, a1), _larger(a2, a3))
    half = _smaller(total * 0.5, others)
    before = _uniform(bits) * half
    behind = half - before
    is_0, below_2 = before < a0, before < left_two
    second_is_1 = (behind > right_two) & is_0
    second_is_2 = (behind > a3) & below_2 & (a2 > 0) & ~second_is_1
    return Chosen(is_0, below_2 & ~is_0, second_is_1, second_is_2), half, total


def mvue_one(sizes: Four, bits: Tensor) -> tuple[Chosen, Tensor, Tensor]:
    """Return which member of each group is kept, with probability |x| / S, and S, its worth."""
    a0, a1, a2, a3 = sizes
    left_two, right_two = a0 + a1, a2 + a3
    total = left_two + right_two
    point = _uniform(bits) * total
    is_0 = point < a0
    is_1 = (point < left_two) & ~is_0
    never = torch.zeros_like(is_0)
    return Chosen(is_0, is_1, never, never, ~(point < left_two + a2)), total, total


def _uniform(bits: Tensor) -> Tensor:
    """Return (bits + 1 / 2) / 2**16, exactly."""
    return (bits | 0x43000000).view(torch.float32) - (128 - 2.0**-17)


def _smaller(a: Tensor, b: Tensor) -> Tensor:
    """Return the smaller of two sizes, as integers: with NaN the largest, on every device alike."""
    return torch.minimum(a.view(torch.int32), b.view(torch.int32)).view(torch.float32)


def _larger(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a.view(torch.int32), b.view(torch.int32)).view(torch.float32)
