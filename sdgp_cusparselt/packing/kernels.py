"""The Triton kernels: one read of x, packed along features, along tokens, or both; or pruned.

Everything in this module runs on the device; ``launch`` allocates and starts it. ``reference`` is
what each kernel must equal, bit for bit.

x [M, K] is read as ``quads`` says. Widths are counted in octets of eight columns, 16 bytes, which
every row's start is a multiple of: so no access is narrower for want of a promise.

Names: an operand has rows and columns, two of every four neighbours of a row are kept. Along
features the operand is x [M, K]; along tokens it is the transpose [K, M] of the same tile.
"""

import torch
import triton
import triton.language as tl

from sdgp_cusparselt.packing.directions import store_words, write_operands
from sdgp_cusparselt.packing.halves import HIGH_HALVES, LOW_HALVES, permute
from sdgp_cusparselt.packing.heavy_kernels import add_rest_kernel as add_rest_kernel
from sdgp_cusparselt.packing.heavy_kernels import heaviest_kernel as heaviest_kernel
from sdgp_cusparselt.packing.heavy_kernels import pack_heavy_kernel as pack_heavy_kernel
from sdgp_cusparselt.packing.heavy_kernels import row_energies_kernel as row_energies_kernel
from sdgp_cusparselt.packing.produced import produced_kernel as produced_kernel
from sdgp_cusparselt.packing.quads import (
    block_start,
    choose_along_features,
    choose_along_tokens,
    draw_words,
    load_row,
    scale_along_features,
    scale_along_tokens,
    words_of_columns,
)
from sdgp_cusparselt.packing.selection import RANDOM, RESCALED, spread
from sdgp_cusparselt.packing.sums import features_sums_kernel as features_sums_kernel
from sdgp_cusparselt.packing.sums import tokens_sums_kernel as tokens_sums_kernel

# Types of each kernel's pointers, in order. Sizes, seed and offset follow, then constants.
POINTERS = {
    "pack_kernel": (torch.int32, torch.int32, torch.int32, *(torch.float32,) * 3, torch.int64),
    "produced_kernel": (
        *(torch.int32,) * 3,
        torch.int16,
        torch.float32,
        *(torch.int32,) * 3,
        torch.float32,
        *(torch.int32,) * 3,
        torch.float32,
        torch.int64,
    ),
    "prune_kernel": (torch.int32, torch.int32, torch.float32, torch.int64),
    "features_sums_kernel": (torch.int32, torch.float32, torch.float32),
    "tokens_sums_kernel": (torch.int32, torch.float32, torch.float32),
    "row_energies_kernel": (torch.int32, torch.float32),
    "heaviest_kernel": (torch.float32, torch.int32, torch.int32),
    "pack_heavy_kernel": (*(torch.int32,) * 4, torch.int64),
    "add_rest_kernel": (torch.int32, torch.int32),
}
# Never compiled for a value: one binary serves every shape.
SIZES = ("num_rows", "num_octets", "row_octets", "rows_per_ratio", "features_tail", "tokens_tail")
PRUNE_SIZES = ("num_rows", "num_octets", "row_octets", "rows_per_ratio")
DRAWS = ("seed", "offset")


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
    row0, col0 = block_start(BLOCK_M, BLOCK_K)
    R: tl.constexpr = BLOCK_M // 4
    PAIRS: tl.constexpr = BLOCK_K // 2
    row = row0 + 4 * tl.arange(0, R)
    pair = col0 // 2 + tl.arange(0, PAIRS)
    x0 = load_row(x_ptr, row, pair, row_octets, num_rows, num_octets)
    x1 = load_row(x_ptr, row + 1, pair, row_octets, num_rows, num_octets)
    x2 = load_row(x_ptr, row + 2, pair, row_octets, num_rows, num_octets)
    x3 = load_row(x_ptr, row + 3, pair, row_octets, num_rows, num_octets)
    write_operands(
        x0, x1, x2, x3, features_ptr, tokens_ptr, features_ratio_ptr, tokens_ratio_ptr, sums_ptr,
        seeds_ptr, row, row0, col0, num_rows, num_octets, rows_per_ratio, features_tail,
        tokens_tail, seed, offset, FEATURES, TOKENS, N, RATIO, SUMS, IN_MEMORY, DTYPE, NATIVE,
        FEATURES_LAYOUT, TOKENS_LAYOUT, BLOCK_M, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _prune_row(
    x, scaled, word, METHOD: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr,
    NATIVE: tl.constexpr, R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of words [R, BLOCK_K / 2], pruned along features."""
    GROUPS: tl.constexpr = BLOCK_K // 4
    values, selector = choose_along_features(x, scaled, word, METHOD, N, DTYPE, NATIVE, R, GROUPS)
    low, high = spread(values, selector, NATIVE)
    return tl.reshape(tl.join(low, high), (R, BLOCK_K // 2))


@triton.jit(do_not_specialize=(*PRUNE_SIZES, *DRAWS))
def prune_kernel(
    x_ptr,
    out_ptr,
    ratio_ptr,
    seeds_ptr,
    num_rows,
    num_octets,
    row_octets,
    rows_per_ratio,
    seed,
    offset,
    METHOD: tl.constexpr,
    ALONG_TOKENS: tl.constexpr,
    N: tl.constexpr,
    RATIO: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Read x [M, K] once; write it pruned, the bits that pack_kernel would keep in their places.

    Args:
        x_ptr: int32 words of x, rows 16 * row_octets bytes apart.
        out_ptr: int32 words of the result, rows 16 * num_octets bytes apart.
        ratio_ptr: float32, as ``pack_kernel``'s of the same direction.
        seeds_ptr: see ``pack_kernel``.
    """
    row0, col0 = block_start(BLOCK_M, BLOCK_K)
    R: tl.constexpr = BLOCK_M // 4
    row = row0 + 4 * tl.arange(0, R)
    pair = col0 // 2 + tl.arange(0, BLOCK_K // 2)
    x0 = load_row(x_ptr, row, pair, row_octets, num_rows, num_octets)
    x1 = load_row(x_ptr, row + 1, pair, row_octets, num_rows, num_octets)
    x2 = load_row(x_ptr, row + 2, pair, row_octets, num_rows, num_octets)
    x3 = load_row(x_ptr, row + 3, pair, row_octets, num_rows, num_octets)
    quad = row0 // 4 + tl.arange(0, R)
    octet = col0 // 8 + tl.arange(0, BLOCK_K // 8)
    w0, w1, w2, w3 = quad, quad, quad, quad
    if METHOD >= RANDOM:
        w0, w1, w2, w3 = draw_words(
            seeds_ptr, seed, offset, quad, octet, 1 if ALONG_TOKENS else 0, IN_MEMORY
        )
    y0, y1, y2, y3 = x0, x1, x2, x3
    if METHOD == RESCALED:
        if ALONG_TOKENS:
            y0, y1, y2, y3 = scale_along_tokens(
                x0, x1, x2, x3, ratio_ptr, row, num_rows, DTYPE, NATIVE
            )
        else:
            y0, y1, y2, y3 = scale_along_features(
                x0, x1, x2, x3, ratio_ptr, row, row0, col0, num_rows, num_octets,
                rows_per_ratio, RATIO, DTYPE, NATIVE, BLOCK_K,
            )  # fmt: skip
    if ALONG_TOKENS:
        even_word, odd_word = words_of_columns(w0, w1, w2, w3, METHOD, NATIVE, R, BLOCK_K // 8)
        values, selector = choose_along_tokens(
            x0, x1, x2, x3, y0, y1, y2, y3, even_word, LOW_HALVES, METHOD, N, DTYPE, NATIVE
        )
        even01, even23 = spread(values, selector, NATIVE)
        values, selector = choose_along_tokens(
            x0, x1, x2, x3, y0, y1, y2, y3, odd_word, HIGH_HALVES, METHOD, N, DTYPE, NATIVE
        )
        odd01, odd23 = spread(values, selector, NATIVE)
        z0, z1 = (
            permute(even01, odd01, LOW_HALVES, NATIVE),
            permute(even01, odd01, HIGH_HALVES, NATIVE),
        )
        z2, z3 = (
            permute(even23, odd23, LOW_HALVES, NATIVE),
            permute(even23, odd23, HIGH_HALVES, NATIVE),
        )
        store_words(z0, out_ptr, row, pair, num_rows, num_octets)
        store_words(z1, out_ptr, row + 1, pair, num_rows, num_octets)
        store_words(z2, out_ptr, row + 2, pair, num_rows, num_octets)
        store_words(z3, out_ptr, row + 3, pair, num_rows, num_octets)
    else:
        z0 = _prune_row(x0, y0, w0, METHOD, N, DTYPE, NATIVE, R, BLOCK_K)
        store_words(z0, out_ptr, row, pair, num_rows, num_octets)
        z1 = _prune_row(x1, y1, w1, METHOD, N, DTYPE, NATIVE, R, BLOCK_K)
        store_words(z1, out_ptr, row + 1, pair, num_rows, num_octets)
        z2 = _prune_row(x2, y2, w2, METHOD, N, DTYPE, NATIVE, R, BLOCK_K)
        store_words(z2, out_ptr, row + 2, pair, num_rows, num_octets)
        z3 = _prune_row(x3, y3, w3, METHOD, N, DTYPE, NATIVE, R, BLOCK_K)
        store_words(z3, out_ptr, row + 3, pair, num_rows, num_octets)
