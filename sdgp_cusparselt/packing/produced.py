"""The kernel that makes a gradient and packs it: the prologue of ``kernels.pack_kernel``.

Read are what the producer takes; the gradient is in registers until it is written as it is asked
for: densely, packed along features, packed along tokens, summed. A gated producer makes two
gradients from one read, and each is written so.
"""

import triton
import triton.language as tl

from sdgp_cusparselt.packing.derivatives import (
    CROSS_ENTROPY,
    activation_words,
    cross_entropy_words,
)
from sdgp_cusparselt.packing.directions import store_words, write_operands
from sdgp_cusparselt.packing.quads import block_start, load_row

# Never compiled for a value.
PRODUCED_SIZES = (
    "num_rows", "num_octets", "upstream_octets", "pre_octets", "up_octets", "features_tail",
    "tokens_tail", "scale_bits",
)  # fmt: skip
# float32 of a row in ``producing.cross_entropy_rows``.
ROW_FLOATS = tl.constexpr(8)
# What the second gradient of a gated producer adds to the offset of the first: a pack's step.
SECOND_OFFSET = tl.constexpr(4)


@triton.jit
def _keep(mask_ptr, row, pair, num_rows, num_octets, scale_bits, MASKED: tl.constexpr):
    """What dropout multiplies two columns by, float32: scale or 0, from two bytes of 1 or 0."""
    if MASKED:
        start = row.to(tl.int64) * (num_octets * 4)
        inside = (row < num_rows)[:, None] & (pair // 4 < num_octets)[None, :]
        both = tl.load(mask_ptr + start[:, None] + pair[None, :], mask=inside, other=0)
        both = both.to(tl.int32)
        low, high = (both & 1) * scale_bits, ((both >> 8) & 1) * scale_bits
        return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    else:
        return row, row


@triton.jit
def _activation_row(
    upstream_ptr, pre_ptr, up_ptr, mask_ptr, row, pair, num_rows, num_octets, upstream_octets,
    pre_octets, up_octets, scale_bits, PRODUCER: tl.constexpr, GATED: tl.constexpr,
    MASKED: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Rows of words of both gradients, zero outside: of an upstream that is zero there."""
    g = load_row(upstream_ptr, row, pair, upstream_octets, num_rows, num_octets)
    x = load_row(pre_ptr, row, pair, pre_octets, num_rows, num_octets)
    up = g
    if GATED:
        up = load_row(up_ptr, row, pair, up_octets, num_rows, num_octets)
    keep = _keep(mask_ptr, row, pair, num_rows, num_octets, scale_bits, MASKED)
    return activation_words(g, x, up, keep, PRODUCER, GATED, MASKED, DTYPE, NATIVE)


@triton.jit
def _cross_entropy_row(
    logits_ptr, rows_ptr, row, pair, num_octets, row_octets, DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Rows of words of the gradient of logits; rows_ptr: see ``producing.cross_entropy_rows``."""
    place = rows_ptr + row * ROW_FLOATS
    shift, weight, base = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    low_hit, high_hit, hit_pair = tl.load(place + 3), tl.load(place + 4), tl.load(place + 5)
    # A row without weight is not read: whatever is in it, its gradient is zero. Nor is what lies
    # outside: 2**-inf is 0, and where base is not, no block reaches beyond a row.
    MINUS_INF: tl.constexpr = -0x7F0080 if tl.bfloat16 == DTYPE else -0x3FF0400
    inside = (weight != 0.0)[:, None] & (pair // 4 < num_octets)[None, :]
    start = row.to(tl.int64) * (row_octets * 4)
    x = tl.load(logits_ptr + start[:, None] + pair[None, :], mask=inside, other=MINUS_INF)
    return cross_entropy_words(
        x, pair.to(tl.float32)[None, :], shift[:, None], weight[:, None], base[:, None],
        low_hit[:, None], high_hit[:, None], hit_pair[:, None], DTYPE, NATIVE,
    )  # fmt: skip


@triton.jit
def _write(
    x0, x1, x2, x3, dense_ptr, features_ptr, tokens_ptr, sums_ptr, seeds_ptr, row, row0, col0,
    num_rows, num_octets, features_tail, tokens_tail, seed, offset,
    DENSE: tl.constexpr, FEATURES: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr,
    SUMS: tl.constexpr, IN_MEMORY: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr,
    FEATURES_LAYOUT: tl.constexpr, TOKENS_LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write one gradient as it is asked for."""
    if DENSE:
        pair = col0 // 2 + tl.arange(0, BLOCK_K // 2)
        store_words(x0, dense_ptr, row, pair, num_rows, num_octets)
        store_words(x1, dense_ptr, row + 1, pair, num_rows, num_octets)
        store_words(x2, dense_ptr, row + 2, pair, num_rows, num_octets)
        store_words(x3, dense_ptr, row + 3, pair, num_rows, num_octets)
    write_operands(
        x0, x1, x2, x3, features_ptr, tokens_ptr, sums_ptr, sums_ptr, sums_ptr, seeds_ptr, row,
        row0, col0, num_rows, num_octets, num_rows, features_tail, tokens_tail, seed, offset,
        FEATURES, TOKENS, N, 0, SUMS, IN_MEMORY, DTYPE, NATIVE, FEATURES_LAYOUT, TOKENS_LAYOUT,
        BLOCK_M, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=(*PRODUCED_SIZES, "seed", "offset"))
def produced_kernel(
    upstream_ptr,
    pre_ptr,
    up_ptr,
    mask_ptr,
    rows_ptr,
    dense_ptr,
    features_ptr,
    tokens_ptr,
    sums_ptr,
    second_dense_ptr,
    second_features_ptr,
    second_tokens_ptr,
    second_sums_ptr,
    seeds_ptr,
    num_rows,
    num_octets,
    upstream_octets,
    pre_octets,
    up_octets,
    features_tail,
    tokens_tail,
    scale_bits,
    seed,
    offset,
    PRODUCER: tl.constexpr,
    GATED: tl.constexpr,
    MASKED: tl.constexpr,
    DENSE: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    N: tl.constexpr,
    SUMS: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
    FEATURES_LAYOUT: tl.constexpr,
    TOKENS_LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Make the gradient [M, K] of a layer's output, or two, and write what is asked for.

    Args:
        upstream_ptr: int32 words of the gradient of hidden, rows 16 * upstream_octets bytes apart.
        pre_ptr, up_ptr: likewise, the output of the layer and what it is multiplied by if GATED;
            pre_ptr the logits of a cross-entropy.
        mask_ptr: int16, two bytes of 0 or 1 for two columns, rows without gaps, if MASKED.
        rows_ptr: float32 of a cross-entropy, see ``producing.cross_entropy_rows``.
        dense_ptr: int32 words of the result, rows without gaps, if DENSE.
        features_ptr, tokens_ptr, sums_ptr, seeds_ptr: see ``kernels.pack_kernel``.
        second_*_ptr: the same of the gradient of up.
        scale_bits: float32 as bits, what dropout multiplies the kept by.
        FEATURES, TOKENS: the method of each direction, none of which is rescaled, or 0.
    """
    row0, col0 = block_start(BLOCK_M, BLOCK_K)
    row = row0 + 4 * tl.arange(0, BLOCK_M // 4)
    pair = col0 // 2 + tl.arange(0, BLOCK_K // 2)
    if PRODUCER == CROSS_ENTROPY:
        x0 = _cross_entropy_row(
            pre_ptr, rows_ptr, row, pair, num_octets, pre_octets, DTYPE, NATIVE,
        )  # fmt: skip
        x1 = _cross_entropy_row(
            pre_ptr, rows_ptr, row + 1, pair, num_octets, pre_octets, DTYPE, NATIVE,
        )  # fmt: skip
        x2 = _cross_entropy_row(
            pre_ptr, rows_ptr, row + 2, pair, num_octets, pre_octets, DTYPE, NATIVE,
        )  # fmt: skip
        x3 = _cross_entropy_row(
            pre_ptr, rows_ptr, row + 3, pair, num_octets, pre_octets, DTYPE, NATIVE,
        )  # fmt: skip
        y0, y1, y2, y3 = x0, x1, x2, x3
    else:
        x0, y0 = _activation_row(
            upstream_ptr, pre_ptr, up_ptr, mask_ptr, row, pair, num_rows, num_octets,
            upstream_octets, pre_octets, up_octets, scale_bits, PRODUCER, GATED, MASKED,
            DTYPE, NATIVE,
        )  # fmt: skip
        x1, y1 = _activation_row(
            upstream_ptr, pre_ptr, up_ptr, mask_ptr, row + 1, pair, num_rows, num_octets,
            upstream_octets, pre_octets, up_octets, scale_bits, PRODUCER, GATED, MASKED,
            DTYPE, NATIVE,
        )  # fmt: skip
        x2, y2 = _activation_row(
            upstream_ptr, pre_ptr, up_ptr, mask_ptr, row + 2, pair, num_rows, num_octets,
            upstream_octets, pre_octets, up_octets, scale_bits, PRODUCER, GATED, MASKED,
            DTYPE, NATIVE,
        )  # fmt: skip
        x3, y3 = _activation_row(
            upstream_ptr, pre_ptr, up_ptr, mask_ptr, row + 3, pair, num_rows, num_octets,
            upstream_octets, pre_octets, up_octets, scale_bits, PRODUCER, GATED, MASKED,
            DTYPE, NATIVE,
        )  # fmt: skip
    _write(
        x0, x1, x2, x3, dense_ptr, features_ptr, tokens_ptr, sums_ptr, seeds_ptr, row, row0, col0,
        num_rows, num_octets, features_tail, tokens_tail, seed, offset, DENSE, FEATURES, TOKENS, N,
        SUMS, IN_MEMORY, DTYPE, NATIVE, FEATURES_LAYOUT, TOKENS_LAYOUT, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    if GATED:
        _write(
            y0, y1, y2, y3, second_dense_ptr, second_features_ptr, second_tokens_ptr,
            second_sums_ptr, seeds_ptr, row, row0, col0, num_rows, num_octets, features_tail,
            tokens_tail, seed, offset.to(tl.int64) + SECOND_OFFSET, DENSE, FEATURES, TOKENS, N,
            SUMS, IN_MEMORY, DTYPE, NATIVE, FEATURES_LAYOUT, TOKENS_LAYOUT, BLOCK_M, BLOCK_K,
        )  # fmt: skip
