"""What pack kernels are compiled for: block sizes, and everything else that is a constant.

A variant is all that the machine code depends on. Sizes, strides, pointers and seeds are not part
of it: one variant serves every shape with enough rows and columns for its block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sdgp_cusparselt.packing.layout import MetadataLayout
from sdgp_cusparselt.packing.tables import MAX_WORD_BITS, layout_table

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
# Blocks must divide the operand's multiple of 16 in both directions.
MIN_BLOCK = 16
# The largest side of a block that a layout may ask for, in elements.
MAX_BLOCK = 256
METHOD_CODES = {"none": 1, "magnitude": 1, "rescaled_magnitude": 2, "random": 3, "mvue": 4}
# Blocks that one program of the sums reads before it writes: 8 bytes of sums per column.
SUM_STEPS = 8
NO_RATIO, RATIO_PER_BLOCK, RATIO_PER_ROW = 0, 1, 2
PRODUCER_CODES = {
    "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4, "relu_squared": 5, "cross_entropy": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """Block sizes in tokens and features, and warps, of one launch."""

    block_m: int
    block_k: int
    num_warps: int


@dataclass(frozen=True)
class Target:
    """One direction to write.

    Attributes:
        method: how to prune.
        layout: in which order the metadata goes.
        tail_share: bytes beyond the layout's tiles that each program pads; 0 if there are none.
    """

    method: str
    layout: MetadataLayout
    tail_share: int = 0


@dataclass(frozen=True)
class PackVariant:
    """All constants of ``kernels.pack_kernel``.

    Attributes:
        dtype: of x.
        features: how to pack x along features, or None.
        tokens: how to pack x along tokens, or None.
        tile: blocks and warps.
        n: values kept of four, 1 or 2.
        ratio: NO_RATIO, RATIO_PER_BLOCK or RATIO_PER_ROW, for features by rescaled_magnitude.
        column_sums: whether x is summed over the rows of each block.
        seeds_in_memory: whether seeds are read from the device, for CUDA graphs.
    """

    dtype: torch.dtype
    features: Target | None
    tokens: Target | None
    tile: Tile
    n: int = 2
    ratio: int = NO_RATIO
    column_sums: bool = False
    seeds_in_memory: bool = False

    def constants(self, native: bool) -> dict[str, Any]:
        """Return the kernel's constants by name; native as in ``halves``."""
        block_m, block_k = self.tile.block_m, self.tile.block_k
        return {
            "FEATURES": _code(self.features),
            "TOKENS": _code(self.tokens),
            "N": self.n,
            "RATIO": self.ratio,
            "SUMS": self.column_sums,
            "IN_MEMORY": self.seeds_in_memory,
            "DTYPE": triton_dtype(self.dtype),
            "NATIVE": native,
            "FEATURES_LAYOUT": _table(self.features, block_m, block_k // 4),
            "TOKENS_LAYOUT": _table(self.tokens, block_k, block_m // 4),
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
        }


@dataclass(frozen=True)
class ProducerKind:
    """What a gradient is made of.

    Attributes:
        name: an activation, or cross_entropy.
        gated: whether a second factor makes a second gradient.
        masked: whether dropout's mask is read.
    """

    name: str
    gated: bool = False
    masked: bool = False

    def tile(self, tile: Tile) -> Tile:
        """Return the blocks of a pack with the warps that making needs.

        Two gradients at once take twice the registers: with the warps of one they would use the
        stack.
        """
        return replace(tile, num_warps=2 * tile.num_warps) if self.gated else tile


@dataclass(frozen=True)
class ProducedVariant:
    """All constants of ``produced.produced_kernel``.

    Attributes:
        kind: what the gradient is made of.
        dense: whether it is written as it is.
        pack: how it is packed and summed, of any method but rescaled_magnitude.
    """

    kind: ProducerKind
    dense: bool
    pack: PackVariant

    def constants(self, native: bool) -> dict[str, Any]:
        """Return the kernel's constants by name; native as in ``halves``."""
        own = {
            "PRODUCER": PRODUCER_CODES[self.kind.name],
            "GATED": self.kind.gated,
            "MASKED": self.kind.masked,
            "DENSE": self.dense,
        }
        packed = self.pack.constants(native)
        del packed["RATIO"]
        return own | packed


@dataclass(frozen=True)
class PruneVariant:
    """All constants of ``kernels.prune_kernel``.

    Attributes:
        dtype: of x.
        method: how to prune.
        tokens: whether groups run along tokens; else along features.
        n: values kept of four.
        ratio: see ``PackVariant``.
        seeds_in_memory: see ``PackVariant``.
    """

    dtype: torch.dtype
    method: str
    tokens: bool
    n: int = 2
    ratio: int = NO_RATIO
    seeds_in_memory: bool = False

    @property
    def tile(self) -> Tile:
        """Blocks and warps."""
        return Tile(32, 256, 4)

    def constants(self, native: bool) -> dict[str, Any]:
        """Return the kernel's constants by name; native as in ``halves``."""
        return {
            "METHOD": METHOD_CODES[self.method],
            "ALONG_TOKENS": self.tokens,
            "N": self.n,
            "RATIO": self.ratio,
            "IN_MEMORY": self.seeds_in_memory,
            "DTYPE": triton_dtype(self.dtype),
            "NATIVE": native,
            "BLOCK_M": self.tile.block_m,
            "BLOCK_K": self.tile.block_k,
        }


@dataclass(frozen=True)
class SumsVariant:
    """All constants of the kernels that sum |x| for rescaled_magnitude.

    Attributes:
        dtype: of x.
        tokens: whether groups run along tokens and sums along features; else the reverse.
        n: values kept of four.
    """

    dtype: torch.dtype
    tokens: bool
    n: int = 2

    @property
    def kernel(self) -> str:
        """Name of the kernel."""
        return "tokens_sums_kernel" if self.tokens else "features_sums_kernel"

    @property
    def tile(self) -> Tile:
        """Blocks and warps."""
        return Tile(64, 64, 4) if self.tokens else Tile(16, 256, 4)

    @property
    def span(self) -> int:
        """Rows along features, or columns along tokens, that one program sums."""
        return SUM_STEPS * (self.tile.block_k if self.tokens else self.tile.block_m)

    def constants(self) -> dict[str, Any]:
        """Return the kernel's constants by name."""
        return {
            "N": self.n,
            "STEPS": SUM_STEPS,
            "DTYPE": triton_dtype(self.dtype),
            "BLOCK_M": self.tile.block_m,
            "BLOCK_K": self.tile.block_k,
        }


def choose_tile(
    num_rows: int, num_cols: int, features: Target | None, tokens: Target | None
) -> Tile:
    """Return the blocks for an x of that size: as counted fastest, small x in smaller ones.

    Blocks along features are wide, so that every row is read and written in whole cache lines;
    with tokens they are square, for the transpose's rows as well.
    """
    tile = Tile(32, 256, 4) if tokens is None else Tile(64, 64, 2)
    block_m = min(tile.block_m, _cover(num_rows, tile.block_m))
    block_k = min(tile.block_k, _cover(num_cols, tile.block_k))
    for target, transposed in ((features, False), (tokens, True)):
        if target is not None:
            rows, cols = block_for(target.layout)
            block_m = max(block_m, cols if transposed else rows)
            block_k = max(block_k, rows if transposed else cols)
    # On sm_80 two warps have too few registers for these two at once and would use the stack.
    crowded = (
        features is not None
        and tokens is not None
        and (features.method, tokens.method) == ("rescaled_magnitude", "mvue")
    )
    return Tile(block_m, block_k, 4 if crowded else tile.num_warps)


def block_for(layout: MetadataLayout) -> tuple[int, int]:
    """Return the rows and columns that a block needs so that whole words of a layout lie in it."""
    sides = {"row": 1, "group": 4}
    for kind, bit in layout.bit_sources()[:MAX_WORD_BITS]:
        side = (2 << bit) * (4 if kind == "group" else 1)
        if side > MAX_BLOCK:
            break
        sides[kind] = max(sides[kind], side)
    return sides["row"], sides["group"]


def layout_obstacle(layout: MetadataLayout) -> str | None:
    """Return why no block holds whole bytes of a layout's metadata, or None."""
    kind, bit = layout.bit_sources()[0]
    side = (2 << bit) * (4 if kind == "group" else 1)
    if side <= MAX_BLOCK:
        return None
    return f"layout {layout.name!r} joins in one byte what lies {side // 2} {kind}s apart"


def triton_dtype(dtype: torch.dtype) -> Any:
    """Return Triton's name of a dtype."""
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _code(target: Target | None) -> int:
    return 0 if target is None else METHOD_CODES[target.method]


def _table(target: Target | None, rows: int, groups: int) -> tuple[Any, ...]:
    return (0,) if target is None else layout_table(target.layout, rows, groups, target.tail_share)


def _cover(size: int, limit: int) -> int:
    """Return the power of two from MIN_BLOCK to limit that covers size, or limit."""
    block = MIN_BLOCK
    while block < min(size, limit):
        block *= 2
    return block
