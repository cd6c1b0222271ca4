"""Where each 4-bit index pair of a 2:4 operand lies in the metadata, as strides per bit.

A group is four consecutive elements of a row; its metadata is one nibble ``i0 | i1 << 2``. Every
order that a 2:4 GEMM is known to read is a bit permutation inside a tile, and tiles follow one
another along the rows or along the groups:

    address(row, group) = sum_b row_strides[b]   * bit(row, b)
                        + sum_b group_strides[b] * bit(group, b)
                        + row_step * (row // tile_rows) + group_step * (group // tile_groups)

in nibbles from the start of the metadata, the low nibble of a byte first.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from sdgp_cusparselt.errors import value_error

Index = TypeVar("Index", int, Tensor)

# The library's rows, columns and leading dimensions of a structured operand are multiples of
# these, by element size in bytes (cuSPARSELt documentation, cusparseLtStructuredDescriptorInit).
OPERAND_MULTIPLE = {1: 32, 2: 16}

Region = tuple[tuple[int, int], ...]

#: The metadata of a plan as measured on sm86 (16-bit, cuSPARSELt 0.10.0).
PLAN_REGION: Region = ((32, 64),)
#: That of a bare matrix descriptor, which does not know its operation yet.
BARE_REGION: Region = ((32, 64), (64, 32))
#: Every rule that a library may size the metadata by: the two above, CUTLASS's, then tight ones.
REGIONS: tuple[Region, ...] = (PLAN_REGION, BARE_REGION)
REGIONS += tuple((pair,) for pair in ((64, 32), (64, 64), (128, 64), (16, 16), (32, 32)))


@dataclass(frozen=True)
class MetadataLayout:
    """A nibble order: bit strides inside a tile, the order of tiles, and the size of the region.

    Attributes:
        name: what ``sdgp info`` calls this order.
        row_strides: nibbles per bit of the row inside a tile, lowest bit first.
        group_strides: nibbles per bit of the group inside a tile, lowest bit first.
        order: the index along which the next tile in memory lies, ``"rows"`` or ``"groups"``.
        region: (row, column) multiples; the metadata takes as many bytes as the largest
            operand that one of these paddings gives.
        region_factor: how many times that; the region of 8-bit operands is twice its nibbles.
        padding: the nibble that the library writes where there is no group.

    Raises:
        ValueError: if the strides are not each power of two below the tile's size once, or
            another field is out of range.

    Source: sizes and orders of sm80 in public code (CUTLASS, xFormers) and in measurements of
        ``cusparseLtSpMMACompress``; none of them is taken for granted on a GPU.
    """

    name: str
    row_strides: tuple[int, ...]
    group_strides: tuple[int, ...]
    order: Literal["rows", "groups"] = "rows"
    region: Region = PLAN_REGION
    padding: int = 0xE
    region_factor: int = 1

    def __post_init__(self) -> None:
        strides = sorted(self.row_strides + self.group_strides)
        if not strides or strides != [1 << bit for bit in range(len(strides))]:
            raise value_error(
                "MetadataLayout",
                "row_strides + group_strides",
                "every power of two below the tile size, once",
                strides,
                "Give each row bit and each group bit of the tile its own address bit.",
            )
        if self.order not in ("rows", "groups"):
            raise value_error(
                "MetadataLayout", "order", "'rows' or 'groups'", repr(self.order), "Choose one."
            )
        if not 0 <= self.padding <= 15:
            raise value_error(
                "MetadataLayout", "padding", "a nibble, 0 to 15", self.padding, "Use 0xE."
            )
        if self.region_factor < 1:
            raise value_error(
                "MetadataLayout", "region_factor", "at least 1", self.region_factor, "Use 1."
            )
        bad = [pair for pair in self.region if len(pair) != 2 or pair[0] < 1 or pair[1] % 4]
        if bad or not self.region:
            raise value_error(
                "MetadataLayout",
                "region",
                "pairs of a row multiple and a column multiple divisible by 4",
                self.region,
                "Give at least one pair, such as (32, 64).",
            )

    @property
    def tile_rows(self) -> int:
        """Rows of one tile."""
        return 1 << len(self.row_strides)

    @property
    def tile_groups(self) -> int:
        """Groups of four columns in one tile."""
        return 1 << len(self.group_strides)

    @property
    def tile_nibbles(self) -> int:
        """Nibbles of one tile."""
        return self.tile_rows * self.tile_groups

    def tiles(self, rows: int, cols: int) -> tuple[int, int]:
        """Return how many tiles cover the rows and the groups of an operand."""
        return -(-rows // self.tile_rows), -(-(cols // 4) // self.tile_groups)

    def steps(self, rows: int, cols: int) -> tuple[int, int]:
        """Return the nibbles from a tile to the next one along the rows and along the groups."""
        row_tiles, group_tiles = self.tiles(rows, cols)
        if self.order == "rows":
            return self.tile_nibbles, self.tile_nibbles * row_tiles
        return self.tile_nibbles * group_tiles, self.tile_nibbles

    def used_nbytes(self, rows: int, cols: int) -> int:
        """Return the bytes that tiles occupy; what follows up to ``nbytes`` is padding."""
        row_tiles, group_tiles = self.tiles(rows, cols)
        return row_tiles * group_tiles * self.tile_nibbles // 2

    def nbytes(self, rows: int, cols: int) -> int:
        """Return the bytes of the whole metadata region of a [rows, cols] operand."""
        sizes = [-(-rows // r) * r * (-(-cols // c) * c // 4) for r, c in self.region]
        return -(-max(sizes) // 2) * self.region_factor

    def fitted(self, rows: int, cols: int, nbytes: int) -> tuple[MetadataLayout, ...]:
        """Return this order with every region rule that gives an operand ``nbytes`` of metadata.

        Args:
            rows: rows of the padded operand.
            cols: columns of the padded operand.
            nbytes: bytes of metadata, as the library sizes them.

        Returns:
            Layouts that fit the operand, this one's own rule first; none where its tiles do not.
        """
        tight: Region = ((self.tile_rows, 4 * self.tile_groups),)
        rules = dict.fromkeys([(self.region, self.region_factor)])
        rules |= dict.fromkeys((rule, 1) for rule in (*REGIONS, tight))
        resized = (
            dataclasses.replace(self, region=rule, region_factor=factor) for rule, factor in rules
        )
        return tuple(
            layout
            for layout in resized
            if layout.nbytes(rows, cols) == nbytes and layout.misfit(rows, cols) is None
        )

    def reads_as(self, other: MetadataLayout, rows: int, cols: int) -> bool:
        """Whether a [rows, cols] operand packed in one layout is right when read in the other."""
        if self.nbytes(rows, cols) != other.nbytes(rows, cols):
            return False
        zero = torch.zeros((), dtype=torch.int64)
        row, group = torch.arange(rows), torch.arange(cols // 4)
        return all(
            torch.equal(self.address(r, g, rows, cols), other.address(r, g, rows, cols))
            for r, g in ((row, zero), (zero, group))
        )

    def misfit(self, rows: int, cols: int) -> str | None:
        """Return why this layout cannot describe a [rows, cols] operand, or None if it can."""
        if rows < 1 or cols < 4 or cols % 4:
            return f"the operand is {rows} x {cols}, and columns come in groups of four"
        used, region = self.used_nbytes(rows, cols), self.nbytes(rows, cols)
        if used > region:
            return (
                f"tiles of {self.tile_rows} x {4 * self.tile_groups} need {used} bytes for "
                f"{rows} x {cols}, and the metadata has {region}"
            )
        return None

    def address(self, row: Index, group: Index, rows: int, cols: int) -> Index:
        """Return the nibble address of groups in the metadata of a [rows, cols] operand.

        address = the sum of bit strides and tile steps given at the top of this module

        Args:
            row: int, or int64 tensor; broadcasts against group.
            group: int, or int64 tensor, in groups of four columns.
            rows: rows of the operand.
            cols: columns of the operand.

        Returns:
            int or int64 tensor: nibbles from the start of the metadata.
        """
        row_step, group_step = self.steps(rows, cols)
        total = (row >> len(self.row_strides)) * row_step
        total = total + (group >> len(self.group_strides)) * group_step
        for index, strides in ((row, self.row_strides), (group, self.group_strides)):
            for bit, stride in enumerate(strides):
                total = total + (index >> bit & 1) * stride
        return total

    def bit_sources(self) -> tuple[tuple[str, int], ...]:
        """Return for each address bit of a tile, lowest first, ("row"|"group", bit number)."""
        source = {s: ("row", bit) for bit, s in enumerate(self.row_strides)}
        source |= {s: ("group", bit) for bit, s in enumerate(self.group_strides)}
        return tuple(source[1 << bit] for bit in range(len(source)))

    def to_json(self) -> str:
        """Return this layout as one JSON object."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MetadataLayout:
        """Return the layout that ``to_json`` wrote.

        Raises:
            ValueError: if the text is no JSON object with the fields of a layout.
        """
        fields: Any = json.loads(text)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or not {"name", "row_strides", "group_strides"} <= set(
            fields
        ):
            raise value_error(
                "MetadataLayout.from_json",
                "text",
                "a JSON object with name, row_strides and group_strides",
                text[:80],
                "Pass what to_json returned.",
            )
        known = {key: value for key, value in fields.items() if key in names}
        for key in ("row_strides", "group_strides"):
            known[key] = tuple(int(stride) for stride in known[key])
        if "region" in known:
            known["region"] = tuple((int(r), int(c)) for r, c in known["region"])
        return cls(**known)


def _words(bits: Iterable[int]) -> tuple[int, ...]:
    """Turn strides in 16-bit words, as public code writes them, into nibbles."""
    return tuple(4 * bit for bit in bits)


# CUTLASS 2.x for sm80, ColumnMajorInterleaved<2>: 64 words per 32 x 32 block,
# word = (r % 8) * 8 + (r / 16 % 2) * 4 + (c / 16 % 2) * 2 + r / 8 % 2, blocks down the rows.
PLAIN = MetadataLayout("plain", _words((8, 16, 32, 1, 4)), (1, 2, *_words((2,))))

# The same block inside tiles of 128 x 64, as measured on sm80 for 256 rows and more.
BLOCKED = MetadataLayout("blocked", _words((8, 16, 32, 1, 4, 64, 128)), (1, 2, *_words((2, 256))))

# CUTLASS 2.x for 8-bit operands: 32-bit words of eight groups in blocks of 16 x 64.
EIGHT_BIT = MetadataLayout(
    "eight-bit", (32, 64, 128, 8), (1, 2, 4, 16), region=((64, 128),), region_factor=2
)

# CUTLASS 3.x for sm90 (Sm90GemmSparseConfig, 16-bit): atoms of 64 x 32.
SM90_ATOM = MetadataLayout(
    "sm90-atom", _words((2, 4, 8, 1, 32, 64)), (1, 2, *_words((16,))), region=BARE_REGION
)

# xFormers' other order for 16 x 32 blocks: word (r % 8) * 4 + g holds rows r and r + 8,
# groups g and g + 4. Its growth is not documented; rows first, as in all the others.
SM90_INTERLEAVED = MetadataLayout("sm90-interleaved", (*_words((4, 8, 16)), 1), (4, 8, 2))

# Published for cuSPARSELt on sm90, 16-bit, up to 128 rows: tiles of 64 x 32, along the columns.
SM90_PUBLISHED = MetadataLayout(
    "sm90-published", (16, 32, 64, 1, 128, 256), (4, 8, 2), order="groups", region=BARE_REGION
)

NAMED = {
    layout.name: layout
    for layout in (PLAIN, BLOCKED, EIGHT_BIT, SM90_PUBLISHED, SM90_ATOM, SM90_INTERLEAVED)
}


def default_layout(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> MetadataLayout:
    """Return the order that cuSPARSELt is known to use on sm80, for use without a library.

    Args:
        rows: rows of the padded operand.
        cols: columns of the padded operand.
        dtype: element type of the operand.

    Returns:
        MetadataLayout: ``EIGHT_BIT`` for 8-bit operands; else ``PLAIN`` below 256 rows, and
        ``BLOCKED`` from there on where its tiles fit.
    """
    if dtype.itemsize == 1:
        return EIGHT_BIT
    if rows >= 256 and BLOCKED.misfit(rows, cols) is None:
        return BLOCKED
    return PLAIN


def padded_shape(rows: int, cols: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the operand's shape rounded up to the multiples that the library asks for."""
    multiple = OPERAND_MULTIPLE[dtype.itemsize]
    return -(-rows // multiple) * multiple, -(-cols // multiple) * multiple
