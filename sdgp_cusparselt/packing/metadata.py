"""Write the index nibbles of a tile in the order of a layout, as device functions.

Nibbles come four operand rows to a word: byte r of quads[q, g] holds, in its upper half, the
nibble of row 4 q + r and group g. So they cross threads four at a time. A layout reaches the
kernel as a tuple of constants, ``tables.layout_table``.
"""

import triton
import triton.language as tl

from sdgp_cusparselt.packing.halves import HIGH_HALVES, LOW_HALVES, permute

# (2, 3): the pair of a group without a non-zero, and what the library pads with.
EMPTY_GROUP = tl.constexpr(0xE)
# What stands where in a layout's table.
FOUR_ROWS = tl.constexpr(0)
ROW_AXIS = tl.constexpr(1)
GROUP_AXIS = tl.constexpr(6)
SPLITS = tl.constexpr(11)
WORD_BITS = tl.constexpr(12)
ROW_STRIDES = tl.constexpr(13)
ROWS_FIRST = tl.constexpr(14)
PADDING = tl.constexpr(15)
TAIL_SHARE = tl.constexpr(16)
# What stands where in the part of a table that is about rows or about groups.
RUNS = tl.constexpr(0)
NUM_RUNS = tl.constexpr(1)
TILE_BITS = tl.constexpr(2)
BITS_IN_WORD = tl.constexpr(3)
NUM_IN_WORD = tl.constexpr(4)


@triton.jit
def stack_rows(first, second, third, fourth, NATIVE: tl.constexpr):
    """Selectors of four rows as one word: byte r is the topmost byte of row r's."""
    low = permute(first, second, 0x0073, NATIVE)
    high = permute(third, fourth, 0x0073, NATIVE)
    return permute(low, high, LOW_HALVES, NATIVE)


@triton.jit
def _words_before(index, step, LAYOUT: tl.constexpr, AXIS: tl.constexpr):
    """Words that an index contributes to an address: runs of bits, then whole tiles.

    step: words from a tile to the next along this axis.
    """
    FLAT: tl.constexpr = LAYOUT[AXIS + RUNS]
    NUM: tl.constexpr = LAYOUT[AXIS + NUM_RUNS]
    nibbles = index * 0
    for run in tl.static_range(NUM):
        nibbles += ((index >> FLAT[3 * run]) & FLAT[3 * run + 1]) * FLAT[3 * run + 2]
    return (nibbles >> LAYOUT[WORD_BITS]) + (index >> LAYOUT[AXIS + TILE_BITS]) * step


@triton.jit
def _split(
    words, LAYOUT: tl.constexpr, BIT: tl.constexpr, ALL_ROWS: tl.constexpr, ALL_COLS: tl.constexpr
):
    """The words in which the row or the group has what is bit BIT of a word clear, and the rest."""
    FLAT: tl.constexpr = LAYOUT[SPLITS]
    INNER: tl.constexpr = 1 << FLAT[4 * BIT + 1]
    ROWS: tl.constexpr = ALL_ROWS >> FLAT[4 * BIT + 2]
    COLS: tl.constexpr = ALL_COLS >> FLAT[4 * BIT + 3]
    if FLAT[4 * BIT]:
        halves = tl.reshape(words, (ROWS // (2 * INNER), 2, INNER, COLS))
        without, having = tl.split(tl.permute(halves, (0, 2, 3, 1)))
        return tl.reshape(without, (ROWS // 2, COLS)), tl.reshape(having, (ROWS // 2, COLS))
    else:
        halves = tl.reshape(words, (ROWS, COLS // (2 * INNER), 2, INNER))
        without, having = tl.split(tl.permute(halves, (0, 1, 3, 2)))
        return tl.reshape(without, (ROWS, COLS // 2)), tl.reshape(having, (ROWS, COLS // 2))


@triton.jit
def _first_in_word(COUNT: tl.constexpr, LAYOUT: tl.constexpr, AXIS: tl.constexpr):
    """The indices below COUNT whose bits inside a word are clear, in order."""
    BITS: tl.constexpr = LAYOUT[AXIS + BITS_IN_WORD]
    NUM: tl.constexpr = LAYOUT[AXIS + NUM_IN_WORD]
    index = tl.arange(0, COUNT >> NUM)
    for i in tl.static_range(NUM):
        low = index & ((1 << BITS[i]) - 1)
        index = (index - low) * 2 + low
    return index


@triton.jit
def _word_places(ptr, row, group, row0, group0, row_step, group_step, LAYOUT: tl.constexpr):
    """Pointers to the words of local rows and groups; the bits that share a word are clear."""
    # Blocks start at multiples of their size, so an address is that of the start plus a local one.
    start = _words_before(row0.to(tl.int64), row_step.to(tl.int64), LAYOUT, ROW_AXIS)
    start += _words_before(group0.to(tl.int64), group_step.to(tl.int64), LAYOUT, GROUP_AXIS)
    local = (
        _words_before(row, row_step, LAYOUT, ROW_AXIS)[:, None]
        + _words_before(group, group_step, LAYOUT, GROUP_AXIS)[None, :]
    )
    return ptr + start + local


@triton.jit
def store_metadata(
    quads,
    buffer_ptr,
    row0,
    group0,
    num_rows,
    num_groups,
    tail,
    ANY_PAIR: tl.constexpr,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Write the nibbles of ROWS rows and GROUPS groups at (row0, group0) of an operand.

    Args:
        quads: int32 [ROWS / 4, GROUPS], see the top of this module.
        buffer_ptr: pointer to int32; the operand's values, which the metadata follows.
        num_rows, num_groups: of the padded operand.
        tail: bytes of the metadata that lie beyond the layout's tiles.
        ANY_PAIR: whether a group without a non-zero may hold any pair, and not EMPTY_GROUP.
        LAYOUT: see ``tables.layout_table``.
    """
    ROW_BITS: tl.constexpr = LAYOUT[ROW_AXIS + TILE_BITS]
    GROUP_BITS: tl.constexpr = LAYOUT[GROUP_AXIS + TILE_BITS]
    TILE_WORDS: tl.constexpr = 1 << (ROW_BITS + GROUP_BITS - LAYOUT[WORD_BITS])
    row_tiles = ((num_rows - 1) >> ROW_BITS) + 1
    group_tiles = ((num_groups - 1) >> GROUP_BITS) + 1
    if LAYOUT[ROWS_FIRST]:
        row_step = row_tiles * 0 + TILE_WORDS
        group_step = row_tiles * TILE_WORDS
    else:
        row_step = group_tiles * TILE_WORDS
        group_step = group_tiles * 0 + TILE_WORDS
    if ANY_PAIR or LAYOUT[PADDING] != EMPTY_GROUP:
        quad = row0 // 4 + tl.arange(0, ROWS // 4)
        group = group0 + tl.arange(0, GROUPS)
        exists = (quad * 4 < num_rows)[:, None] & (group < num_groups)[None, :]
        quads = tl.where(exists, quads, (LAYOUT[PADDING] * 0x10101010 + 2**31) % 2**32 - 2**31)
    # Two bytes a value, two values a group.
    metadata_ptr = buffer_ptr + num_rows.to(tl.int64) * num_groups
    if LAYOUT[WORD_BITS] == 1:
        ptr = metadata_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    elif LAYOUT[WORD_BITS] == 2:
        ptr = metadata_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    else:
        ptr = metadata_ptr
    tiled_rows = row_tiles << ROW_BITS
    tiled_groups = group_tiles << GROUP_BITS
    if LAYOUT[FOUR_ROWS]:
        _store_four_rows(
            quads, ptr, row0, group0, tiled_rows, tiled_groups, row_step, group_step,
            LAYOUT, ROWS, GROUPS, NATIVE,
        )  # fmt: skip
    else:
        _store_any(
            quads, ptr, row0, group0, tiled_rows, tiled_groups, row_step, group_step,
            LAYOUT, ROWS, GROUPS,
        )  # fmt: skip
    if LAYOUT[TAIL_SHARE] > 0:
        used = row_tiles.to(tl.int64) * group_tiles << (ROW_BITS + GROUP_BITS - 1)
        _fill_tail(
            metadata_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + used,
            tail,
            LAYOUT[PADDING],
            LAYOUT[TAIL_SHARE],
        )


@triton.jit
def _fill_tail(ptr, size, NIBBLE: tl.constexpr, SHARE: tl.constexpr):
    """Write padding over the bytes beyond the tiles, each program of the launch its share."""
    program = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    program = program * tl.num_programs(0) + tl.program_id(0)
    byte = program * SHARE + tl.arange(0, SHARE)
    padding = (byte * 0 + NIBBLE * 0x11).to(tl.uint8)
    tl.store(ptr + byte, padding, mask=byte < size)


@triton.jit
def _store_four_rows(
    quads,
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
    NATIVE: tl.constexpr,
):
    """32-bit words none of whose nibbles differ in the two lowest bits of the row."""
    STRIDES: tl.constexpr = LAYOUT[ROW_STRIDES]
    Q: tl.constexpr = ROWS // 4
    # Nibble, byte and half of the word, in this order.
    even, odd = _split(quads, LAYOUT, 0, Q, GROUPS)
    pairs = (even.to(tl.uint32, bitcast=True) >> 4).to(tl.int32, bitcast=True) | odd
    even, odd = _split(pairs, LAYOUT, 1, Q, GROUPS)
    a, c = _split(even, LAYOUT, 2, Q, GROUPS)
    b, d = _split(odd, LAYOUT, 2, Q, GROUPS)
    # Four words of four rows become four rows' words: a transpose of bytes.
    ab01, ab23 = permute(a, b, 0x5140, NATIVE), permute(a, b, 0x7362, NATIVE)
    cd01, cd23 = permute(c, d, 0x5140, NATIVE), permute(c, d, 0x7362, NATIVE)
    row = _first_in_word(Q, LAYOUT, ROW_AXIS) * 4
    group = _first_in_word(GROUPS, LAYOUT, GROUP_AXIS)
    place = _word_places(ptr, row, group, row0, group0, row_step, group_step, LAYOUT)
    inside = (row0 + row < num_rows)[:, None] & (group0 + group < num_groups)[None, :]
    word0, word1 = permute(ab01, cd01, LOW_HALVES, NATIVE), permute(ab01, cd01, HIGH_HALVES, NATIVE)
    word2, word3 = permute(ab23, cd23, LOW_HALVES, NATIVE), permute(ab23, cd23, HIGH_HALVES, NATIVE)
    tl.store(place, word0, mask=inside)
    tl.store(place + STRIDES[0], word1, mask=inside)
    tl.store(place + STRIDES[1], word2, mask=inside)
    tl.store(place + (STRIDES[0] + STRIDES[1]), word3, mask=inside)


@triton.jit
def _store_any(
    quads,
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
    """Words of two, four or eight nibbles, whichever bits they differ in."""
    rows02 = tl.join((quads >> 4) & 15, (quads >> 20) & 15)
    rows13 = tl.join((quads >> 12) & 15, (quads >> 28) & 15)
    stacked = tl.permute(tl.join(rows02, rows13), (0, 2, 3, 1))
    word = tl.reshape(stacked, (ROWS, GROUPS))
    NUM: tl.constexpr = LAYOUT[WORD_BITS]
    for i in tl.static_range(NUM):
        even, odd = _split(word, LAYOUT, i, ROWS, GROUPS)
        word = even | (odd << (4 << i))
    row = _first_in_word(ROWS, LAYOUT, ROW_AXIS)
    group = _first_in_word(GROUPS, LAYOUT, GROUP_AXIS)
    place = _word_places(ptr, row, group, row0, group0, row_step, group_step, LAYOUT)
    inside = (row0 + row < num_rows)[:, None] & (group0 + group < num_groups)[None, :]
    tl.store(place, word.to(ptr.dtype.element_ty), mask=inside)
