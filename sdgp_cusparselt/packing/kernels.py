"""The Triton kernels: one read of x, packed along features, along tokens, or both.

Everything in this module runs on the device; ``launch`` checks, allocates and starts it. Tiles
are int16: a kept element is moved, never converted. ``reference`` is what each kernel must equal,
bit for bit.

Names: an operand has rows and columns, two of every four neighbours of a row are kept. Along
features the operand is x [M, K]; along tokens it is the transpose [K, M] of the same tile.
"""

import triton
import triton.language as tl

from sdgp_cusparselt.packing.selection import chosen, keep_two, narrow, split_groups, top_two, widen

# How many ratios a tile needs: none, one per column, or one per element.
NO_RATIO = tl.constexpr(0)
RATIO_PER_COLUMN = tl.constexpr(1)
RATIO_PER_ELEMENT = tl.constexpr(2)

# (2, 3): the pair of a group without a non-zero, and what the library pads with.
EMPTY_GROUP = tl.constexpr(0xE)


@triton.jit
def _address(index, step, RUNS: tl.constexpr, NUM_RUNS: tl.constexpr, TILE_BITS: tl.constexpr):
    """Nibbles that an index contributes: runs of bits (shift, mask, stride), then whole tiles."""
    total = (index >> TILE_BITS) * step
    for run in tl.static_range(NUM_RUNS):
        total += ((index >> RUNS[3 * run]) & RUNS[3 * run + 1]) * RUNS[3 * run + 2]
    return total


@triton.jit
def _spread(count: tl.constexpr, BITS: tl.constexpr, NUM: tl.constexpr):
    """0, 1, 2, ... with a zero inserted at each bit position of BITS (lowest first)."""
    index = tl.arange(0, count)
    for i in tl.static_range(NUM):
        low = index & ((1 << BITS[i]) - 1)
        index = (index - low) * 2 + low
    return index


@triton.jit
def _place_in_word(BITS: tl.constexpr, TO: tl.constexpr, NUM: tl.constexpr, SIZE: tl.constexpr):
    """The left shift, in bits, that brings each local index to its nibble of the word."""
    index = tl.arange(0, SIZE)
    shift = index * 0
    for i in tl.static_range(NUM):
        shift += ((index >> BITS[i]) & 1) << (TO[i] + 2)
    return shift


@triton.jit
def _store_metadata(
    nibbles,
    ptr,
    row0,
    group0,
    num_rows,
    num_groups,
    row_step,
    group_step,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Write nibbles [ROWS, GROUPS] at (row0, group0) in words as wide as the layout allows.

    LAYOUT: row runs, their number, row tile bits, group runs, their number, group tile bits,
    row bits that share a word, where in the word, their number, the same for groups, word bits.
    """
    R_RUNS: tl.constexpr = LAYOUT[0]
    R_NUM: tl.constexpr = LAYOUT[1]
    R_TILE: tl.constexpr = LAYOUT[2]
    G_RUNS: tl.constexpr = LAYOUT[3]
    G_NUM: tl.constexpr = LAYOUT[4]
    G_TILE: tl.constexpr = LAYOUT[5]
    R_BITS: tl.constexpr = LAYOUT[6]
    R_TO: tl.constexpr = LAYOUT[7]
    R_IN: tl.constexpr = LAYOUT[8]
    G_BITS: tl.constexpr = LAYOUT[9]
    G_TO: tl.constexpr = LAYOUT[10]
    G_IN: tl.constexpr = LAYOUT[11]
    WORD: tl.constexpr = LAYOUT[12]
    row = _spread(ROWS >> R_IN, R_BITS, R_IN)
    group = _spread(GROUPS >> G_IN, G_BITS, G_IN)
    # Blocks start at multiples of their size, so an address is that of the start plus a local one.
    start = _address(row0.to(tl.int64), row_step, R_RUNS, R_NUM, R_TILE)
    start += _address(group0.to(tl.int64), group_step, G_RUNS, G_NUM, G_TILE)
    row_address = _address(row, row_step, R_RUNS, R_NUM, R_TILE)
    group_address = _address(group, group_step, G_RUNS, G_NUM, G_TILE)
    local = row_address[:, None] + group_address[None, :]
    inside = (row0 + row < num_rows)[:, None] & (group0 + group < num_groups)[None, :]
    if WORD == 0:
        # No address bit is at home in this block: the launch zeroed the words, and or is safe.
        place = start + local
        tl.atomic_or(ptr + (place >> 3), nibbles << ((place & 7) * 4).to(tl.int32), mask=inside)
    else:
        row_shift = _place_in_word(R_BITS, R_TO, R_IN, ROWS)
        group_shift = _place_in_word(G_BITS, G_TO, G_IN, GROUPS)
        word = nibbles << (row_shift[:, None] + group_shift[None, :])
        # Lowest bit first: taking bit i out moves the next one down by one place.
        for i in tl.static_range(G_IN):
            halves = tl.reshape(word, (ROWS, GROUPS >> (1 + G_BITS[i]), 2, 1 << (G_BITS[i] - i)))
            even, odd = tl.split(tl.permute(halves, (0, 1, 3, 2)))
            word = tl.reshape(even | odd, (ROWS, GROUPS >> (i + 1)))
        for i in tl.static_range(R_IN):
            halves = tl.reshape(
                word, (ROWS >> (1 + R_BITS[i]), 2, 1 << (R_BITS[i] - i), GROUPS >> G_IN)
            )
            even, odd = tl.split(tl.permute(halves, (0, 2, 3, 1)))
            word = tl.reshape(even | odd, (ROWS >> (i + 1), GROUPS >> G_IN))
        place = (start >> WORD) + (local >> WORD)
        tl.store(ptr + place, word.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pack_direction(
    tile,
    scaled,
    seeds_ptr,
    row0,
    col0,
    values_ptr,
    metadata_ptr,
    padded_rows,
    padded_cols,
    meta_rows,
    meta_groups,
    row_step,
    group_step,
    STREAM: tl.constexpr,
    METHOD: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
    LAYOUT: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Prune and pack one tile of an operand that starts at (row0, col0)."""
    GROUPS: tl.constexpr = COLS // 4
    group0 = col0 // 4
    x0, x1, x2, x3 = chosen(
        tile,
        scaled,
        seeds_ptr,
        row0,
        group0,
        padded_cols // 16,
        STREAM,
        METHOD,
        DTYPE,
        NATIVE,
        ROWS,
        COLS,
    )
    first, second, nibbles = top_two(x0, x1, x2, x3)
    if PADDING != EMPTY_GROUP:
        row = row0 + tl.arange(0, ROWS)
        group = group0 + tl.arange(0, GROUPS)
        exists = (row < padded_rows)[:, None] & (group < padded_cols // 4)[None, :]
        nibbles = tl.where(exists, nibbles, PADDING)
    values = tl.reshape(tl.join(first, second), (ROWS, COLS // 2))
    row = row0 + tl.arange(0, ROWS)
    col = col0 // 2 + tl.arange(0, COLS // 2)
    place = values_ptr + row.to(tl.int64)[:, None] * (padded_cols // 2) + col[None, :]
    tl.store(place, values, mask=(row < padded_rows)[:, None] & (col < padded_cols // 2)[None, :])
    _store_metadata(
        nibbles,
        metadata_ptr,
        row0,
        group0,
        meta_rows,
        meta_groups,
        row_step,
        group_step,
        LAYOUT,
        ROWS,
        GROUPS,
    )


@triton.jit
def pack_kernel(
    x_ptr,
    row_stride,
    num_rows,
    num_cols,
    seeds_ptr,
    ratio_ptr,
    ratio_row_stride,
    ratio_col_stride,
    rows_per_ratio,
    values_ptr,
    metadata_ptr,
    padded_rows,
    padded_cols,
    meta_rows,
    meta_groups,
    row_step,
    group_step,
    values_t_ptr,
    metadata_t_ptr,
    meta_rows_t,
    meta_groups_t,
    row_step_t,
    group_step_t,
    sums_ptr,
    COL_BLOCKS,
    METHOD: tl.constexpr,
    METHOD_T: tl.constexpr,
    RATIO: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    SUMS: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
    LAYOUT: tl.constexpr,
    LAYOUT_T: tl.constexpr,
    PADDING: tl.constexpr,
    PADDING_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Read x [M, K] once; write what FEATURES, TOKENS and SUMS ask for."""
    block = tl.program_id(0)
    row_block, col_block = block // COL_BLOCKS, block % COL_BLOCKS
    row0, col0 = row_block * BLOCK_M, col_block * BLOCK_K
    row = row0 + tl.arange(0, BLOCK_M)
    col = col0 + tl.arange(0, BLOCK_K)
    inside = (row < num_rows)[:, None] & (col < num_cols)[None, :]
    place = x_ptr + row.to(tl.int64)[:, None] * row_stride + col[None, :]
    tile = tl.load(place, mask=inside, other=0)  # [BLOCK_M, BLOCK_K]
    if SUMS:
        total = tl.sum(widen(tile, DTYPE), 0)
        sums_place = sums_ptr + row_block.to(tl.int64) * num_cols + col
        tl.store(sums_place, total, mask=col < num_cols)
    scaled = tile
    if RATIO != NO_RATIO:
        if RATIO == RATIO_PER_COLUMN:
            sample = (row0 // rows_per_ratio).to(tl.int64) * ratio_row_stride
            ratio_place = ratio_ptr + sample + col.to(tl.int64) * ratio_col_stride
            ratio = tl.load(ratio_place, mask=col < num_cols, other=1.0)[None, :]
        else:
            sample = (row // rows_per_ratio).to(tl.int64)[:, None] * ratio_row_stride
            ratio_place = ratio_ptr + sample + col.to(tl.int64)[None, :] * ratio_col_stride
            ratio = tl.load(ratio_place, mask=inside, other=1.0)
        wide = widen(tile, DTYPE)
        product = narrow(wide * ratio, DTYPE, NATIVE)
        scaled = tl.where(tl.abs(wide) < float("inf"), product, tile)
    if FEATURES:
        _pack_direction(
            tile,
            scaled,
            seeds_ptr,
            row0,
            col0,
            values_ptr,
            metadata_ptr,
            padded_rows,
            padded_cols,
            meta_rows,
            meta_groups,
            row_step,
            group_step,
            0,
            METHOD,
            DTYPE,
            NATIVE,
            LAYOUT,
            PADDING,
            BLOCK_M,
            BLOCK_K,
        )
    if TOKENS:
        _pack_direction(
            tl.trans(tile),
            tl.trans(scaled),
            seeds_ptr,
            col0,
            row0,
            values_t_ptr,
            metadata_t_ptr,
            padded_cols,
            padded_rows,
            meta_rows_t,
            meta_groups_t,
            row_step_t,
            group_step_t,
            1,
            METHOD_T,
            DTYPE,
            NATIVE,
            LAYOUT_T,
            PADDING_T,
            BLOCK_K,
            BLOCK_M,
        )


@triton.jit
def _magnitude_mask(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where magnitude pruning along columns keeps an element of [ROWS, COLS]."""
    x0, x1, x2, x3 = split_groups(tile & 0x7FFF, ROWS, COLS)
    keep0, keep1, keep2, keep3 = keep_two(x0, x1, x2, x3)
    low = tl.join(keep0.to(tl.int16), keep2.to(tl.int16))
    high = tl.join(keep1.to(tl.int16), keep3.to(tl.int16))
    return tl.reshape(tl.join(low, high), (ROWS, COLS)) != 0


@triton.jit
def abs_sums_kernel(
    x_ptr,
    row_stride,
    rows_per_sample,
    num_cols,
    all_ptr,
    kept_ptr,
    sums_stride,
    ROW_BLOCKS,
    COL_BLOCKS,
    TOKENS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Partial sums of |x| and of the |x| that magnitude keeps, per column of the operand.

    Along features: one row of sums per block of rows, and a block never straddles two samples.
    Along tokens: one row of sums per block of columns, an entry per row of x.
    """
    block = tl.program_id(0)
    row_block, col_block = block // COL_BLOCKS, block % COL_BLOCKS
    sample, part = row_block // ROW_BLOCKS, row_block % ROW_BLOCKS
    local = part * BLOCK_M + tl.arange(0, BLOCK_M)
    row = sample.to(tl.int64) * rows_per_sample + local
    col = col_block * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (local < rows_per_sample)[:, None] & (col < num_cols)[None, :]
    tile = tl.load(x_ptr + row[:, None] * row_stride + col[None, :], mask=inside, other=0)
    size = tl.abs(widen(tile, DTYPE))
    if TOKENS:
        keep = _magnitude_mask(tl.trans(tile), BLOCK_K, BLOCK_M)
        size = tl.trans(size)
        place = col_block.to(tl.int64) * sums_stride + row
        mask = local < rows_per_sample
    else:
        keep = _magnitude_mask(tile, BLOCK_M, BLOCK_K)
        place = row_block.to(tl.int64) * sums_stride + col
        mask = col < num_cols
    tl.store(all_ptr + place, tl.sum(size, 0), mask=mask)
    tl.store(kept_ptr + place, tl.sum(tl.where(keep, size, 0.0), 0), mask=mask)
