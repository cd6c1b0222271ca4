"""The kernels that sum |x| for rescaled_magnitude: all of it, and what magnitude keeps."""

import triton
import triton.language as tl

from sdgp_cusparselt.packing.halves import sizes_of
from sdgp_cusparselt.packing.quads import load_row

# Never compiled for a value: one binary serves every shape.
FEATURES_SUMS = ("rows_per_sample", "num_octets", "row_octets", "parts", "samples")
TOKENS_SUMS = ("num_rows", "num_octets", "row_octets", "sums_stride")


@triton.jit
def _kept_sizes(x0, x1, x2, x3, a0, a1, a2, a3, N: tl.constexpr):
    """The sizes a of a group's members where magnitude keeps them, else 0; x: keys, |x| as bits."""
    first01, first23 = x0 >= x1, x2 >= x3
    top01, top23 = tl.maximum(x0, x1), tl.maximum(x2, x3)
    if N == 1:
        left = top01 >= top23
        keep0, keep1 = left & first01, left & ~first01
        keep2, keep3 = ~left & first23, ~left & ~first23
    else:
        both01 = tl.minimum(x0, x1) >= top23
        both23 = tl.minimum(x2, x3) > top01
        keep0, keep1 = both01 | (first01 & ~both23), both01 | ~(first01 | both23)
        keep2, keep3 = both23 | (first23 & ~both01), both23 | ~(first23 | both01)
    return (
        tl.where(keep0, a0, 0.0),
        tl.where(keep1, a1, 0.0),
        tl.where(keep2, a2, 0.0),
        tl.where(keep3, a3, 0.0),
    )


@triton.jit
def _row_sizes(x, N: tl.constexpr, DTYPE: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr):
    """|x| of a row of words [R, 2 GROUPS] and where magnitude keeps it: even, odd, even, odd."""
    low, high = sizes_of(x, DTYPE)
    even, odd = (x & 0x7FFF) << 16, x & 0x7FFF0000
    k0, k2 = tl.split(tl.reshape(even, (R, GROUPS, 2)))
    k1, k3 = tl.split(tl.reshape(odd, (R, GROUPS, 2)))
    a0, a2 = tl.split(tl.reshape(low, (R, GROUPS, 2)))
    a1, a3 = tl.split(tl.reshape(high, (R, GROUPS, 2)))
    b0, b1, b2, b3 = _kept_sizes(k0, k1, k2, k3, a0, a1, a2, a3, N)
    kept_low = tl.reshape(tl.join(b0, b2), (R, 2 * GROUPS))
    kept_high = tl.reshape(tl.join(b1, b3), (R, 2 * GROUPS))
    return low, high, kept_low, kept_high


@triton.jit(do_not_specialize=FEATURES_SUMS)
def features_sums_kernel(
    x_ptr,
    total_ptr,
    kept_ptr,
    rows_per_sample,
    num_octets,
    row_octets,
    parts,
    samples,
    N: tl.constexpr,
    STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Partial sums over tokens of |x|, and of the |x| that magnitude keeps along features.

    A program sums STEPS blocks of rows of one sample; a sample is ``parts`` programs. Programs
    beyond the last sample write zeros.

    Args:
        x_ptr: see ``pack_kernel``.
        total_ptr, kept_ptr: float32 [programs along rows, 8 * num_octets].
    """
    number = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    sample, part = number // parts, number % parts
    col0 = tl.program_id(0) * BLOCK_K
    R: tl.constexpr = BLOCK_M // 4
    PAIRS: tl.constexpr = BLOCK_K // 2
    pair = col0 // 2 + tl.arange(0, PAIRS)
    num_rows = tl.where(sample < samples, rows_per_sample, 0)
    x_ptr += sample.to(tl.int64) * rows_per_sample * (row_octets.to(tl.int64) * 4)
    low = tl.zeros((R, PAIRS), tl.float32)
    high, kept_low, kept_high = low, low, low
    for step in range(STEPS):
        row = (part * STEPS + step) * BLOCK_M + 4 * tl.arange(0, R)
        for r in tl.static_range(4):
            x = load_row(x_ptr, row + r, pair, row_octets, num_rows, num_octets)
            a, b, c, d = _row_sizes(x, N, DTYPE, R, BLOCK_K // 4)
            low += a
            high += b
            kept_low += c
            kept_high += d
    col = col0 + tl.arange(0, BLOCK_K)
    place = number.to(tl.int64) * (num_octets.to(tl.int64) * 8) + col
    total = tl.reshape(tl.join(tl.sum(low, 0), tl.sum(high, 0)), (BLOCK_K,))
    kept = tl.reshape(tl.join(tl.sum(kept_low, 0), tl.sum(kept_high, 0)), (BLOCK_K,))
    tl.store(total_ptr + place, total, mask=col // 8 < num_octets)
    tl.store(kept_ptr + place, kept, mask=col // 8 < num_octets)


@triton.jit(do_not_specialize=TOKENS_SUMS)
def tokens_sums_kernel(
    x_ptr,
    total_ptr,
    kept_ptr,
    num_rows,
    num_octets,
    row_octets,
    sums_stride,
    N: tl.constexpr,
    STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Partial sums over features of |x|, and of the |x| that magnitude keeps along tokens.

    A program sums STEPS blocks of columns.

    Args:
        x_ptr: see ``pack_kernel``.
        total_ptr, kept_ptr: float32 [programs along columns, sums_stride].
    """
    row_block = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    R: tl.constexpr = BLOCK_M // 4
    PAIRS: tl.constexpr = BLOCK_K // 2
    row = row_block * BLOCK_M + 4 * tl.arange(0, R)
    a0 = tl.zeros((R, PAIRS), tl.float32)
    a1, a2, a3, b0, b1, b2, b3 = a0, a0, a0, a0, a0, a0, a0
    for step in range(STEPS):
        pair = (tl.program_id(0) * STEPS + step) * PAIRS + tl.arange(0, PAIRS)
        x0 = load_row(x_ptr, row, pair, row_octets, num_rows, num_octets)
        x1 = load_row(x_ptr, row + 1, pair, row_octets, num_rows, num_octets)
        x2 = load_row(x_ptr, row + 2, pair, row_octets, num_rows, num_octets)
        x3 = load_row(x_ptr, row + 3, pair, row_octets, num_rows, num_octets)
        low0, high0 = sizes_of(x0, DTYPE)
        low1, high1 = sizes_of(x1, DTYPE)
        low2, high2 = sizes_of(x2, DTYPE)
        low3, high3 = sizes_of(x3, DTYPE)
        e0, e1, e2, e3 = _kept_sizes(
            (x0 & 0x7FFF) << 16, (x1 & 0x7FFF) << 16, (x2 & 0x7FFF) << 16, (x3 & 0x7FFF) << 16,
            low0, low1, low2, low3, N,
        )  # fmt: skip
        o0, o1, o2, o3 = _kept_sizes(
            x0 & 0x7FFF0000, x1 & 0x7FFF0000, x2 & 0x7FFF0000, x3 & 0x7FFF0000,
            high0, high1, high2, high3, N,
        )  # fmt: skip
        a0, a1, a2, a3 = (
            a0 + (low0 + high0),
            a1 + (low1 + high1),
            a2 + (low2 + high2),
            a3 + (low3 + high3),
        )
        b0, b1, b2, b3 = b0 + (e0 + o0), b1 + (e1 + o1), b2 + (e2 + o2), b3 + (e3 + o3)
    start = tl.program_id(0).to(tl.int64) * sums_stride
    tl.store(total_ptr + start + row, tl.sum(a0, 1), mask=row < num_rows)
    tl.store(total_ptr + start + row + 1, tl.sum(a1, 1), mask=row + 1 < num_rows)
    tl.store(total_ptr + start + row + 2, tl.sum(a2, 1), mask=row + 2 < num_rows)
    tl.store(total_ptr + start + row + 3, tl.sum(a3, 1), mask=row + 3 < num_rows)
    tl.store(kept_ptr + start + row, tl.sum(b0, 1), mask=row < num_rows)
    tl.store(kept_ptr + start + row + 1, tl.sum(b1, 1), mask=row + 1 < num_rows)
    tl.store(kept_ptr + start + row + 2, tl.sum(b2, 1), mask=row + 2 < num_rows)
    tl.store(kept_ptr + start + row + 3, tl.sum(b3, 1), mask=row + 3 < num_rows)
