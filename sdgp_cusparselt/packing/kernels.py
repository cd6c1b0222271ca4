"""The Triton kernels: one read of x, packed along features, along tokens, or both; or pruned.

Everything in this module runs on the device; ``launch`` allocates and starts it. ``reference`` is
what each kernel must equal, bit for bit.

x [M, K] is read as 32-bit words, two neighbouring columns each. A tile is BLOCK_M / 4 quads of
rows, and the four rows of a quad are four tensors, so that a thread holds whole groups of either
direction: along features (a, b), neighbouring words of a row; along tokens the low halves, or the
high halves, of the four rows. Widths are counted in octets of eight columns, 16 bytes, which every
row's start is a multiple of: so no access is narrower for want of a promise.

Names: an operand has rows and columns, two of every four neighbours of a row are kept. Along
features the operand is x [M, K]; along tokens it is the transpose [K, M] of the same tile.
"""

import torch
import triton
import triton.language as tl

from sdgp_cusparselt.packing.halves import (
    HIGH_HALVES,
    LOW_HALVES,
    floats_of,
    permute,
    round_halves,
    sizes_of,
)
from sdgp_cusparselt.packing.metadata import stack_rows, store_metadata
from sdgp_cusparselt.packing.selection import RANDOM, RESCALED, choose

# Whether a ratio serves all rows of a block, or each row has that of its sample.
RATIO_PER_BLOCK = tl.constexpr(1)
RATIO_PER_ROW = tl.constexpr(2)
# The operand's rows and columns are multiples of 16 elements of 16 bits.
MULTIPLE = tl.constexpr(16)
# Types of each kernel's pointers, in order. Sizes, seed and offset follow, then constants.
POINTERS = {
    "pack_kernel": (torch.int32, torch.int32, torch.int32, *(torch.float32,) * 3, torch.int64),
    "features_sums_kernel": (torch.int32, torch.float32, torch.float32),
    "tokens_sums_kernel": (torch.int32, torch.float32, torch.float32),
}
# Never compiled for a value: one binary serves every shape.
SIZES = ("num_rows", "num_octets", "row_octets", "rows_per_ratio", "features_tail", "tokens_tail")
DRAWS = ("seed", "offset")
FEATURES_SUMS = ("rows_per_sample", "num_octets", "row_octets", "parts", "samples")
TOKENS_SUMS = ("num_rows", "num_octets", "row_octets", "sums_stride")


@triton.jit
def _block_start(BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """First row and column of this program's block; see ``launch.grid_of``."""
    row_block = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    return row_block * BLOCK_M, tl.program_id(0) * BLOCK_K


@triton.jit
def _load_row(x_ptr, row, pair, row_octets, num_rows, num_octets):
    """Two columns a word: int32 [rows, pairs], zero outside x."""
    start = row.to(tl.int64) * (row_octets.to(tl.int64) * 4)
    inside = (row < num_rows)[:, None] & (pair // 4 < num_octets)[None, :]
    return tl.load(x_ptr + start[:, None] + pair[None, :], mask=inside, other=0)


@triton.jit
def _draw(seeds_ptr, seed, offset, quad, octet, STREAM: tl.constexpr, IN_MEMORY: tl.constexpr):
    """Four random words for each four rows and eight columns of x, from their place alone."""
    seed, offset = seed.to(tl.int64), offset.to(tl.int64)
    if IN_MEMORY:
        seed = tl.load(seeds_ptr)
        offset += tl.load(seeds_ptr + 1)
    zero = quad[:, None] * 0 + octet[None, :] * 0
    offset_high = ((offset >> 32) & 0x3FFFFFFF) | ((2 + STREAM) << 30)
    return tl.philox(
        seed,
        (zero + octet[None, :]).to(tl.uint32),
        (zero + quad[:, None]).to(tl.uint32),
        zero.to(tl.uint32) + (offset & 0xFFFFFFFF).to(tl.uint32),
        zero.to(tl.uint32) + offset_high.to(tl.uint32),
    )


@triton.jit
def _low_bits(word):
    return (word & 0xFFFF).to(tl.int32)


@triton.jit
def _high_bits(word):
    return (word >> 16).to(tl.int32)


@triton.jit
def _scale_row(x, low_ratio, high_ratio, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    low, high = floats_of(x, DTYPE)
    return round_halves(low * low_ratio, high * high_ratio, DTYPE, NATIVE)


@triton.jit
def _ratio_of_columns(
    ratio_ptr, row, col0, num_rows, num_octets, rows_per_ratio, BLOCK_K: tl.constexpr
):
    """float32 ratios [rows, BLOCK_K / 2] of even and of odd columns; ratio [samples, 8 octets]."""
    col = col0 + tl.arange(0, BLOCK_K)
    start = (row // rows_per_ratio).to(tl.int64) * (num_octets.to(tl.int64) * 8)
    inside = (row < num_rows)[:, None] & (col // 8 < num_octets)[None, :]
    ratio = tl.load(ratio_ptr + start[:, None] + col[None, :], mask=inside, other=1.0)
    return tl.split(tl.reshape(ratio, (row.shape[0], BLOCK_K // 2, 2)))


@triton.jit
def _scale_along_features(
    x0, x1, x2, x3, ratio_ptr, row, row0, col0, num_rows, num_octets, rows_per_ratio,
    RATIO: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rows of x times the ratio of their sample and column."""
    if RATIO == RATIO_PER_BLOCK:
        first = row0 + tl.arange(0, 1)
        low, high = _ratio_of_columns(
            ratio_ptr, first, col0, num_rows, num_octets, rows_per_ratio, BLOCK_K
        )
        x0 = _scale_row(x0, low, high, DTYPE, NATIVE)
        x1 = _scale_row(x1, low, high, DTYPE, NATIVE)
        x2 = _scale_row(x2, low, high, DTYPE, NATIVE)
        x3 = _scale_row(x3, low, high, DTYPE, NATIVE)
    else:
        low, high = _ratio_of_columns(
            ratio_ptr, row, col0, num_rows, num_octets, rows_per_ratio, BLOCK_K
        )
        x0 = _scale_row(x0, low, high, DTYPE, NATIVE)
        low, high = _ratio_of_columns(
            ratio_ptr, row + 1, col0, num_rows, num_octets, rows_per_ratio, BLOCK_K
        )
        x1 = _scale_row(x1, low, high, DTYPE, NATIVE)
        low, high = _ratio_of_columns(
            ratio_ptr, row + 2, col0, num_rows, num_octets, rows_per_ratio, BLOCK_K
        )
        x2 = _scale_row(x2, low, high, DTYPE, NATIVE)
        low, high = _ratio_of_columns(
            ratio_ptr, row + 3, col0, num_rows, num_octets, rows_per_ratio, BLOCK_K
        )
        x3 = _scale_row(x3, low, high, DTYPE, NATIVE)
    return x0, x1, x2, x3


@triton.jit
def _scale_along_tokens(
    x0, x1, x2, x3, ratio_ptr, row, num_rows, DTYPE: tl.constexpr, NATIVE: tl.constexpr
):
    """The rows of x times the ratio of each: ratio [rows]."""
    r0 = tl.load(ratio_ptr + row, mask=row < num_rows, other=1.0)[:, None]
    r1 = tl.load(ratio_ptr + row + 1, mask=row + 1 < num_rows, other=1.0)[:, None]
    r2 = tl.load(ratio_ptr + row + 2, mask=row + 2 < num_rows, other=1.0)[:, None]
    r3 = tl.load(ratio_ptr + row + 3, mask=row + 3 < num_rows, other=1.0)[:, None]
    x0 = _scale_row(x0, r0, r0, DTYPE, NATIVE)
    x1 = _scale_row(x1, r1, r1, DTYPE, NATIVE)
    x2 = _scale_row(x2, r2, r2, DTYPE, NATIVE)
    x3 = _scale_row(x3, r3, r3, DTYPE, NATIVE)
    return x0, x1, x2, x3


@triton.jit
def _choose_along_features(
    x, scaled, word, METHOD: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr,
    NATIVE: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Values and selectors [R, GROUPS] of the groups of R rows; word: random, two groups a word."""
    low, high = tl.split(tl.reshape(x, (R, GROUPS, 2)))
    scaled_low, scaled_high = low, high
    if METHOD == RESCALED:
        scaled_low, scaled_high = tl.split(tl.reshape(scaled, (R, GROUPS, 2)))
    if METHOD >= RANDOM:
        word = tl.reshape(tl.join(_low_bits(word), _high_bits(word)), (R, GROUPS))
    return choose(low, high, scaled_low, scaled_high, word, METHOD, N, DTYPE, NATIVE)


@triton.jit
def _choose_along_tokens(
    x0, x1, x2, x3, y0, y1, y2, y3, word, HALVES: tl.constexpr,
    METHOD: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Values and selectors of the groups of four rows, in the even or the odd columns."""
    low, high = permute(x0, x1, HALVES, NATIVE), permute(x2, x3, HALVES, NATIVE)
    scaled_low, scaled_high = low, high
    if METHOD == RESCALED:
        scaled_low, scaled_high = permute(y0, y1, HALVES, NATIVE), permute(y2, y3, HALVES, NATIVE)
    return choose(low, high, scaled_low, scaled_high, word, METHOD, N, DTYPE, NATIVE)


@triton.jit
def _words_of_columns(w0, w1, w2, w3, METHOD: tl.constexpr, R: tl.constexpr, OCTETS: tl.constexpr):
    """16 random bits for the even and for the odd columns [R, 4 OCTETS]: two columns a word."""
    if METHOD >= RANDOM:
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (R, OCTETS * 4))
        return _low_bits(words), _high_bits(words)
    else:
        return w0, w0


@triton.jit
def _store_values(values, buffer_ptr, row, group0, num_rows, num_groups, GROUPS: tl.constexpr):
    """Write values [rows, GROUPS], one word a group, into the padded operand."""
    group = group0 + tl.arange(0, GROUPS)
    inside = (row < num_rows)[:, None] & (group // 4 < num_groups // 4)[None, :]
    start = row.to(tl.int64) * num_groups
    tl.store(buffer_ptr + start[:, None] + group[None, :], values, mask=inside)


@triton.jit(do_not_specialize=(*SIZES, *DRAWS))
def pack_kernel(
    x_ptr,
    features_ptr,
    tokens_ptr,
    features_ratio_ptr,
    tokens_ratio_ptr,
    sums_ptr,
    seeds_ptr,
    num_rows,
    num_octets,
    row_octets,
    rows_per_ratio,
    features_tail,
    tokens_tail,
    seed,
    offset,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    N: tl.constexpr,
    RATIO: tl.constexpr,
    SUMS: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
    FEATURES_LAYOUT: tl.constexpr,
    TOKENS_LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Read x [M, K] once; write what FEATURES, TOKENS and SUMS ask for.

    Args:
        x_ptr: int32 words of x, rows 16 * row_octets bytes apart.
        features_ptr, tokens_ptr: int32, the buffers to fill: values, then metadata.
        features_ratio_ptr: float32 [samples, 8 * num_octets]; a sample is rows_per_ratio rows.
        tokens_ratio_ptr: float32 [num_rows].
        sums_ptr: float32 [row blocks, 8 * num_octets], sums over each block of rows.
        seeds_ptr: int64 [2], a seed and an offset to add, where IN_MEMORY; else not followed.
        features_tail, tokens_tail: see ``metadata.store_metadata``.
        FEATURES, TOKENS: the method of each direction, or 0.
        N: values kept of four; 1 leaves the second one of the format at zero.
    """
    row0, col0 = _block_start(BLOCK_M, BLOCK_K)
    R: tl.constexpr = BLOCK_M // 4
    PAIRS: tl.constexpr = BLOCK_K // 2
    row = row0 + 4 * tl.arange(0, R)
    pair = col0 // 2 + tl.arange(0, PAIRS)
    x0 = _load_row(x_ptr, row, pair, row_octets, num_rows, num_octets)
    x1 = _load_row(x_ptr, row + 1, pair, row_octets, num_rows, num_octets)
    x2 = _load_row(x_ptr, row + 2, pair, row_octets, num_rows, num_octets)
    x3 = _load_row(x_ptr, row + 3, pair, row_octets, num_rows, num_octets)
    padded_rows = (num_rows + (MULTIPLE - 1)) // MULTIPLE * MULTIPLE
    padded_cols = (num_octets + 1) // 2 * MULTIPLE
    quad = row0 // 4 + tl.arange(0, R)
    octet = col0 // 8 + tl.arange(0, BLOCK_K // 8)
    if SUMS:
        _store_sums(x0, x1, x2, x3, sums_ptr, row0 // BLOCK_M, col0, num_octets, DTYPE, BLOCK_K)
    if FEATURES != 0:
        y0, y1, y2, y3 = x0, x1, x2, x3
        if FEATURES == RESCALED:
            y0, y1, y2, y3 = _scale_along_features(
                x0, x1, x2, x3, features_ratio_ptr, row, row0, col0, num_rows, num_octets,
                rows_per_ratio, RATIO, DTYPE, NATIVE, BLOCK_K,
            )  # fmt: skip
        w0, w1, w2, w3 = quad, quad, quad, quad
        if FEATURES >= RANDOM:
            w0, w1, w2, w3 = _draw(seeds_ptr, seed, offset, quad, octet, 0, IN_MEMORY)
        GROUPS: tl.constexpr = BLOCK_K // 4
        groups = padded_cols // 4
        v0, s0 = _choose_along_features(x0, y0, w0, FEATURES, N, DTYPE, NATIVE, R, GROUPS)
        _store_values(v0, features_ptr, row, col0 // 4, padded_rows, groups, GROUPS)
        v1, s1 = _choose_along_features(x1, y1, w1, FEATURES, N, DTYPE, NATIVE, R, GROUPS)
        _store_values(v1, features_ptr, row + 1, col0 // 4, padded_rows, groups, GROUPS)
        v2, s2 = _choose_along_features(x2, y2, w2, FEATURES, N, DTYPE, NATIVE, R, GROUPS)
        _store_values(v2, features_ptr, row + 2, col0 // 4, padded_rows, groups, GROUPS)
        v3, s3 = _choose_along_features(x3, y3, w3, FEATURES, N, DTYPE, NATIVE, R, GROUPS)
        _store_values(v3, features_ptr, row + 3, col0 // 4, padded_rows, groups, GROUPS)
        store_metadata(
            stack_rows(s0, s1, s2, s3, NATIVE), features_ptr, row0, col0 // 4,
            padded_rows, groups, features_tail, FEATURES == RANDOM, FEATURES_LAYOUT,
            BLOCK_M, GROUPS, NATIVE,
        )  # fmt: skip
    if TOKENS != 0:
        z0, z1, z2, z3 = x0, x1, x2, x3
        if TOKENS == RESCALED:
            z0, z1, z2, z3 = _scale_along_tokens(
                x0, x1, x2, x3, tokens_ratio_ptr, row, num_rows, DTYPE, NATIVE
            )
        t0, t1, t2, t3 = quad, quad, quad, quad
        if TOKENS >= RANDOM:
            t0, t1, t2, t3 = _draw(seeds_ptr, seed, offset, quad, octet, 1, IN_MEMORY)
        even_word, odd_word = _words_of_columns(t0, t1, t2, t3, TOKENS, R, BLOCK_K // 8)
        even, even_selector = _choose_along_tokens(
            x0, x1, x2, x3, z0, z1, z2, z3, even_word, LOW_HALVES, TOKENS, N, DTYPE, NATIVE
        )
        odd, odd_selector = _choose_along_tokens(
            x0, x1, x2, x3, z0, z1, z2, z3, odd_word, HIGH_HALVES, TOKENS, N, DTYPE, NATIVE
        )
        values = tl.trans(tl.reshape(tl.join(even, odd), (R, BLOCK_K)))
        col = col0 + tl.arange(0, BLOCK_K)
        _store_values(values, tokens_ptr, col, row0 // 4, padded_cols, padded_rows // 4, R)
        c0, c2 = tl.split(tl.reshape(even_selector, (R, BLOCK_K // 4, 2)))
        c1, c3 = tl.split(tl.reshape(odd_selector, (R, BLOCK_K // 4, 2)))
        store_metadata(
            tl.trans(stack_rows(c0, c1, c2, c3, NATIVE)), tokens_ptr, col0, row0 // 4,
            padded_cols, padded_rows // 4, tokens_tail, TOKENS == RANDOM, TOKENS_LAYOUT,
            BLOCK_K, R, NATIVE,
        )  # fmt: skip


@triton.jit
def _store_sums(
    x0, x1, x2, x3, sums_ptr, row_block, col0, num_octets,
    DTYPE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of the block's rows, per column."""
    low0, high0 = floats_of(x0, DTYPE)
    low1, high1 = floats_of(x1, DTYPE)
    low2, high2 = floats_of(x2, DTYPE)
    low3, high3 = floats_of(x3, DTYPE)
    low = tl.sum((low0 + low1) + (low2 + low3), 0)
    high = tl.sum((high0 + high1) + (high2 + high3), 0)
    col = col0 + tl.arange(0, BLOCK_K)
    place = sums_ptr + row_block.to(tl.int64) * (num_octets.to(tl.int64) * 8) + col
    tl.store(place, tl.reshape(tl.join(low, high), (BLOCK_K,)), mask=col // 8 < num_octets)


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
            x = _load_row(x_ptr, row + r, pair, row_octets, num_rows, num_octets)
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
        x0 = _load_row(x_ptr, row, pair, row_octets, num_rows, num_octets)
        x1 = _load_row(x_ptr, row + 1, pair, row_octets, num_rows, num_octets)
        x2 = _load_row(x_ptr, row + 2, pair, row_octets, num_rows, num_octets)
        x3 = _load_row(x_ptr, row + 3, pair, row_octets, num_rows, num_octets)
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
