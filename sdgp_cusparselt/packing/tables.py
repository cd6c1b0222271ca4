"""A metadata layout as the constants that the kernels are compiled with."""

from __future__ import annotations

import functools
from typing import Any

from sdgp_cusparselt.packing.layout import MetadataLayout

# Bits of an address that lie inside one word: 32-bit stores, eight nibbles, are the widest.
MAX_WORD_BITS = 3

Table = tuple[Any, ...]


def word_bits(layout: MetadataLayout, row_bits: int, group_bits: int) -> int:
    """Return how many low address bits come from a block of 2**row_bits x 2**group_bits groups.

    0 means that not even the two nibbles of a byte do, so that stores would race.
    """
    bits = 0
    limits = {"row": row_bits, "group": group_bits}
    for kind, bit in layout.bit_sources()[:MAX_WORD_BITS]:
        if bit >= limits[kind]:
            break
        bits += 1
    return bits


@functools.lru_cache(maxsize=256)
def layout_table(layout: MetadataLayout, rows: int, groups: int, tail_share: int) -> Table:
    """Return what ``metadata.store_metadata`` is compiled with for one layout and block.

    Args:
        layout: the order to write.
        rows: rows of a block, a power of two.
        groups: groups per row of a block, a power of two.
        tail_share: bytes beyond the tiles that each program pads, a power of two; 0 if none.

    Returns:
        Numbers and flat tuples of them, in the order of the names at the top of ``metadata``:
        whether a word takes eight nibbles of four rows each; rows, then groups, see ``_axis``;
        the halvings that take each bit of a word out, see ``_splits``; how many; words from a row
        to the next, and to the second next; whether tiles follow one another along the rows; the
        padding nibble; tail_share.
    """
    width = word_bits(layout, rows.bit_length() - 1, groups.bit_length() - 1)
    sources = layout.bit_sources()[:width]
    four_rows = (
        width == MAX_WORD_BITS
        and len(layout.row_strides) >= 2
        and not {("row", 0), ("row", 1)} & set(sources)
    )
    first = 2 if four_rows else 0
    shared = {
        kind: tuple(sorted(bit - first * (kind == "row") for k, bit in sources if k == kind))
        for kind in ("row", "group")
    }
    strides = tuple(stride >> width for stride in layout.row_strides[:2]) if four_rows else (0, 0)
    return (
        four_rows,
        *_axis(layout.row_strides, shared["row"]),
        *_axis(layout.group_strides, shared["group"]),
        _splits(sources, first),
        width,
        strides,
        layout.order == "rows",
        layout.padding,
        tail_share,
    )


def _axis(strides: tuple[int, ...], shared: tuple[int, ...]) -> Table:
    """Return runs of bits, their number, bits of a tile, bits inside a word, their number.

    Bits inside a word are those of a quad of rows where a word takes four rows.
    """
    runs = _runs(strides)
    return (runs or (0, 0, 0), len(runs) // 3, len(strides), shared or (0,), len(shared))


def _splits(sources: tuple[tuple[str, int], ...], first: int) -> Table:
    """Return, for each bit of a word, whether it is a row's, which one, and how often rows and
    groups were halved before; flat, lowest bit first."""
    splits: list[int] = []
    taken: dict[str, list[int]] = {"row": [], "group": []}
    for kind, bit in sources:
        bit -= first if kind == "row" else 0
        # Taking a bit out moves those above it down by one.
        place = bit - sum(lower < bit for lower in taken[kind])
        splits += [kind == "row", place, len(taken["row"]), len(taken["group"])]
        taken[kind].append(bit)
    return tuple(splits)


def _runs(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Join bits whose strides double: (shift, mask, stride) of each run, flat."""
    runs: list[int] = []
    for bit, stride in enumerate(strides):
        if runs and (runs[-2] + 1) * runs[-1] == stride:
            runs[-2] = 2 * runs[-2] + 1
        else:
            runs += [bit, 1, stride]
    return tuple(runs)
