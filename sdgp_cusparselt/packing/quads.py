"""A tile of x as quads of rows: loading, drawing, scaling, choosing, as device functions.

A tile is BLOCK_M / 4 quads. The four rows of a quad are four tensors of 32-bit words, two
neighbouring columns each, so that a thread holds whole groups of either direction: along features
neighbouring words of a row; along tokens the low halves, or the high halves, of the four rows.
"""

import triton
import triton.language as tl

from sdgp_cusparselt.packing.halves import floats_of, permute, round_halves
from sdgp_cusparselt.packing.selection import MVUE, RANDOM, RESCALED, choose

# Whether a ratio serves all rows of a block, or each row has that of its sample.
RATIO_PER_BLOCK = tl.constexpr(1)
RATIO_PER_ROW = tl.constexpr(2)


@triton.jit
def block_start(BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """First row and column of this program's block; see ``launch.grid_of``."""
    row_block = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    return row_block * BLOCK_M, tl.program_id(0) * BLOCK_K


@triton.jit
def load_row(x_ptr, row, pair, row_octets, num_rows, num_octets):
    """Two columns a word: int32 [rows, pairs], zero outside x."""
    start = row.to(tl.int64) * (row_octets * 4)
    inside = (row < num_rows)[:, None] & (pair // 4 < num_octets)[None, :]
    return tl.load(x_ptr + start[:, None] + pair[None, :], mask=inside, other=0)


@triton.jit
def draw_words(seeds_ptr, seed, offset, quad, octet, STREAM: tl.constexpr, IN_MEMORY: tl.constexpr):
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
def random_bits(word, METHOD: tl.constexpr, NATIVE: tl.constexpr):
    """The low and the high half of a random word, for one group each.

    For RANDOM the 16 bits as an integer. For MVUE they are the fraction of a float32 from 128 to
    129, whose last place is 2**-16.
    """
    if METHOD == MVUE:
        word = word.to(tl.int32, bitcast=True)
        exponent = word * 0 + 0x4300
        return permute(word, exponent, 0x5410, NATIVE), permute(word, exponent, 0x5432, NATIVE)
    else:
        return (word & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32)


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
def scale_along_features(
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
def scale_along_tokens(
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
def choose_along_features(
    x, scaled, word, METHOD: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr,
    NATIVE: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Values and selectors [R, GROUPS] of the groups of R rows; word: random, two groups a word."""
    low, high = tl.split(tl.reshape(x, (R, GROUPS, 2)))
    scaled_low, scaled_high = low, high
    if METHOD == RESCALED:
        scaled_low, scaled_high = tl.split(tl.reshape(scaled, (R, GROUPS, 2)))
    if METHOD >= RANDOM:
        left, right = random_bits(word, METHOD, NATIVE)
        word = tl.reshape(tl.join(left, right), (R, GROUPS))
    return choose(low, high, scaled_low, scaled_high, word, METHOD, N, DTYPE, NATIVE)


@triton.jit
def choose_along_tokens(
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
def words_of_columns(
    w0, w1, w2, w3, METHOD: tl.constexpr, NATIVE: tl.constexpr,
    R: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """Random bits for the even and for the odd columns [R, 4 OCTETS]: two columns a word."""
    if METHOD >= RANDOM:
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (R, OCTETS * 4))
        return random_bits(words, METHOD, NATIVE)
    else:
        return w0, w0
