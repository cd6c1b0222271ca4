"""Which of four are kept, and what they are worth: ranking and sampling, as device functions.

A group is two words, ``low`` = x1:x0 and ``high`` = x3:x2. What is kept is named by a selector:
its low half-word holds, as four nibbles, the bytes of high:low that ``halves.permute`` takes, so
that one instruction moves both values; its top four bits are the metadata nibble i | j << 2.
``sampling`` and ``reference`` are what each function must equal, bit for bit.
"""

import triton
import triton.language as tl

from sdgp_cusparselt.packing.halves import (
    beside,
    permute,
    raise_to,
    round_halves,
    sizes_of,
    without_negative_zero,
)

# A group that is 2:4 already loses nothing to magnitude, so "none" needs no code of its own.
MAGNITUDE = tl.constexpr(1)
RESCALED = tl.constexpr(2)
# From here on methods draw.
RANDOM = tl.constexpr(3)
MVUE = tl.constexpr(4)

# Halves of selectors: the first kept is 0, 1 or 2; the second is 1, 2 or 3. Or-ed, they are whole.
FIRST_IS_0 = tl.constexpr(0x00000010)
FIRST_IS_1 = tl.constexpr(0x10000032)
FIRST_IS_2 = tl.constexpr(0x20000054)
SECOND_IS_1 = tl.constexpr(0x40003200)
SECOND_IS_2 = tl.constexpr(-0x7FFFAC00)
SECOND_IS_3 = tl.constexpr(-0x3FFF8A00)

# What ``drawn_two`` compares and selects. In one piece: left to itself, the compiler makes the
# comparisons of many groups first, and pays as much again to keep more of them than it has
# predicates for.
PTX_DRAWN_TWO = tl.constexpr(
    """{ .reg .pred p, q; .reg .b32 a, b;
    setp.lt.f32 q, $1, $4;
    selp.b32 a, 0x10000032, 0x20000054, q;
    setp.gt.and.f32 q, $2, $7, q;
    setp.gt.and.f32 q, $6, 0f00000000, q;
    selp.b32 b, 0x80005400, 0xC0007600, q;
    setp.lt.f32 p, $1, $3;
    selp.b32 a, 0x00000010, a, p;
    setp.gt.and.f32 p, $2, $5, p;
    selp.b32 b, 0x40003200, b, p;
    or.b32 $0, a, b; }"""
)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _smaller(a, b):
    """The smaller of two sizes, as integers: with NaN the largest, on every device alike."""
    return _float(tl.minimum(a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)))


@triton.jit
def _larger(a, b):
    return _float(tl.maximum(a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)))


@triton.jit
def _by_magnitude(low, high, N: tl.constexpr):
    """The selector of the N largest by a tournament, and whether the first is it (N = 1).

    A tie goes to the lower index. Keys are |x| in the upper half of a word. No key of a zero wins
    against ONE, so that a group with fewer than N non-zeros names the library's pair: (0, 3) of
    x000, (2, 3) of 0000.
    """
    ONE: tl.constexpr = 0x10000
    k0, k1 = (low & 0x7FFF) << 16, low & 0x7FFF0000
    k2, k3 = (high & 0x7FFF) << 16, high & 0x7FFF0000
    first01 = k0 >= tl.maximum(k1, ONE)
    first23 = k2 >= tl.maximum(k3, ONE)
    top01, top23 = tl.maximum(k0, k1), tl.maximum(k2, k3)
    if N == 1:
        from_left = top01 >= tl.maximum(top23, ONE)
        left = tl.where(first01, FIRST_IS_0, FIRST_IS_1)
        selector = tl.where(from_left, left, FIRST_IS_2) | SECOND_IS_3
        return selector, from_left | first23
    else:
        both01 = tl.minimum(k0, k1) >= tl.maximum(top23, ONE)
        both23 = tl.maximum(tl.minimum(k2, k3), ONE) > top01
        one_each = tl.where(first01, FIRST_IS_0, FIRST_IS_1)
        one_each |= tl.where(first23, SECOND_IS_2, SECOND_IS_3)
        selector = tl.where(both01, FIRST_IS_0 | SECOND_IS_1, one_each)
        return tl.where(both23, FIRST_IS_2 | SECOND_IS_3, selector), first01


@triton.jit
def _at_random(word, N: tl.constexpr):
    """The selector of a uniform N-subset from 16 random bits, and whether the first is it."""
    if N == 1:
        pick = word >> 14
        selector = tl.where(pick == 0, FIRST_IS_0, tl.where(pick == 1, FIRST_IS_1, FIRST_IS_2))
        return selector | SECOND_IS_3, pick < 3
    else:
        # The six nibbles with two different indices in order, one per hexadecimal digit.
        nibble = (0xEDC984 >> (((word * 6) >> 16) * 4)) & 15
        # Index i takes bytes 2 i and 2 i + 1: both nibbles of 0x22 i + 0x10.
        selector = ((nibble * 0x41) & 0x303) * 0x22 + 0x1010
        return selector | (nibble << 28), word == word


@triton.jit
def drawn_two(before, behind, a0, left_two, right_two, a2, a3, NATIVE: tl.constexpr):
    """The selector of the members that hold two points of a line, as ``sampling.mvue_two`` says.

    Args:
        before: float32, how far the first point lies behind the line's start.
        behind: how far the second lies before its end.
        a0, left_two, right_two, a2, a3: |x0|, |x0| + |x1|, |x2| + |x3|, |x2|, |x3|.
    """
    if NATIVE:
        return tl.inline_asm_elementwise(
            PTX_DRAWN_TWO, "=r,f,f,f,f,f,f,f",
            [before, behind, a0, left_two, right_two, a2, a3],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        is0, below2 = before < a0, before < left_two
        left = tl.where(is0, FIRST_IS_0, tl.where(below2, FIRST_IS_1, FIRST_IS_2))
        second_is_1 = (behind > right_two) & is0
        second_is_2 = (behind > a3) & below2 & (a2 > 0)
        right = tl.where(second_is_1, SECOND_IS_1, tl.where(second_is_2, SECOND_IS_2, SECOND_IS_3))
        return left | right


@triton.jit
def _by_mvue(a0, a1, a2, a3, word, N: tl.constexpr, NATIVE: tl.constexpr):
    """The selector of the drawn, whether the first is it (N = 1), and what each is worth.

    ``sampling.mvue_two`` and ``mvue_one`` say why. word: 128 + the random bits / 2**16, as bits.
    """
    uniform = _float(word) - 127.99999237060547
    left_two, right_two = a0 + a1, a2 + a3
    total = left_two + right_two
    if N == 1:
        point = uniform * total
        first_is_2 = point < left_two + a2
        selector = tl.where(point < left_two, FIRST_IS_1, FIRST_IS_2)
        selector = tl.where(point < a0, FIRST_IS_0, selector)
        return selector | SECOND_IS_3, first_is_2, total, total
    else:
        others = (_smaller(a0, a1) + _smaller(a2, a3)) + _smaller(_larger(a0, a1), _larger(a2, a3))
        half = _smaller(total * 0.5, others)
        before = uniform * half
        behind = half - before
        selector = drawn_two(before, behind, a0, left_two, right_two, a2, a3, NATIVE)
        return selector, before < a0, half, total


@triton.jit
def choose(
    low,
    high,
    scaled_low,
    scaled_high,
    word,
    METHOD: tl.constexpr,
    N: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The two values kept of each group, in one word, and the selector that named them.

    Args:
        low, high: int32, the group.
        scaled_low, scaled_high: int32, the same times the ratio, where METHOD is RESCALED.
        word: int32, where METHOD draws 16 random bits as ``quads.random_bits`` gives them.
    """
    if METHOD < RANDOM:
        selector, first = _by_magnitude(low, high, N)
        if METHOD == RESCALED:
            values = permute(scaled_low, scaled_high, selector, NATIVE)
        else:
            values = permute(low, high, selector, NATIVE)
        values = without_negative_zero(values)
        if N == 1:
            values &= tl.where(first, 0xFFFF, -0x10000)
    else:
        a0, a1 = sizes_of(low, DTYPE)
        a2, a3 = sizes_of(high, DTYPE)
        # total * 0 is +0, or NaN if any of the four is Inf or NaN: an overflow stays visible.
        if METHOD == MVUE:
            selector, first, worth, total = _by_mvue(a0, a1, a2, a3, word, N, NATIVE)
            kept = permute(low, high, selector, NATIVE)
            values = raise_to(kept, worth + total * 0.0, DTYPE, NATIVE)
        else:
            selector, first = _at_random(word, N)
            selector = beside(selector, low, NATIVE)
            kept = permute(low, high, selector, NATIVE)
            total = (a0 + a1) + (a2 + a3)
            values = kept | round_halves(total * 0.0, total * 0.0, DTYPE, NATIVE)
        if N == 1:
            values &= tl.where(first, 0xFFFF, -0x10000)
    return values, selector


@triton.jit
def spread(values, selector, NATIVE: tl.constexpr):
    """A group's two words again from its two values: what is not kept is +0."""
    nibble = (selector.to(tl.uint32, bitcast=True) >> 28).to(tl.int32)
    first, second = nibble & 3, nibble & 12
    zero = values * 0
    # Bytes 0 to 3 are the values', 4 is a byte of zero.
    low = tl.where(first == 0, 0x4410, tl.where(first == 1, 0x1044, 0x4444))
    low = tl.where(second == 4, 0x3210, low)
    high = tl.where(second == 8, 0x4432, tl.where(second == 12, 0x3244, 0x4444))
    high = tl.where(first == 2, 0x3210, high)
    return permute(values, zero, low, NATIVE), permute(values, zero, high, NATIVE)
