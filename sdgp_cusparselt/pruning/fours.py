"""What is kept of groups of four, on a core's cache: a few in-place passes over member planes.

The members of some groups lie in four rows, row i holding member i of each: every operation then
runs over adjacent memory, and one instruction works on as many groups as a vector register holds.
All of it in rows that the thread keeps (``scratch``), through views made once per number of
groups; what a method returns is overwritten by its next call.
"""

import torch
from torch import Tensor

from sdgp_cusparselt.pruning.bits import BITS, SUBSETS
from sdgp_cusparselt.pruning.scratch import kept, rows

#: Groups at a time: some megabytes of rows, about a core's cache.
CHUNK = 1 << 15
#: How far mvue's uniform number stays away from 0 and 1: more than the rounding of a few float32
#: sums, so that no point falls beside the stretch of an element that is sure to be kept.
MARGIN = 2.0**-21
_INFINITY = 0x7F80_0000  # of float32, as bits


class Ranks:
    """Ranks the members of ``count`` groups by their bits with the sign cleared.

    Args:
        count: groups, at most CHUNK.
        size: bytes of an element.

    Attributes:
        x: the members' bits; to be filled in.
        keys: the sign-cleared bits, once ``largest`` ran.
    """

    def __init__(self, count: int, size: int) -> None:
        dtype = BITS[size]
        base = rows("ranks", 18, CHUNK, dtype)[:, :count]
        self.x, self.keys, self.mask = base[0:4], base[4:8], base[8:12]
        self.beats0, self.beats1, self.beats2 = base[12:15], base[15:17], base[17]
        self.key, self.row = self.keys.unbind(0), self.mask.unbind(0)
        self.beat0, self.beat1 = self.beats0.unbind(0), self.beats1.unbind(0)
        self.later, self.latest, self.rows1, self.rows2 = (
            self.keys[1:], self.keys[2:], self.mask[1:], self.mask[2:]
        )  # fmt: skip
        self.clear, self.sign = torch.iinfo(dtype).max, torch.iinfo(dtype).bits - 1
        # Losses less n, if each comparison were lost by the earlier member of its pair.
        self.start = {
            n: torch.tensor([[3 - n], [2 - n], [1 - n], [-n]], dtype=dtype, device="cpu")
            for n in (1, 2, 3)
        }

    def largest(self, n: int) -> Tensor:
        """Return [4, count] with all bits set where x is among its group's n largest, else 0.

        NaN is largest, and on a tie the lower member stays.
        """
        torch.bitwise_and(self.x, self.clear, out=self.keys)
        torch.ge(self.key[0], self.later, out=self.beats0)
        torch.ge(self.key[1], self.latest, out=self.beats1)
        torch.ge(self.key[2], self.key[3], out=self.beats2)
        row, (b01, b02, b03), (b12, b13), b23 = self.row, self.beat0, self.beat1, self.beats2
        start = self.start[n]
        torch.sub(start[0], b01, out=row[0]).sub_(b02).sub_(b03)
        torch.add(self.beats0, start[1:], out=self.rows1)
        row[1].sub_(b12).sub_(b13)
        self.rows2.add_(self.beats1)
        row[2].sub_(b23)
        row[3].add_(b23)
        # Fewer than n losses are a negative number: its sign fills the mask.
        return self.mask.bitwise_right_shift_(self.sign)


class Subsets:
    """Draws n members of each of ``count`` groups, every subset alike.

    Args:
        count: groups, at most CHUNK.
        size: bytes of an element.
    """

    def __init__(self, count: int, size: int) -> None:
        base = rows("subsets", 6, CHUNK, torch.int32)[:, :count]
        self.pick, self.code, self.wide = base[0], base[1], base[2:6]
        dtype = BITS[size]
        self.mask = self.wide
        if dtype != torch.int32:
            self.mask = rows("subset masks", 4, CHUNK, dtype)[:, :count]
        self.codes = {n: _int32([codes]) for n, (codes, _) in SUBSETS.items()}
        self.to_sign = _int32([[31], [30], [29], [28]])

    def drawn(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Return [4, count] with all bits set where a member was drawn, else 0."""
        self.pick.random_(0, SUBSETS[n][1], generator=generator).mul_(4)
        torch.bitwise_right_shift(self.codes[n], self.pick, out=self.code)
        # Bit i of the code becomes the sign, and the shift back fills the word with it.
        torch.bitwise_left_shift(self.code, self.to_sign, out=self.wide).bitwise_right_shift_(31)
        return self.wide if self.mask is self.wide else self.mask.copy_(self.wide)


class Estimates:
    """Draws the minimum-variance unbiased estimate of ``count`` groups, one or two kept of four.

    The stretches of a group's members lie on a line of length L. One of four: a stretch is |x|,
    and the member in whose stretch a random point falls is kept as L. Two of four: with T the sum
    of the others, a stretch is min(|x|, T), so that none is longer than L / 2, and two points half
    a line apart fall into two of them, each with its probability min(1, 2 |x| / L). What is kept
    is at least L / 2; only an element that is sure to be kept, |x| >= T, is more.

    Args:
        count: groups, at most CHUNK.

    Attributes:
        x: float32 members; to be filled in.

    Source:
        Chmiel et al. (arXiv 2203.10991) for the probabilities; the line is systematic sampling.
    """

    def __init__(self, count: int) -> None:
        base = rows("estimates", 26, CHUNK, torch.float32)[:, :count]
        ints = base.view(torch.int32)
        self.x, self.size, self.ends = base[0:4], base[4:8], base[8:12]
        self.bits, self.size_bits, self.end_bits = ints[0:4], ints[4:8], ints[8:12]
        self.even, self.odd, self.end = self.size[0::2], self.size[1::2], self.ends.unbind(0)
        self.high, self.low, self.mask = base[12:14], base[14:16], ints[12:16]
        self.others, self.reach, self.half, self.first, self.second = base[16:21].unbind(0)
        self.point = ints[19:21].unbind(0)
        self.before, self.beyond = ints[21:24], ints[24:26]
        self.ends01, self.ends12, self.ends012 = ints[8:10], ints[9:11], ints[8:11]
        self.before01, self.before12, self.mask12 = ints[21:23], ints[22:24], ints[13:15]
        self.high0, self.high1 = self.high.unbind(0)
        self.low0, self.low1 = self.low.unbind(0)
        self.passed, self.passed_twice = self.before.unbind(0), self.beyond.unbind(0)
        self.mask0, self.mask3 = ints[12], ints[15]

    def drawn(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Return the float32 bits [4, count] of x's estimates with n of 1, 2 kept, else +0.

        Where an element or a sum of a group overflows, the group is pruned by magnitude.
        """
        torch.abs(self.x, out=self.size)
        amount = self._one(generator) if n == 1 else self._two(generator)
        infinite = max(int(self.size_bits.amax()), int(self.end_bits[3].amax())) >= _INFINITY
        if infinite:  # rare: what it costs does not matter
            bad = (self.size_bits.amax(0) >= _INFINITY) | (self.end_bits[3] >= _INFINITY)
            ranks = ranks_of(self.bits.shape[1], 4)
            by_magnitude = ranks.x.copy_(self.bits) & ranks.largest(n)
        torch.maximum(self.size, amount, out=self.size).copysign_(self.x)
        self.mask.bitwise_and_(self.size_bits)
        if infinite:
            self.mask.copy_(torch.where(bad, by_magnitude, self.mask))
        return self.mask

    def _two(self, generator: torch.Generator | None) -> Tensor:
        torch.maximum(self.even, self.odd, out=self.high)
        torch.minimum(self.even, self.odd, out=self.low)
        # T without knowing whose it is: of any but the largest, min(|x|, T) is |x|.
        torch.minimum(self.high0, self.high1, out=self.half)
        torch.add(self.low0, self.low1, out=self.others).add_(self.half)
        # Alone with three zeros an element would have no stretch, and be missed.
        torch.threshold(self.others, 0.0, torch.inf, out=self.reach)
        torch.minimum(self.size, self.reach, out=self.ends)
        self._add_up()
        torch.mul(self.end[3], 0.5, out=self.half)
        torch.minimum(self.half, self.others, out=self.half)
        self._draw(self.half, generator)
        torch.add(self.first, self.half, out=self.second)
        # Sizes are not negative, so their bits compare as they do. The members of the two points
        # are i = 0, 1 or 2 and j = i + 1, ... 3, so that rounding cannot make them the same.
        torch.lt(self.point[0], self.ends01, out=self.before01)
        torch.le(self.point[1], self.ends12, out=self.beyond).bitwise_and_(self.before01)
        self.passed[1].add_(self.passed_twice[0])
        torch.add(self.passed_twice[1], 1, out=self.passed[2])
        self._mark(2)
        return self.half

    def _one(self, generator: torch.Generator | None) -> Tensor:
        self.ends.copy_(self.size)
        self._add_up()
        self._draw(self.end[3], generator)
        torch.lt(self.point[0], self.ends012, out=self.before)
        self._mark(1)
        return self.end[3]

    def _add_up(self) -> None:
        """Turn the lengths of the stretches into their ends."""
        self.end[1].add_(self.end[0])
        self.end[2].add_(self.end[1])
        self.end[3].add_(self.end[2])

    def _draw(self, length: Tensor, generator: torch.Generator | None) -> None:
        self.first.uniform_(MARGIN, 1 - MARGIN, generator=generator).mul_(length)

    def _mark(self, points: int) -> None:
        """Set a member's mask where its end has more points before it than its start."""
        torch.neg(self.passed[0], out=self.mask0)
        torch.sub(self.before01, self.before12, out=self.mask12)
        torch.sub(self.passed[2], points, out=self.mask3)


def _int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def ranks_of(count: int, size: int) -> Ranks:
    """Return this thread's Ranks."""
    return kept((Ranks, count, size, CHUNK), lambda: Ranks(count, size))


def subsets_of(count: int, size: int) -> Subsets:
    """Return this thread's Subsets."""
    return kept((Subsets, count, size, CHUNK), lambda: Subsets(count, size))


def estimates_of(count: int) -> Estimates:
    """Return this thread's Estimates."""
    return kept((Estimates, count, CHUNK), lambda: Estimates(count))
