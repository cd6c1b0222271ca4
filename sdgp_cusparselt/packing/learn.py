"""Read a metadata order off a library: compress probe matrices, see where each group went."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdgp_cusparselt.packing.layout import NAMED, MetadataLayout
from sdgp_cusparselt.packing.trials import row_blocks

Compress = Callable[[Tensor], Tensor]

# Probe groups keep elements (0, 1) or (0, 2). Neither is 0xE, which the library pads with.
_ZERO, _ONE = 0x4, 0x8
# A tile may have bits that a small operand never sets, up to these counts.
_MAX_ROW_BITS, _MAX_GROUP_BITS = 7, 4


@dataclass(frozen=True)
class Learned:
    """What probing found.

    Attributes:
        candidates: every layout that explains it, the smallest tile first; they differ only in
            how they would continue beyond this shape.
        reason: why there is none, or how many probes it took.
        probes: how many matrices were compressed.
    """

    candidates: tuple[MetadataLayout, ...]
    reason: str
    probes: int


def learn(
    compress: Compress, rows: int, cols: int, dtype: torch.dtype, device: torch.device
) -> Learned:
    """Learn the order of the metadata of [rows, cols] operands.

    Two probes find the nibbles that belong to a group. Each other probe spells one bit of every
    group's row, or of its number in the row, as its pair of indices; together they name the
    group behind each nibble. They number 2 + ceil(log2(rows)) + ceil(log2(cols / 4)).

    Args:
        compress: takes a 2:4 [rows, cols] tensor, returns the library's whole buffer as uint8.
        rows: rows of the operand, as the library wants them padded.
        cols: columns of the operand, likewise.
        dtype: element type of the operand.
        device: where the operand lies.

    Returns:
        Learned: candidates, none of them proven yet.
    """
    groups = cols // 4
    row_bits, group_bits = (rows - 1).bit_length(), (groups - 1).bit_length()
    value_bytes = rows * cols // 2 * dtype.itemsize
    probes = 2 + row_bits + group_bits

    def metadata(bit: int | None, flip: bool = False) -> Tensor:
        return compress(_probe(bit, flip, row_bits, rows, groups, dtype, device))[value_bytes:]

    blank = metadata(None)
    zeros, ones = _is(blank, _ZERO), _is(metadata(None, flip=True), _ONE)
    known = zeros & ones
    source = torch.zeros(known.shape, dtype=torch.int32, device=known.device)
    for bit in range(row_bits + group_bits):
        read = metadata(bit)
        one = _is(read, _ONE)
        known &= one | _is(read, _ZERO)
        for part in row_blocks(source.numel(), 1):
            source[part] |= one[part].to(torch.int32) << bit
    found = int(known.sum())
    if found != rows * groups:
        return Learned((), f"{found} nibbles name a group, and there are {rows * groups}", probes)
    place = _places(source, known, row_bits, rows, groups)
    if place is None:
        return Learned((), "two nibbles name the same group", probes)
    for part in row_blocks(rows, groups):
        sums = place[part, :1] + place[:1] - place[0, 0]
        if not torch.equal(place[part], sums) or int(place[0, 0]):
            return Learned((), "the order is no sum of a row's and a group's place", probes)
    row_place, group_place = place[:, 0].long().cpu(), place[0].long().cpu()
    padding = _padding(blank, known)
    fits = tuple(fit(row_place, group_place, rows, cols, blank.numel(), padding))
    if not fits:
        return Learned((), "the order is no bit permutation inside tiles", probes)
    return Learned(fits, f"{probes} probes", probes)


def fit(
    row_place: Tensor, group_place: Tensor, rows: int, cols: int, nbytes: int, padding: int
) -> Iterator[MetadataLayout]:
    """Yield every layout with these places of (row, 0) and (0, group), the smallest tile first."""
    row_bits = max(_MAX_ROW_BITS, (rows - 1).bit_length())
    group_bits = max(_MAX_GROUP_BITS, (cols // 4 - 1).bit_length())
    sizes = [(a, b) for a in range(row_bits + 1) for b in range(group_bits + 1) if a + b]
    orders: tuple[Literal["rows", "groups"], ...] = ("rows", "groups")
    for a, b in sorted(sizes, key=lambda size: (sum(size), size)):
        strides = _complete(_strides(row_place, a), _strides(group_place, b))
        if strides is None:
            continue
        for order in orders:
            layout = MetadataLayout("learned", *strides, order, padding=padding)
            fitted = layout.fitted(rows, cols, nbytes)
            if fitted and _explains(layout, row_place, group_place, rows, cols):
                yield _named(fitted[0])


def _probe(
    bit: int | None,
    flip: bool,
    row_bits: int,
    rows: int,
    groups: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return [rows, 4 groups] whose groups keep (0, 2) where a bit of their name is 1, else (0, 1).

    The bits of a group's name are those of its row, then those of its number; None is 0 all over.
    """
    one = torch.tensor(flip, device=device)
    if bit is not None and bit < row_bits:
        one = torch.arange(rows, device=device)[:, None] >> bit & 1 == 1
    elif bit is not None:
        one = torch.arange(groups, device=device)[None, :] >> (bit - row_bits) & 1 == 1
    probe = torch.zeros(rows, 4 * groups, dtype=dtype, device=device)
    probe[:, 0::4] = 1
    probe[:, 1::4] = (~one).to(dtype)
    probe[:, 2::4] = one.to(dtype)
    return probe


def _is(metadata: Tensor, nibble: int) -> Tensor:
    """Return bool [2 n], which nibbles of n bytes are this one, the low nibble first."""
    return torch.stack((metadata & 15 == nibble, metadata >> 4 == nibble), 1).flatten()


def _places(source: Tensor, known: Tensor, row_bits: int, rows: int, groups: int) -> Tensor | None:
    """Return int32 [rows, groups], the nibble that names each group; None if one is not named."""
    place = torch.full((rows * groups,), -1, dtype=torch.int32, device=source.device)
    for part in row_blocks(source.numel(), 1):
        at = known[part].nonzero().squeeze(1)
        name = source[part][at]
        row, group = name & ((1 << row_bits) - 1), name >> row_bits
        if bool(((row >= rows) | (group >= groups)).any()):
            return None
        place[row.long() * groups + group] = (at + part.start).to(torch.int32)
    return None if int(place.min()) < 0 else place.view(rows, groups)


def _padding(blank: Tensor, known: Tensor) -> int:
    """Return a nibble that the library pads with, 0xE where it has no padding."""
    nibbles = torch.stack((blank & 15, blank >> 4), 1).flatten()
    found = torch.unique(nibbles[~known])
    return int(found[0]) if found.numel() else 0xE


def _strides(place: Tensor, bits: int) -> list[int | None]:
    """Return the place of each power of two, None where the operand does not reach it."""
    return [int(place[1 << i]) if 1 << i < len(place) else None for i in range(bits)]


def _complete(
    row: list[int | None], group: list[int | None]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Give bits that the operand never sets the powers of two left over; None if it is no tile."""
    seen = [stride for stride in (*row, *group) if stride is not None]
    wanted = [1 << bit for bit in range(len(row) + len(group))]
    free = iter([stride for stride in wanted if stride not in seen])
    if len(set(seen)) != len(seen) or not set(seen) <= set(wanted):
        return None
    filled = [[next(free) if s is None else s for s in strides] for strides in (row, group)]
    return tuple(filled[0]), tuple(filled[1])


def _explains(
    layout: MetadataLayout, row_place: Tensor, group_place: Tensor, rows: int, cols: int
) -> bool:
    row = torch.arange(rows)
    group = torch.arange(cols // 4)
    zero = torch.zeros((), dtype=torch.int64)
    return torch.equal(layout.address(row, zero, rows, cols), row_place) and torch.equal(
        layout.address(zero, group, rows, cols), group_place
    )


def _named(layout: MetadataLayout) -> MetadataLayout:
    """Return a known layout in place of one with the same strides, sized as that one is."""
    for known in NAMED.values():
        same = (known.row_strides, known.group_strides, known.order)
        if same == (layout.row_strides, layout.group_strides, layout.order):
            return dataclasses.replace(layout, name=known.name)
    return layout
