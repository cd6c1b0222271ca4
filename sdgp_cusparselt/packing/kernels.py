"""The Triton kernels: one read of x, packed along features, along tokens, or both.

Everything in this module runs on the device; ``launch`` checks, allocates and starts it. Tiles
are int16: a kept element is moved, never converted. ``reference`` is what each kernel must equal,
bit for bit.

Names: an operand has rows and columns, two of every four neighbours of a row are kept. Along
features the operand is x [M, K]; along tokens it is the transpose [K, M] of the same tile.
"""

import triton
import triton.language as tl

# A group that is 2:4 already loses nothing to magnitude, so "none" needs no code of its own.
MAGNITUDE = tl.constexpr(1)
RANDOM = tl.constexpr(2)
MVUE = tl.constexpr(3)
RESCALED = tl.constexpr(4)

# How many ratios a tile needs: none, one per column, or one per element.
NO_RATIO = tl.constexpr(0)
RATIO_PER_COLUMN = tl.constexpr(1)
RATIO_PER_ELEMENT = tl.constexpr(2)

# (2, 3): the pair of a group without a non-zero, and what the library pads with.
EMPTY_GROUP = tl.constexpr(0xE)


@triton.jit
def _split_groups(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] -> the four members of each group, [ROWS, COLS / 4] each."""
    low, high = tl.split(tl.reshape(tile, (ROWS, COLS // 4, 2, 2)))
    x0, x2 = tl.split(low)
    x1, x3 = tl.split(high)
    return x0, x1, x2, x3


@triton.jit
def _two_of_three(a, b, c):
    return (a & b) | (c & (a | b))


@triton.jit
def _keep_two(k0, k1, k2, k3):
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
def _top_two(x0, x1, x2, x3):
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
def _widen(bits, DTYPE: tl.constexpr):
    """The float32 that 16 bits of DTYPE stand for."""
    if tl.bfloat16 == DTYPE:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _narrow(value, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
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
    s0, s1 = tl.abs(_widen(x0, DTYPE)), tl.abs(_widen(x1, DTYPE))
    s2, s3 = tl.abs(_widen(x2, DTYPE)), tl.abs(_widen(x3, DTYPE))
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
    amount = _narrow(tl.where(shared, half * 0.5, others), DTYPE, NATIVE)
    zero = half * 0.0
    y0 = _mvue_member(x0, _hit(zero, end0, first, second), is0 & ~shared, amount)
    y1 = _mvue_member(x1, _hit(end0, end1, first, second), is1 & ~shared, amount)
    y2 = _mvue_member(x2, _hit(end1, end2, first, second), is2 & ~shared, amount)
    y3 = _mvue_member(x3, _hit(end2, end3, first, second), is3 & ~shared, amount)
    usable = (peak < float("inf")) & (end3 < float("inf"))
    return y0, y1, y2, y3, usable


@triton.jit
def _chosen(
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
    x0, x1, x2, x3 = _split_groups(tile, ROWS, COLS)
    if METHOD == RANDOM:
        word = _group_words(seeds_ptr, row0, group0, quads, STREAM, ROWS, COLS // 4)
        keep0, keep1, keep2, keep3 = _keep_random(word)
        x0, x1 = tl.where(keep0, x0, 0), tl.where(keep1, x1, 0)
        x2, x3 = tl.where(keep2, x2, 0), tl.where(keep3, x3, 0)
    elif METHOD == RESCALED:
        keep0, keep1, keep2, keep3 = _keep_two(x0 & 0x7FFF, x1 & 0x7FFF, x2 & 0x7FFF, x3 & 0x7FFF)
        y0, y1, y2, y3 = _split_groups(scaled, ROWS, COLS)
        x0, x1 = tl.where(keep0, y0, 0), tl.where(keep1, y1, 0)
        x2, x3 = tl.where(keep2, y2, 0), tl.where(keep3, y3, 0)
    elif METHOD == MVUE:
        word = _group_words(seeds_ptr, row0, group0, quads, STREAM, ROWS, COLS // 4)
        y0, y1, y2, y3, usable = _mvue(x0, x1, x2, x3, word, DTYPE, NATIVE)
        x0, x1 = tl.where(usable, y0, x0), tl.where(usable, y1, x1)
        x2, x3 = tl.where(usable, y2, x2), tl.where(usable, y3, x3)
    return x0, x1, x2, x3


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
    x0, x1, x2, x3 = _chosen(
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
    first, second, nibbles = _top_two(x0, x1, x2, x3)
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
        total = tl.sum(_widen(tile, DTYPE), 0)
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
        wide = _widen(tile, DTYPE)
        product = _narrow(wide * ratio, DTYPE, NATIVE)
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
    x0, x1, x2, x3 = _split_groups(tile & 0x7FFF, ROWS, COLS)
    keep0, keep1, keep2, keep3 = _keep_two(x0, x1, x2, x3)
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
    size = tl.abs(_widen(tile, DTYPE))
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
