"""Start the pack kernels: tile sizes, grids, and a layout as the compile-time table they read.

Nothing here decides or checks for the user: ``pack`` does, and calls this with arguments that
are known to be right.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt.packing.layout import MetadataLayout, padded_shape
from sdgp_cusparselt.packing.packed import Packed24

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
# Bits of an address that lie inside one word: 32-bit stores, eight nibbles, are the widest.
MAX_WORD_BITS = 3
# Blocks must divide the operand's multiple of 16 in both directions, for the Philox counters.
MIN_BLOCK = 16


@dataclass(frozen=True)
class Tile:
    """Block sizes in tokens and features, and warps, of one launch."""

    block_m: int
    block_k: int
    num_warps: int


@dataclass(frozen=True)
class Direction:
    """One operand to write: where, by which method, and whether it is the transpose of x."""

    packed: Packed24
    method: str
    transposed: bool


@functools.cache
def kernels() -> ModuleType | None:
    """Return the kernel module, or None where Triton cannot be imported."""
    if importlib.util.find_spec("triton") is None:
        return None
    from sdgp_cusparselt.packing import kernels as module

    return module


def interpreted() -> bool:
    """Whether the kernels were imported under Triton's interpreter, and so run on a CPU."""
    module = kernels()
    return module is not None and type(module.pack_kernel).__name__ == "InterpretedFunction"


def choose_tile(num_rows: int, num_cols: int, both: bool, heavy: bool) -> Tile:
    """Return block sizes: wide rows for one direction, nearly square for both.

    heavy methods (mvue, random) hold a dozen more registers per group and get smaller blocks.
    """
    block_m, block_k, num_warps = (64, 64, 4) if both else (32, 128, 4)
    if heavy:
        block_m //= 2
    return Tile(
        min(block_m, _cover(num_rows, block_m)), min(block_k, _cover(num_cols, block_k)), num_warps
    )


def word_bits(layout: MetadataLayout, row_bits: int, group_bits: int, nbytes: int) -> int:
    """Return how many low address bits come from a block of 2**row_bits x 2**group_bits groups.

    0 means that not even the two nibbles of a byte do, so that stores would race.
    """
    bits = 0
    limits = {"row": row_bits, "group": group_bits}
    for kind, bit in layout.bit_sources()[:MAX_WORD_BITS]:
        if bit >= limits[kind]:
            break
        bits += 1
    while bits > 1 and nbytes % (1 << bits >> 1):
        bits -= 1
    return bits


@functools.lru_cache(maxsize=256)
def layout_table(
    layout: MetadataLayout, rows: int, groups: int, nbytes: int
) -> tuple[tuple[Any, ...], int]:
    """Return the compile-time tuple that ``kernels._store_metadata`` reads, and its word bits.

    Args:
        layout: the order to write.
        rows: rows of a block, a power of two.
        groups: groups per row of a block, a power of two.
        nbytes: bytes of the metadata region.
    """
    width = word_bits(layout, rows.bit_length() - 1, groups.bit_length() - 1, nbytes)
    sources = layout.bit_sources()[:width]
    table: list[Any] = []
    for strides in (layout.row_strides, layout.group_strides):
        runs = _runs(strides)
        table += [runs or (0, 0, 0), len(runs) // 3, len(strides)]
    for kind in ("row", "group"):
        shared = sorted((bit, to) for to, (where, bit) in enumerate(sources) if where == kind)
        table += [
            tuple(bit for bit, _ in shared) or (0,),
            tuple(to for _, to in shared) or (0,),
            len(shared),
        ]
    return (*table, width), width


def launch_pack(
    x: Tensor,
    wanted: Sequence[Direction],
    *,
    ratio: Tensor | None = None,
    rows_per_ratio: int = 1,
    seeds: Tensor | None = None,
    column_sums: bool = False,
) -> Tensor | None:
    """Write every direction asked for from one read of x.

    Args:
        x: [M, K] float16|bfloat16, columns adjacent in memory.
        wanted: the operand x, the operand x.T, or one of each.
        ratio: float32 [samples or 1 or M, K or 1], for rescaled_magnitude.
        rows_per_ratio: rows of x that share a row of ratio.
        seeds: int64 [2], for random and mvue.
        column_sums: whether to return the sums of x over blocks of rows.

    Returns:
        float32 [row blocks, K] if column_sums, else None.
    """
    module = kernels()
    if module is None:
        raise ModuleNotFoundError("launch_pack: needs triton. Install it, or use the reference.")
    features = next((direction for direction in wanted if not direction.transposed), None)
    tokens = next((direction for direction in wanted if direction.transposed), None)
    num_rows, num_cols = x.shape
    heavy = any(direction.method in ("random", "mvue") for direction in wanted)
    covered_m, covered_k = _covered(x, features, tokens)
    tile = choose_tile(covered_m, covered_k, len(wanted) == 2, heavy)
    row_blocks, col_blocks = -(-covered_m // tile.block_m), -(-covered_k // tile.block_k)
    sums = x.new_empty((row_blocks, num_cols), dtype=torch.float32) if column_sums else None
    ratio_kind, ratio_strides = _ratio_kind(ratio, rows_per_ratio, num_rows, tile)
    bits = x.view(torch.int16)
    spare = bits  # a pointer that the kernel never follows
    ordinary = _direction_arguments(features, spare, tile.block_m, tile.block_k)
    transposed = _direction_arguments(tokens, spare, tile.block_k, tile.block_m)
    padded = padded_shape(num_rows, num_cols, x.dtype)
    grid = (row_blocks * col_blocks,)
    module.pack_kernel[grid](
        bits,
        x.stride(0),
        num_rows,
        num_cols,
        spare if seeds is None else seeds,
        spare if ratio is None else ratio,
        *ratio_strides,
        rows_per_ratio,
        *ordinary.pointers,
        *padded,
        *ordinary.sizes,
        *transposed.pointers,
        *transposed.sizes,
        spare if sums is None else sums,
        col_blocks,
        METHOD=_method_code(features),
        METHOD_T=_method_code(tokens),
        RATIO=ratio_kind,
        FEATURES=features is not None,
        TOKENS=tokens is not None,
        SUMS=column_sums,
        DTYPE=_triton_dtype(x.dtype),
        NATIVE=not interpreted(),
        LAYOUT=ordinary.table,
        LAYOUT_T=transposed.table,
        PADDING=ordinary.padding,
        PADDING_T=transposed.padding,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        # The reference rounds after every operation, and so must the kernel.
        enable_fp_fusion=False,
    )
    return sums


def launch_abs_sums(x: Tensor, transpose: bool, rows_per_sample: int) -> tuple[Tensor, Tensor]:
    """Return sums of |x| and of the |x| that magnitude keeps, per column of the operand.

    Args:
        x: [M, K] float16|bfloat16, columns adjacent in memory.
        transpose: prune along tokens and sum over features; else along features over tokens.
        rows_per_sample: rows of x that are summed together; M when transposed.

    Returns:
        two float32 [samples, K], or [1, M] when transposed.
    """
    module = kernels()
    if module is None:
        raise ModuleNotFoundError("launch_abs_sums: needs triton. Install it first.")
    num_rows, num_cols = x.shape
    tile = choose_tile(rows_per_sample, num_cols, transpose, False)
    samples = num_rows // rows_per_sample
    row_blocks = -(-rows_per_sample // tile.block_m)
    col_blocks = -(-num_cols // tile.block_k)
    shape = (col_blocks, num_rows) if transpose else (samples * row_blocks, num_cols)
    total, kept = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    module.abs_sums_kernel[(samples * row_blocks * col_blocks,)](
        x.view(torch.int16),
        x.stride(0),
        rows_per_sample,
        num_cols,
        total,
        kept,
        shape[1],
        row_blocks,
        col_blocks,
        TOKENS=transpose,
        DTYPE=_triton_dtype(x.dtype),
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
    )
    if transpose:
        return total.sum(0, keepdim=True), kept.sum(0, keepdim=True)
    parts = (samples, row_blocks, num_cols)
    return total.view(parts).sum(1), kept.view(parts).sum(1)


@dataclass(frozen=True)
class _Arguments:
    pointers: tuple[Tensor, Tensor]
    sizes: tuple[int, int, int, int]
    table: tuple[Any, ...]
    padding: int


def _direction_arguments(
    direction: Direction | None, spare: Tensor, block_rows: int, block_cols: int
) -> _Arguments:
    """Return one direction's kernel arguments; the padding that no block writes is filled here."""
    if direction is None:
        return _Arguments((spare, spare), (0, 0, 0, 0), (0,), 0xE)
    packed = direction.packed
    layout, (rows, cols) = packed.layout, packed.padded_shape
    metadata = packed.metadata
    table, width = layout_table(layout, block_rows, block_cols // 4, metadata.numel())
    used = layout.used_nbytes(rows, cols)
    if used < metadata.numel():
        metadata[used:].fill_(layout.padding * 0x11)
    if width == 0:
        metadata[:used].zero_()
    words = {0: torch.int32, 1: torch.uint8, 2: torch.int16, 3: torch.int32}[width]
    row_tiles, group_tiles = layout.tiles(rows, cols)
    sizes = (
        row_tiles * layout.tile_rows,
        group_tiles * layout.tile_groups,
        *layout.steps(rows, cols),
    )
    pointers = (packed.values.view(torch.int16), metadata.view(words))
    return _Arguments(pointers, sizes, table, layout.padding)


def _covered(x: Tensor, features: Direction | None, tokens: Direction | None) -> tuple[int, int]:
    """Return rows and columns of x that blocks must cover so that all padding is written."""
    rows, cols = x.shape
    if features is not None:
        layout, shape = features.packed.layout, features.packed.padded_shape
        row_tiles, group_tiles = layout.tiles(*shape)
        rows = max(rows, shape[0], row_tiles * layout.tile_rows)
        cols = max(cols, shape[1], group_tiles * layout.tile_groups * 4)
    if tokens is not None:
        layout, shape = tokens.packed.layout, tokens.packed.padded_shape
        row_tiles, group_tiles = layout.tiles(*shape)
        rows = max(rows, shape[1], group_tiles * layout.tile_groups * 4)
        cols = max(cols, shape[0], row_tiles * layout.tile_rows)
    return rows, cols


def _cover(size: int, limit: int) -> int:
    """Return the power of two from MIN_BLOCK to limit that covers size, or limit."""
    block = MIN_BLOCK
    while block < min(size, limit):
        block *= 2
    return block


def _runs(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Join bits whose strides double: (shift, mask, stride) of each run, flat."""
    runs: list[int] = []
    for bit, stride in enumerate(strides):
        if runs and (runs[-2] + 1) * runs[-1] == stride:
            runs[-2] = 2 * runs[-2] + 1
        else:
            runs += [bit, 1, stride]
    return tuple(runs)


def _ratio_kind(
    ratio: Tensor | None, rows_per_ratio: int, num_rows: int, tile: Tile
) -> tuple[int, tuple[int, int]]:
    """Return how the kernel reads ratio, and its strides; a broadcast dimension has stride 0."""
    module = kernels()
    assert module is not None  # launch_pack raised otherwise
    if ratio is None:
        return module.NO_RATIO.value, (0, 0)
    strides = tuple(
        0 if size == 1 else stride for size, stride in zip(ratio.shape, ratio.stride(), strict=True)
    )
    whole = rows_per_ratio % tile.block_m == 0 or rows_per_ratio >= num_rows
    kind = module.RATIO_PER_COLUMN if whole else module.RATIO_PER_ELEMENT
    return kind.value, (strides[0], strides[1])


def _method_code(direction: Direction | None) -> int:
    from sdgp_cusparselt.packing import selection

    codes = {
        "none": selection.MAGNITUDE,
        "magnitude": selection.MAGNITUDE,
        "random": selection.RANDOM,
        "mvue": selection.MVUE,
        "rescaled_magnitude": selection.RESCALED,
    }
    code: int = codes["none" if direction is None else direction.method].value
    return code


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
