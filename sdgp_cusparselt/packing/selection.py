"""Which two of four are kept: ranking, sampling and rounding, as device functions.

Tiles are int16: a kept element is moved, never converted. ``reference`` and ``sampling`` are what
each function must equal, bit for bit.
"""

import triton
import triton.language as tl

# A group that is 2:4 already loses nothing to magnitude, so "none" needs no code of its own.
MAGNITUDE = tl.constexpr(1)
RANDOM = tl.constexpr(2)
MVUE = tl.constexpr(3)
RESCALED = tl.constexpr(4)


@triton.jit
def split_groups(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] -> the four members of each group, [ROWS, COLS / 4] each."""
    low, high = tl.split(tl.reshape(tile, (ROWS, COLS // 4, 2, 2)))
    x0, x2 = tl.split(low)
    x1, x3 = tl.split(high)
    return x0, x1, x2, x3


@triton.jit
def _two_of_three(a, b, c):
    return (a & b) | (c & (a | b))


@triton.jit
def keep_two(k0, k1, k2, k3):
    """Masks of the two largest keys; on a tie the lower index wins."""
    b01, b02, b03 = k0 >= k1, k0 >= k2, k0 >= k3
    b12, b13, b23 = k1 >= k2, k1 >= k3, k2 >= k3
    keep0 = _two_of_three(b01, b02, b03)
    keep1 = _two_of_three(~b01, b12, b13)
    keep2 = _two_of_three(~b02, ~b12, b23)
    keep3 = _two_of_three(~b03, ~b13, ~b23)
    return keep0, keep1, keep2, keep3


@triton.jit
def _rank(bits, INDEX: tl.constexpr):
    """A uint32 that orders members as packing picks them: |x|, tie, then index and sign as cargo.

    A tie goes to the lower index, but among zeros to the higher one, and all zeros are +0: then
    the two top ranks of any group are the library's pair, (0, 3) of x000 and (2, 3) of 0000.
    """
    word = bits.to(tl.uint16, bitcast=True).to(tl.uint32)
    rank = (word << 17) | (word >> 15) | (((3 - INDEX) << 14) | (INDEX << 1))
    return tl.maximum(rank, (4 << 14) | (INDEX << 1))


@triton.jit
def top_two(x0, x1, x2, x3):
    """The two values of a group in column order, and its nibble: eight minima and maxima."""
    r0, r1, r2, r3 = _rank(x0, 0), _rank(x1, 1), _rank(x2, 2), _rank(x3, 3)
    high01, low01 = tl.maximum(r0, r1), tl.minimum(r0, r1)
    high23, low23 = tl.maximum(r2, r3), tl.minimum(r2, r3)
    best = tl.maximum(high01, high23)
    next_best = tl.maximum(tl.minimum(high01, high23), tl.maximum(low01, low23))
    # Rotated right by three, the index leads: a minimum and a maximum sort by column.
    best = (best >> 3) | (best << 29)
    next_best = (next_best >> 3) | (next_best << 29)
    left, right = tl.minimum(best, next_best), tl.maximum(best, next_best)
    nibble = (left >> 30) | ((right >> 28) & 12)
    return _cargo(left), _cargo(right), nibble.to(tl.int32)


@triton.jit
def _cargo(rank):
    """The element's bits inside a rotated rank."""
    return (rank >> 14).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _group_words(seeds_ptr, row0, group0, quads, STREAM, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """One 32-bit Philox word per group: a counter serves four neighbouring groups of a row."""
    seed = tl.load(seeds_ptr)
    offset = tl.load(seeds_ptr + 1)
    row = row0.to(tl.int64) + tl.arange(0, ROWS)[:, None]
    counter = row * quads + (group0 // 4 + tl.arange(0, GROUPS // 4)[None, :])
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    zero = c0 * 0
    c2 = zero + offset.to(tl.uint32)
    c3 = zero + ((offset >> 32) & 0x7FFFFFFF | STREAM << 31).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, GROUPS))


@triton.jit
def _keep_random(word):
    """Masks of a uniform two-subset; 0xCA9653 lists the six of them, a hexadecimal digit each."""
    subset = 0xCA9653 >> (4 * tl.umulhi(word, 6)).to(tl.int32)
    return (subset & 1) != 0, (subset & 2) != 0, (subset & 4) != 0, (subset & 8) != 0


@triton.jit
def _overflows(x0, x1, x2, x3, DTYPE: tl.constexpr):
    """Whether any of four is Inf or NaN: its exponent has every bit set."""
    EXPONENT: tl.constexpr = 0x7F80 if tl.bfloat16 == DTYPE else 0x7C00
    return (
        ((x0 & EXPONENT) == EXPONENT)
        | ((x1 & EXPONENT) == EXPONENT)
        | ((x2 & EXPONENT) == EXPONENT)
        | ((x3 & EXPONENT) == EXPONENT)
    )


@triton.jit
def widen(bits, DTYPE: tl.constexpr):
    """The float32 that 16 bits of DTYPE stand for."""
    if tl.bfloat16 == DTYPE:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def narrow(value, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """The 16 bits of value rounded to nearest even; not for NaN.

    Not NATIVE is for Triton's interpreter, which truncates where the hardware rounds.
    """
    if NATIVE or tl.float16 == DTYPE:
        return value.to(DTYPE).to(tl.int16, bitcast=True)
    else:
        wide = value.to(tl.int32, bitcast=True)
        return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def _mvue_member(bits, hit, sure, amount):
    """A hit gives the group's amount with the element's sign; a sure element gives itself."""
    drawn = amount | (bits & -0x8000)
    return tl.where(sure, bits, tl.where(hit, drawn, 0))


@triton.jit
def _hit(start, end, first, second):
    return ((start <= first) & (first < end)) | ((start <= second) & (second < end))


@triton.jit
def _mvue(x0, x1, x2, x3, word, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Systematic sampling of two members, as ``sampling.mvue_bits`` explains; last, its fitness.

    Every product below is exact or stands alone, and the launch forbids fused multiply-adds, so
    that each sum rounds as the reference's does.
    """
    s0, s1 = tl.abs(widen(x0, DTYPE)), tl.abs(widen(x1, DTYPE))
    s2, s3 = tl.abs(widen(x2, DTYPE)), tl.abs(widen(x3, DTYPE))
    is0 = (s0 >= s1) & (s0 >= s2) & (s0 >= s3)
    is1 = ~is0 & (s1 >= s2) & (s1 >= s3)
    is2 = ~is0 & ~is1 & (s2 >= s3)
    is3 = ~is0 & ~is1 & ~is2
    rest = tl.where(is0, 0.0, s0) + tl.where(is1, 0.0, s1)
    others = (rest + tl.where(is2, 0.0, s2)) + tl.where(is3, 0.0, s3)
    peak = tl.where(is0, s0, tl.where(is1, s1, tl.where(is2, s2, s3)))
    shared = peak < others
    end0 = tl.where(shared, s0 + s0, tl.where(is0, others, s0))
    end1 = end0 + tl.where(shared, s1 + s1, tl.where(is1, others, s1))
    end2 = end1 + tl.where(shared, s2 + s2, tl.where(is2, others, s2))
    end3 = end2 + tl.where(shared, s3 + s3, tl.where(is3, others, s3))
    half = end3 * 0.5
    uniform = (word >> 10).to(tl.float32) * 2.384185791015625e-07
    below = (half.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    first = tl.minimum(uniform * half, tl.where(half > 0, below, 0.0))
    second = first + half
    amount = narrow(tl.where(shared, half * 0.5, others), DTYPE, NATIVE)
    zero = half * 0.0
    y0 = _mvue_member(x0, _hit(zero, end0, first, second), is0 & ~shared, amount)
    y1 = _mvue_member(x1, _hit(end0, end1, first, second), is1 & ~shared, amount)
    y2 = _mvue_member(x2, _hit(end1, end2, first, second), is2 & ~shared, amount)
    y3 = _mvue_member(x3, _hit(end2, end3, first, second), is3 & ~shared, amount)
    usable = (peak < float("inf")) & (end3 < float("inf"))
    return y0, y1, y2, y3, usable


@triton.jit
def chosen(
    tile,
    scaled,
    seeds_ptr,
    row0,
    group0,
    quads,
    STREAM: tl.constexpr,
    METHOD: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The members of each group as bits, so that the two largest are what the method keeps."""
    x0, x1, x2, x3 = split_groups(tile, ROWS, COLS)
    if METHOD == RANDOM:
        word = _group_words(seeds_ptr, row0, group0, quads, STREAM, ROWS, COLS // 4)
        keep0, keep1, keep2, keep3 = _keep_random(word)
        whole = _overflows(x0, x1, x2, x3, DTYPE)
        x0, x1 = tl.where(keep0 | whole, x0, 0), tl.where(keep1 | whole, x1, 0)
        x2, x3 = tl.where(keep2 | whole, x2, 0), tl.where(keep3 | whole, x3, 0)
    elif METHOD == RESCALED:
        keep0, keep1, keep2, keep3 = keep_two(x0 & 0x7FFF, x1 & 0x7FFF, x2 & 0x7FFF, x3 & 0x7FFF)
        y0, y1, y2, y3 = split_groups(scaled, ROWS, COLS)
        x0, x1 = tl.where(keep0, y0, 0), tl.where(keep1, y1, 0)
        x2, x3 = tl.where(keep2, y2, 0), tl.where(keep3, y3, 0)
    elif METHOD == MVUE:
        word = _group_words(seeds_ptr, row0, group0, quads, STREAM, ROWS, COLS // 4)
        y0, y1, y2, y3, usable = _mvue(x0, x1, x2, x3, word, DTYPE, NATIVE)
        x0, x1 = tl.where(usable, y0, x0), tl.where(usable, y1, x1)
        x2, x3 = tl.where(usable, y2, x2), tl.where(usable, y3, x3)
    return x0, x1, x2, x3
