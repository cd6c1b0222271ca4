"""Where the rows of a tile go once they are there: packed along features, along tokens, summed.

A tile is as ``quads`` says. These functions write; ``selection`` chooses what.
"""

import triton
import triton.language as tl

from sdgp_cusparselt.packing.halves import HIGH_HALVES, LOW_HALVES, floats_of
from sdgp_cusparselt.packing.metadata import stack_rows, store_metadata
from sdgp_cusparselt.packing.quads import (
    choose_along_features,
    choose_along_tokens,
    draw_words,
    scale_along_features,
    scale_along_tokens,
    words_of_columns,
)
from sdgp_cusparselt.packing.selection import RANDOM, RESCALED

# The operand's rows and columns are multiples of 16 elements of 16 bits.
MULTIPLE = tl.constexpr(16)


@triton.jit
def store_values(values, buffer_ptr, row, group0, num_rows, num_groups, GROUPS: tl.constexpr):
    """Write values [rows, GROUPS], one word a group, into the padded operand."""
    group = group0 + tl.arange(0, GROUPS)
    inside = (row < num_rows)[:, None] & (group // 4 < num_groups // 4)[None, :]
    start = row.to(tl.int64) * num_groups
    tl.store(buffer_ptr + start[:, None] + group[None, :], values, mask=inside)


@triton.jit
def write_operands(
    x0, x1, x2, x3, features_ptr, tokens_ptr, features_ratio_ptr, tokens_ratio_ptr, sums_ptr,
    seeds_ptr, row, row0, col0, num_rows, num_octets, rows_per_ratio, features_tail, tokens_tail,
    seed, offset,
    FEATURES: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr, RATIO: tl.constexpr,
    SUMS: tl.constexpr, IN_MEMORY: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr,
    FEATURES_LAYOUT: tl.constexpr, TOKENS_LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write what FEATURES, TOKENS and SUMS ask for of a tile; see ``kernels.pack_kernel``."""
    R: tl.constexpr = BLOCK_M // 4
    padded_rows = (num_rows + (MULTIPLE - 1)) // MULTIPLE * MULTIPLE
    padded_cols = (num_octets + 1) // 2 * MULTIPLE
    quad = row0 // 4 + tl.arange(0, R)
    octet = col0 // 8 + tl.arange(0, BLOCK_K // 8)
    if SUMS:
        store_sums(x0, x1, x2, x3, sums_ptr, row0 // BLOCK_M, col0, num_octets, DTYPE, BLOCK_K)
    if FEATURES != 0:
        y0, y1, y2, y3 = x0, x1, x2, x3
        if FEATURES == RESCALED:
            y0, y1, y2, y3 = scale_along_features(
                x0, x1, x2, x3, features_ratio_ptr, row, row0, col0, num_rows, num_octets,
                rows_per_ratio, RATIO, DTYPE, NATIVE, BLOCK_K,
            )  # fmt: skip
        w0, w1, w2, w3 = quad, quad, quad, quad
        if FEATURES >= RANDOM:
            w0, w1, w2, w3 = draw_words(seeds_ptr, seed, offset, quad, octet, 0, IN_MEMORY)
        GROUPS: tl.constexpr = BLOCK_K // 4
        groups = padded_cols // 4
        v0, s0 = choose_along_features(x0, y0, w0, FEATURES, N, DTYPE, NATIVE, R, GROUPS)
        store_values(v0, features_ptr, row, col0 // 4, padded_rows, groups, GROUPS)
        v1, s1 = choose_along_features(x1, y1, w1, FEATURES, N, DTYPE, NATIVE, R, GROUPS)
        store_values(v1, features_ptr, row + 1, col0 // 4, padded_rows, groups, GROUPS)
        v2, s2 = choose_along_features(x2, y2, w2, FEATURES, N, DTYPE, NATIVE, R, GROUPS)
        store_values(v2, features_ptr, row + 2, col0 // 4, padded_rows, groups, GROUPS)
        v3, s3 = choose_along_features(x3, y3, w3, FEATURES, N, DTYPE, NATIVE, R, GROUPS)
        store_values(v3, features_ptr, row + 3, col0 // 4, padded_rows, groups, GROUPS)
        store_metadata(
            stack_rows(s0, s1, s2, s3, NATIVE), features_ptr, row0, col0 // 4,
            padded_rows, groups, features_tail, FEATURES == RANDOM, FEATURES_LAYOUT,
            BLOCK_M, GROUPS, NATIVE,
        )  # fmt: skip
    if TOKENS != 0:
        z0, z1, z2, z3 = x0, x1, x2, x3
        if TOKENS == RESCALED:
            z0, z1, z2, z3 = scale_along_tokens(
                x0, x1, x2, x3, tokens_ratio_ptr, row, num_rows, DTYPE, NATIVE
            )
        t0, t1, t2, t3 = quad, quad, quad, quad
        if TOKENS >= RANDOM:
            t0, t1, t2, t3 = draw_words(seeds_ptr, seed, offset, quad, octet, 1, IN_MEMORY)
        even_word, odd_word = words_of_columns(t0, t1, t2, t3, TOKENS, NATIVE, R, BLOCK_K // 8)
        even, even_selector = choose_along_tokens(
            x0, x1, x2, x3, z0, z1, z2, z3, even_word, LOW_HALVES, TOKENS, N, DTYPE, NATIVE
        )
        odd, odd_selector = choose_along_tokens(
            x0, x1, x2, x3, z0, z1, z2, z3, odd_word, HIGH_HALVES, TOKENS, N, DTYPE, NATIVE
        )
        values = tl.trans(tl.reshape(tl.join(even, odd), (R, BLOCK_K)))
        col = col0 + tl.arange(0, BLOCK_K)
        store_values(values, tokens_ptr, col, row0 // 4, padded_cols, padded_rows // 4, R)
        c0, c2 = tl.split(tl.reshape(even_selector, (R, BLOCK_K // 4, 2)))
        c1, c3 = tl.split(tl.reshape(odd_selector, (R, BLOCK_K // 4, 2)))
        store_metadata(
            tl.trans(stack_rows(c0, c1, c2, c3, NATIVE)), tokens_ptr, col0, row0 // 4,
            padded_cols, padded_rows // 4, tokens_tail, TOKENS == RANDOM, TOKENS_LAYOUT,
            BLOCK_K, R, NATIVE,
        )  # fmt: skip


@triton.jit
def store_sums(
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
def store_words(words, out_ptr, row, pair, num_rows, num_octets):
    """Write rows of words [rows, pairs] of the result."""
    start = row.to(tl.int64) * (num_octets * 4)
    inside = (row < num_rows)[:, None] & (pair // 4 < num_octets)[None, :]
    tl.store(out_ptr + start[:, None] + pair[None, :], words, mask=inside)
