"""Read a metadata order off a library: compress probe matrices, see where each group went."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdgp_cusparselt.packing.layout import NAMED, MetadataLayout, default_layout

Compress = Callable[[Tensor], Tensor]

# Probe groups keep elements (0, 1) or (0, 2). Neither is 0xE, which the library pads with.
_ZERO, _ONE = 0x4, 0x8
# Sizes of the metadata region that are known: CUTLASS's and cuSPARSELt's, then tight ones.
_REGIONS = (((32, 64), (64, 32)), ((16, 16),), ((32, 32),), ((64, 64),), ((128, 64),))
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

    Probe i spells bit i of every group's row, or of its number in the row, as its pair of
    indices; together the probes name the group behind each nibble. They number
    ceil(log2(rows)) + ceil(log2(cols / 4)).

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
    index = _Index(row_bits, group_bits, rows, groups, device)
    source, known, blank = None, None, None
    for bit, probe in enumerate(index.probes(dtype)):
        nibbles = _nibbles(compress(probe)[value_bytes:])
        one = nibbles == _ONE
        spelled = one | (nibbles == _ZERO)
        if source is None or known is None:
            source, known, blank = torch.zeros_like(nibbles, dtype=torch.int64), spelled, nibbles
        known &= spelled
        source += one.to(torch.int64) << bit
    probes = row_bits + group_bits
    if source is None or known is None or blank is None:
        return Learned((), "an operand of one group has no order", 0)
    row, group = source & ((1 << row_bits) - 1), source >> row_bits
    inside = known & (row < rows) & (group < groups)
    if not torch.equal(inside, known) or int(known.sum()) != rows * groups:
        found = int(known.sum())
        return Learned((), f"{found} nibbles name a group, and there are {rows * groups}", probes)
    place = torch.full((rows * groups,), -1, dtype=torch.int64, device=source.device)
    position = known.nonzero().squeeze(1)
    place[row[position] * groups + group[position]] = position
    if int(place.min()) < 0:
        return Learned((), "two nibbles name the same group", probes)
    padding = torch.unique(blank[~known])
    if padding.numel() > 1:
        return Learned((), f"padding holds several nibbles: {padding.tolist()}", probes)
    nibble = int(padding[0]) if padding.numel() else 0xE
    table = place.view(rows, groups)
    if not torch.equal(table, table[:, :1] + table[:1] - table[0, 0]) or int(table[0, 0]):
        return Learned((), "the order is no sum of a row's and a group's place", probes)
    fits = tuple(fit(table[:, 0].cpu(), table[0].cpu(), rows, cols, source.numel() // 2, nibble))
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
            region = _region(rows, cols, nbytes, a, b)
            if region is None:
                continue
            layout = MetadataLayout("learned", *strides, order, region, padding)
            if layout.misfit(rows, cols) is None and _explains(
                layout, row_place, group_place, rows, cols
            ):
                yield _named(layout, rows, cols)


class _Index:
    """Probe matrices, one per bit of the row and then of the group."""

    def __init__(
        self, row_bits: int, group_bits: int, rows: int, groups: int, device: torch.device
    ) -> None:
        self.row = torch.arange(rows, device=device)[:, None].expand(rows, groups)
        self.group = torch.arange(groups, device=device)[None, :].expand(rows, groups)
        self.bits = [(self.row, bit) for bit in range(row_bits)]
        self.bits += [(self.group, bit) for bit in range(group_bits)]

    def probes(self, dtype: torch.dtype) -> Iterator[Tensor]:
        for index, bit in self.bits:
            one = (index >> bit & 1).to(torch.float32)
            members = (torch.ones_like(one), 1 - one, one, torch.zeros_like(one))
            yield torch.stack(members, -1).flatten(1).to(dtype)


def _nibbles(metadata: Tensor) -> Tensor:
    return torch.stack((metadata & 15, metadata >> 4), 1).flatten()


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


def _region(
    rows: int, cols: int, nbytes: int, row_bits: int, group_bits: int
) -> tuple[tuple[int, int], ...] | None:
    """Return the first known rule that gives the metadata its size."""
    tile = ((1 << row_bits, 4 << group_bits),)
    for region in (*_REGIONS, tile):
        probe = MetadataLayout("size", (), (1,), region=region)
        if probe.nbytes(rows, cols) == nbytes:
            return region
    return None


def _explains(
    layout: MetadataLayout, row_place: Tensor, group_place: Tensor, rows: int, cols: int
) -> bool:
    row = torch.arange(rows)
    group = torch.arange(cols // 4)
    zero = torch.zeros((), dtype=torch.int64)
    return torch.equal(layout.address(row, zero, rows, cols), row_place) and torch.equal(
        layout.address(zero, group, rows, cols), group_place
    )


def _named(layout: MetadataLayout, rows: int, cols: int) -> MetadataLayout:
    """Return a known layout in place of one with the same strides."""
    fields = (layout.row_strides, layout.group_strides, layout.order, layout.region)
    for known in (default_layout(rows, cols), *NAMED.values()):
        same = (known.row_strides, known.group_strides, known.order, known.region) == fields
        if same and known.padding == layout.padding:
            return known
    return layout
