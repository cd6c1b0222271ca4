"""The Triton kernels of heavy tokens: which rows they are, the packed operand, the sum at the end.

Everything here runs on the device; ``heavy_pack`` starts it and has the reference that the packed
operand equals, bit for bit. See ``heavy`` for what it is about.
"""

import triton
import triton.language as tl

from sdgp_cusparselt.packing.directions import store_values
from sdgp_cusparselt.packing.halves import floats_of, round_halves, sizes_of
from sdgp_cusparselt.packing.metadata import stack_rows, store_metadata
from sdgp_cusparselt.packing.quads import block_start, draw_words, load_row, random_bits
from sdgp_cusparselt.packing.selection import MAGNITUDE, MVUE, choose, spread

# The operand's rows and columns are multiples of 16 elements of 16 bits.
_MULTIPLE = tl.constexpr(16)
# NaN, as the largest of all energies.
_LARGEST = tl.constexpr(0x7FFFFFFF)

# Never compiled for a value: one binary serves every shape.
ENERGIES_SIZES = ("num_rows", "num_octets", "row_octets")
CHOICE_SIZES = ("num_rows", "count")
PACK_SIZES = ("num_rows", "num_extra", "num_octets", "row_octets", "tail", "seed", "offset")
SUM_SIZES = ("num_rows", "num_extra", "num_octets")


@triton.jit(do_not_specialize=ENERGIES_SIZES)
def row_energies_kernel(
    x_ptr, energies_ptr, num_rows, num_octets, row_octets,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the sum of squares of each row of x [M, K]; a program has BLOCK_M rows."""
    row = block_start(BLOCK_M, 1)[0] + tl.arange(0, BLOCK_M)
    PAIRS: tl.constexpr = BLOCK_K // 2
    total = tl.zeros((BLOCK_M, PAIRS), tl.float32)
    for start in range(0, num_octets * 4, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        low, high = sizes_of(load_row(x_ptr, row, pair, row_octets, num_rows, num_octets), DTYPE)
        total += low * low + high * high
    tl.store(energies_ptr + row, tl.sum(total, 1), mask=row < num_rows)


@triton.jit(do_not_specialize=CHOICE_SIZES)
def heaviest_kernel(energies_ptr, rows_ptr, is_heavy_ptr, num_rows, count, BLOCK: tl.constexpr):
    """Write the ``count`` rows of largest energy in order, and for each row whether it is one.

    One program that holds all energies: the least of the chosen is found bit by bit, from above.
    """
    row = tl.arange(0, BLOCK)
    inside = row < num_rows
    energy = tl.load(energies_ptr + row, mask=inside, other=0.0)
    bits = tl.where(energy == energy, energy.to(tl.int32, bitcast=True), _LARGEST)
    bits = tl.where(inside, bits, -1)
    least = count * 0
    for bit in range(31):
        trial = least | (1 << (30 - bit))
        least = tl.where(tl.sum((bits >= trial).to(tl.int32), 0) >= count, trial, least)
    above, level = (bits > least).to(tl.int32), (bits == least).to(tl.int32)
    fits = tl.cumsum(level, 0) <= count - tl.sum(above, 0)
    chosen = above | (level & fits.to(tl.int32))
    place = tl.cumsum(chosen, 0) - 1
    tl.store(rows_ptr + place, row, mask=chosen != 0)
    tl.store(is_heavy_ptr + row, chosen, mask=inside)


@triton.jit
def _choose_row(
    x, word, row, heavy, num_rows, HAS_REST: tl.constexpr,
    DTYPE: tl.constexpr, NATIVE: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Values and selectors [R, GROUPS] of R rows of the operand: drawn, the top, or the rest."""
    low, high = tl.split(tl.reshape(x, (R, GROUPS, 2)))
    left, right = random_bits(word, MVUE, NATIVE)
    word = tl.reshape(tl.join(left, right), (R, GROUPS))
    values, selector = choose(low, high, low, high, word, MVUE, 2, DTYPE, NATIVE)
    top, top_selector = choose(low, high, low, high, word, MAGNITUDE, 2, DTYPE, NATIVE)
    if HAS_REST:
        is_rest = (row >= num_rows)[:, None]
        kept_low, kept_high = spread(top, top_selector, NATIVE)
        low, high = low ^ kept_low, high ^ kept_high
        rest, rest_selector = choose(low, high, low, high, word, MAGNITUDE, 2, DTYPE, NATIVE)
        top = tl.where(is_rest, rest, top)
        top_selector = tl.where(is_rest, rest_selector, top_selector)
    is_exact = (heavy != 0)[:, None]
    return tl.where(is_exact, top, values), tl.where(is_exact, top_selector, selector)


@triton.jit
def _load_operand_row(
    x_ptr, rows_ptr, is_heavy_ptr, row, pair, num_rows, num_extra, num_octets, row_octets
):
    """The rows of x that rows of the operand are made of, and whether they are kept exactly."""
    extra = row - num_rows
    is_extra = (extra >= 0) & (extra < num_extra)
    source = tl.load(rows_ptr + extra, mask=is_extra, other=0)
    heavy = tl.load(is_heavy_ptr + row, mask=row < num_rows, other=1)
    # Rows past the extra ones are padding: past the end of x, and so zero.
    source = tl.where(is_extra, source, row)
    return load_row(x_ptr, source, pair, row_octets, num_rows, num_octets), heavy


@triton.jit
def _pack_block(
    x_ptr, operand_ptr, rows_ptr, is_heavy_ptr, row0, col0, num_rows, num_extra, num_octets,
    row_octets, tail, w0, w1, w2, w3, HAS_REST: tl.constexpr, DTYPE: tl.constexpr,
    NATIVE: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = BLOCK_M // 4
    GROUPS: tl.constexpr = BLOCK_K // 4
    row = row0 + 4 * tl.arange(0, R)
    pair = col0 // 2 + tl.arange(0, BLOCK_K // 2)
    padded_rows = (num_rows + num_extra + (_MULTIPLE - 1)) // _MULTIPLE * _MULTIPLE
    groups = (num_octets + 1) // 2 * (_MULTIPLE // 4)
    x0, h0 = _load_operand_row(
        x_ptr, rows_ptr, is_heavy_ptr, row, pair, num_rows, num_extra, num_octets, row_octets
    )
    x1, h1 = _load_operand_row(
        x_ptr, rows_ptr, is_heavy_ptr, row + 1, pair, num_rows, num_extra, num_octets, row_octets
    )
    x2, h2 = _load_operand_row(
        x_ptr, rows_ptr, is_heavy_ptr, row + 2, pair, num_rows, num_extra, num_octets, row_octets
    )
    x3, h3 = _load_operand_row(
        x_ptr, rows_ptr, is_heavy_ptr, row + 3, pair, num_rows, num_extra, num_octets, row_octets
    )
    v0, s0 = _choose_row(x0, w0, row, h0, num_rows, HAS_REST, DTYPE, NATIVE, R, GROUPS)
    store_values(v0, operand_ptr, row, col0 // 4, padded_rows, groups, GROUPS)
    v1, s1 = _choose_row(x1, w1, row + 1, h1, num_rows, HAS_REST, DTYPE, NATIVE, R, GROUPS)
    store_values(v1, operand_ptr, row + 1, col0 // 4, padded_rows, groups, GROUPS)
    v2, s2 = _choose_row(x2, w2, row + 2, h2, num_rows, HAS_REST, DTYPE, NATIVE, R, GROUPS)
    store_values(v2, operand_ptr, row + 2, col0 // 4, padded_rows, groups, GROUPS)
    v3, s3 = _choose_row(x3, w3, row + 3, h3, num_rows, HAS_REST, DTYPE, NATIVE, R, GROUPS)
    store_values(v3, operand_ptr, row + 3, col0 // 4, padded_rows, groups, GROUPS)
    store_metadata(
        stack_rows(s0, s1, s2, s3, NATIVE), operand_ptr, row0, col0 // 4, padded_rows, groups,
        tail, False, LAYOUT, BLOCK_M, GROUPS, NATIVE,
    )  # fmt: skip


@triton.jit(do_not_specialize=PACK_SIZES)
def pack_heavy_kernel(
    x_ptr, operand_ptr, rows_ptr, is_heavy_ptr, seeds_ptr,
    num_rows, num_extra, num_octets, row_octets, tail, seed, offset,
    IN_MEMORY: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pack x [M, K] by mvue as an operand of M + num_extra rows; heavy rows exactly, as pairs.

    Args:
        x_ptr, seeds_ptr, tail, IN_MEMORY: see ``kernels.pack_kernel``.
        operand_ptr: int32, the buffer to fill: values, then metadata.
        rows_ptr: int32 [num_extra], the row of x of each extra row.
        is_heavy_ptr: int32 [M], 1 for those rows and 0 for the others.
    """
    row0, col0 = block_start(BLOCK_M, BLOCK_K)
    quad = row0 // 4 + tl.arange(0, BLOCK_M // 4)
    octet = col0 // 8 + tl.arange(0, BLOCK_K // 8)
    w0, w1, w2, w3 = draw_words(seeds_ptr, seed, offset, quad, octet, 0, IN_MEMORY)
    if row0 + BLOCK_M > num_rows:
        _pack_block(
            x_ptr, operand_ptr, rows_ptr, is_heavy_ptr, row0, col0, num_rows, num_extra,
            num_octets, row_octets, tail, w0, w1, w2, w3,
            True, DTYPE, NATIVE, LAYOUT, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    else:
        _pack_block(
            x_ptr, operand_ptr, rows_ptr, is_heavy_ptr, row0, col0, num_rows, num_extra,
            num_octets, row_octets, tail, w0, w1, w2, w3,
            False, DTYPE, NATIVE, LAYOUT, BLOCK_M, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=SUM_SIZES)
def add_rest_kernel(
    product_ptr, rows_ptr, num_rows, num_extra, num_octets,
    DTYPE: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add each extra row of a product [M + extra, N] to the row that it is the rest of.

    Args:
        product_ptr: int32 words of it, two columns each; no two extra rows are of the same row.
        rows_ptr: int32 [extra].
        num_rows, num_extra, num_octets: M, the extra rows, N / 8.
    """
    extra, column = block_start(1, BLOCK)
    pair = column // 2 + tl.arange(0, BLOCK // 2)
    # Triton 3.9 does not interpret a mask made of a comparison of two scalars.
    inside = (pair // 4 < num_octets) & (pair * 0 + extra < num_extra)
    width = num_octets.to(tl.int64) * 4
    row = tl.load(rows_ptr + tl.minimum(extra, num_extra - 1))
    into = product_ptr + row.to(tl.int64) * width + pair
    rest = product_ptr + (num_rows + extra).to(tl.int64) * width + pair
    low, high = floats_of(tl.load(into, mask=inside, other=0), DTYPE)
    more_low, more_high = floats_of(tl.load(rest, mask=inside, other=0), DTYPE)
    total = round_halves(low + more_low, high + more_high, DTYPE, NATIVE)
    tl.store(into, total, mask=inside)
