"""Start the pack kernels: resolved once into a prepared call, then as cheap as a launch can be.

Nothing here decides or checks for the user: ``pack`` does, and calls this with arguments that
are known to be right.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdgp_cusparselt.config.patterns import STOCHASTIC
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.packing.layout import MetadataLayout, padded_shape
from sdgp_cusparselt.packing.packed import buffer_nbytes
from sdgp_cusparselt.packing.starting import grid_of, interpreted, prepare_kernel
from sdgp_cusparselt.packing.variants import (
    NO_RATIO,
    RATIO_PER_BLOCK,
    RATIO_PER_ROW,
    PackVariant,
    PruneVariant,
    Target,
    Tile,
    choose_tile,
)

# Columns of an octet; its 16 bytes are what every row's start is a multiple of.
OCTET = 8
# The fewest bytes of a metadata region's tail that a program pads.
_MIN_SHARE = 64


def is_aligned(x: Tensor) -> bool:
    """Whether the kernels can read x as it is: rows of whole octets, adjacent columns."""
    return (
        x.stride(1) == 1
        and x.shape[1] % OCTET == 0
        and x.stride(0) % OCTET == 0
        and x.data_ptr() % (OCTET * x.element_size()) == 0
    )


def aligned(x: Tensor) -> Tensor:
    """Return x, or one copy of it with zeros up to whole octets, that the kernels can read."""
    if is_aligned(x):
        return x
    rows, cols = x.shape
    width = -(-cols // OCTET) * OCTET
    copy = x.new_empty((rows, width))
    copy[:, :cols] = x
    copy[:, cols:].zero_()
    return copy


@dataclass(frozen=True)
class PreparedPack:
    """One way of packing one shape, resolved: a compiled kernel, its grid and its sizes.

    Attributes:
        width: columns of the x that is read: K rounded up to an octet.
        sums_shape: float32 [row blocks, width] of the partial column sums, or None.
        features_nbytes: bytes of the operand along features, 0 if there is none.
        tokens_nbytes: bytes of the operand along tokens, likewise.
        draws: whether seed and offset matter.
        seeds_in_memory: whether they are read from ``seeds`` on the device.
    """

    width: int
    sums_shape: tuple[int, int] | None
    features_nbytes: int
    tokens_nbytes: int
    draws: bool
    seeds_in_memory: bool
    _start: Callable[..., None]

    def __call__(
        self,
        x: int,
        features: int,
        tokens: int,
        seed: int,
        offset: int,
        stream: int,
        *,
        seeds: int = 0,
        features_ratio: int = 0,
        tokens_ratio: int = 0,
        sums: int = 0,
    ) -> None:
        """Pack on a stream of the device that this was prepared for, which must be current.

        Args:
            x: address of x, a multiple of 16; its shape and strides are those prepared for.
            features: address of the buffer to fill along features; 0 if there is none.
            tokens: address of the buffer to fill along tokens; 0 if there is none.
            seed: int64, for random and mvue.
            offset: int64; a seed and an offset give the same draws for ever. Only its low 62 bits
                count.
            stream: handle of the CUDA stream.
            seeds: address of int64 [2] on the device, a seed and an offset that is added to
                ``offset``; needed, and read, if ``seeds_in_memory``.
            features_ratio: address of float32 [samples, width].
            tokens_ratio: address of float32 [M].
            sums: address of float32 [*sums_shape].
        """
        self._start(
            stream, x, features, tokens, features_ratio, tokens_ratio, sums, seeds, seed, offset
        )


@dataclass(frozen=True)
class PreparedPrune:
    """One way of pruning one shape to a dense tensor, resolved.

    Attributes:
        draws: whether seed and offset matter.
        seeds_in_memory: whether they are read from ``seeds`` on the device.
    """

    draws: bool
    seeds_in_memory: bool
    _start: Callable[..., None]

    def __call__(
        self,
        x: int,
        out: int,
        seed: int,
        offset: int,
        stream: int,
        *,
        seeds: int = 0,
        ratio: int = 0,
    ) -> None:
        """Prune on a stream of the device that this was prepared for, which must be current.

        Args:
            x: address of x, a multiple of 16.
            out: address of [M, width] of x's dtype, without gaps; not x itself.
            seed, offset, stream, seeds: see ``PreparedPack``.
            ratio: address of float32 [samples, width] along features, [M] along tokens.
        """
        self._start(stream, x, out, ratio, seeds, seed, offset)


@functools.lru_cache(maxsize=1024)
def prepare_pack(
    shape: tuple[int, int],
    row_stride: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    features: str | None = None,
    tokens: str | None = None,
    features_layout: MetadataLayout | None = None,
    tokens_layout: MetadataLayout | None = None,
    n: int = 2,
    column_sums: bool = False,
    rows_per_ratio: int | None = None,
    seeds_in_memory: bool = False,
) -> PreparedPack:
    """Resolve a pack once: blocks, grid, the compiled kernel, the constants of every later call.

    Args:
        shape: [M, K] of x. Columns are adjacent; where K is no multiple of 8, x is a copy whose
            rows are zero up to one (``aligned``).
        row_stride: elements from a row of x to the next, a multiple of 8.
        dtype: float16 or bfloat16.
        device: where x lies; with an index, the device for which the kernel is compiled.
        features: method of the operand x, or None.
        tokens: method of the operand x.T, or None.
        features_layout: order of its metadata.
        tokens_layout: order of its metadata.
        n: values kept of four, 1 or 2.
        column_sums: whether to sum x over blocks of rows.
        rows_per_ratio: rows of x that share a row of ``features_ratio``; all of them if None.
        seeds_in_memory: whether seeds are read from the device, as under graph capture.

    Returns:
        PreparedPack: the same object for the same arguments, up to 1024 of them.

    Raises:
        ValueError: a row stride that is not whole octets, or a layout that does not fit.
        ModuleNotFoundError: where Triton cannot be imported.
    """
    num_rows, num_cols = shape
    if row_stride % OCTET:
        rule = f"a multiple of {OCTET}"
        raise value_error("prepare_pack", "row_stride", rule, row_stride, "Copy x: aligned(x).")
    along_features = target_of(features, features_layout)
    along_tokens = target_of(tokens, tokens_layout)
    blocks = blocks_of(shape, dtype, along_features, along_tokens)
    tile, grid = blocks.tile, blocks.grid
    rows_per_ratio = num_rows if rows_per_ratio is None else rows_per_ratio
    width = -(-num_cols // OCTET) * OCTET
    variant = PackVariant(
        dtype,
        blocks.features,
        blocks.tokens,
        tile,
        n,
        _ratio_kind(features, rows_per_ratio, num_rows, tile.block_m),
        column_sums,
        seeds_in_memory,
    )
    start = prepare_kernel(
        "pack_kernel",
        device,
        grid,
        (num_rows, width // OCTET, row_stride // OCTET, rows_per_ratio, *blocks.tails),
        variant.constants(native=not interpreted()),
        tile.num_warps,
    )
    return PreparedPack(
        width,
        (grid[1] * grid[2], width) if column_sums else None,
        *operand_nbytes(shape, dtype, along_features, along_tokens),
        features in STOCHASTIC or tokens in STOCHASTIC,
        seeds_in_memory,
        start,
    )


@functools.lru_cache(maxsize=1024)
def prepare_prune(
    shape: tuple[int, int],
    row_stride: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    method: str,
    tokens: bool = False,
    n: int = 2,
    rows_per_ratio: int | None = None,
    seeds_in_memory: bool = False,
) -> PreparedPrune:
    """Resolve once a prune of x that writes a dense tensor.

    Args:
        shape: [M, width] of x as ``aligned`` returns it, width a multiple of 8.
        row_stride: elements from a row of x to the next, a multiple of 8.
        dtype: float16 or bfloat16.
        device: where x lies.
        method: how to prune.
        tokens: whether groups run along tokens; else along features.
        n: values kept of four, 1 or 2.
        rows_per_ratio: rows of x that share a row of ratios along features; all if None.
        seeds_in_memory: see ``prepare_pack``.

    Returns:
        PreparedPrune: the same object for the same arguments, up to 1024 of them.

    Raises:
        ValueError: a width or a row stride that is not whole octets.
        ModuleNotFoundError: where Triton cannot be imported.
    """
    num_rows, width = shape
    for name, value in (("width", width), ("row_stride", row_stride)):
        if value % OCTET:
            rule = f"a multiple of {OCTET}"
            raise value_error("prepare_prune", name, rule, value, "Copy x: aligned(x).")
    rows_per_ratio = num_rows if rows_per_ratio is None else rows_per_ratio
    variant = PruneVariant(dtype, method, tokens, n, seeds_in_memory=seeds_in_memory)
    tile = variant.tile
    if not tokens:
        kind = _ratio_kind(method, rows_per_ratio, num_rows, tile.block_m)
        variant = dataclasses.replace(variant, ratio=kind)
    start = prepare_kernel(
        "prune_kernel",
        device,
        grid_of(shape, tile.block_m, tile.block_k),
        (num_rows, width // OCTET, row_stride // OCTET, rows_per_ratio),
        variant.constants(native=not interpreted()),
        tile.num_warps,
    )
    return PreparedPrune(method in STOCHASTIC, seeds_in_memory, start)


@dataclass(frozen=True)
class Blocks:
    """How a launch covers x: blocks, a grid, and who pads what lies beyond a layout's tiles.

    Attributes:
        tile: blocks and warps.
        grid: see ``starting.grid_of``.
        features: target along features, with its share of the tail, or None.
        tokens: target along tokens, likewise.
        tails: bytes beyond the tiles, along features and along tokens.
    """

    tile: Tile
    grid: tuple[int, int, int]
    features: Target | None
    tokens: Target | None
    tails: tuple[int, int]


def blocks_of(
    shape: tuple[int, int], dtype: torch.dtype, features: Target | None, tokens: Target | None
) -> Blocks:
    """Return how a launch covers x [M, K] so that all of its operands are written.

    Args:
        shape: [M, K].
        dtype: of x.
        features: target along features, or None.
        tokens: target along tokens, or None.
    """
    covered = _covered(shape, dtype, features, tokens)
    tile = choose_tile(*covered, features, tokens)
    grid = grid_of(covered, tile.block_m, tile.block_k)
    programs = grid[0] * grid[1] * grid[2]
    tails = _tail(features, shape, dtype), _tail(tokens, (shape[1], shape[0]), dtype)
    return Blocks(
        tile,
        grid,
        _sharing_tail(features, tails[0], programs),
        _sharing_tail(tokens, tails[1], programs),
        tails,
    )


def operand_nbytes(
    shape: tuple[int, int], dtype: torch.dtype, features: Target | None, tokens: Target | None
) -> tuple[int, int]:
    """Return the bytes of the operands of x [M, K] along features and along tokens, 0 if none."""
    return (
        0 if features is None else buffer_nbytes(shape, dtype, features.layout),
        0 if tokens is None else buffer_nbytes((shape[1], shape[0]), dtype, tokens.layout),
    )


def target_of(method: str | None, layout: MetadataLayout | None) -> Target | None:
    """Return a method with its layout, or None where there is no method.

    Raises:
        ValueError: a method without a layout.
    """
    if method is None:
        return None
    if layout is None:
        raise value_error("prepare_pack", "layout", "given for each method", None, "Pass one.")
    return Target(method, layout)


def _sharing_tail(target: Target | None, tail: int, programs: int) -> Target | None:
    """Return the target with its share of the tail in every program."""
    if target is None or tail == 0:
        return target
    share = _MIN_SHARE
    while share * programs < tail:
        share *= 2
    return Target(target.method, target.layout, share)


def _tail(target: Target | None, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Return the bytes of the metadata that lie beyond the layout's tiles."""
    if target is None:
        return 0
    padded = padded_shape(*shape, dtype)
    return target.layout.nbytes(*padded) - target.layout.used_nbytes(*padded)


def _covered(
    shape: tuple[int, int], dtype: torch.dtype, features: Target | None, tokens: Target | None
) -> tuple[int, int]:
    """Return rows and columns of x that blocks must cover so that all padding is written."""
    rows, cols = shape
    if features is not None:
        padded = padded_shape(rows, cols, dtype)
        row_tiles, group_tiles = features.layout.tiles(*padded)
        rows = max(rows, padded[0], row_tiles * features.layout.tile_rows)
        cols = max(cols, padded[1], group_tiles * features.layout.tile_groups * 4)
    if tokens is not None:
        padded = padded_shape(shape[1], shape[0], dtype)
        row_tiles, group_tiles = tokens.layout.tiles(*padded)
        rows = max(rows, padded[1], group_tiles * tokens.layout.tile_groups * 4)
        cols = max(cols, padded[0], row_tiles * tokens.layout.tile_rows)
    return rows, cols


def _ratio_kind(features: str | None, rows_per_ratio: int, num_rows: int, block_m: int) -> int:
    if features != "rescaled_magnitude":
        return NO_RATIO
    whole = rows_per_ratio % block_m == 0 or rows_per_ratio >= num_rows
    return RATIO_PER_BLOCK if whole else RATIO_PER_ROW
