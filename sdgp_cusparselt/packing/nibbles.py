"""Nibbles in operand order to metadata bytes and back, in any layout, by reshape and permute."""

import torch
from torch import Tensor

from sdgp_cusparselt.packing.layout import MetadataLayout


def arrange(nibbles: Tensor, layout: MetadataLayout, rows: int, cols: int) -> Tensor:
    """Return the metadata bytes that hold nibbles [rows, cols / 4] in a layout's order.

    Args:
        nibbles: uint8 [rows, cols / 4], one nibble an element.
        layout: where each one goes.
        rows: padded rows of the operand.
        cols: padded columns of the operand.

    Returns:
        uint8 [layout.nbytes(rows, cols)]; ``layout.padding`` wherever there is no group.
    """
    shape, order = _permutation(layout, rows, cols)
    tile_rows, tile_groups = _tiled(layout, rows, cols)
    if (tile_rows, tile_groups) != tuple(nibbles.shape):
        whole = nibbles.new_full((tile_rows, tile_groups), layout.padding)
        whole[: nibbles.shape[0], : nibbles.shape[1]] = nibbles
        nibbles = whole
    flat = nibbles.reshape(shape).permute(order).reshape(-1)
    used = flat[0::2] | flat[1::2] << 4
    out = nibbles.new_full((layout.nbytes(rows, cols),), layout.padding * 0x11)
    out[: used.numel()] = used
    return out


def collect(metadata: Tensor, layout: MetadataLayout, rows: int, cols: int) -> Tensor:
    """Return the nibbles [rows, cols / 4] that ``arrange`` put into metadata bytes."""
    shape, order = _permutation(layout, rows, cols)
    used = metadata[: layout.used_nbytes(rows, cols)]
    flat = torch.stack((used & 15, used >> 4), -1).reshape([shape[axis] for axis in order])
    inverse = [order.index(axis) for axis in range(len(order))]
    return flat.permute(inverse).reshape(_tiled(layout, rows, cols))[:rows, : cols // 4]


def _tiled(layout: MetadataLayout, rows: int, cols: int) -> tuple[int, int]:
    row_tiles, group_tiles = layout.tiles(rows, cols)
    return row_tiles * layout.tile_rows, group_tiles * layout.tile_groups


def _permutation(layout: MetadataLayout, rows: int, cols: int) -> tuple[list[int], list[int]]:
    """Return a shape that splits [rows, groups] into runs of bits, and their memory order."""
    row_step, group_step = layout.steps(rows, cols)
    row_tiles, group_tiles = layout.tiles(rows, cols)
    shape, stride = [], []
    for tiles, step, strides in (
        (row_tiles, row_step, layout.row_strides),
        (group_tiles, group_step, layout.group_strides),
    ):
        runs = _runs(strides)
        shape += [tiles, *(length for length, _ in reversed(runs))]
        stride += [step, *(first for _, first in reversed(runs))]
    # A single tile has a step like any other; where steps tie, the axis of length one is outer.
    order = sorted(range(len(shape)), key=lambda axis: (-stride[axis], shape[axis]))
    return shape, order


def _runs(strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Join neighbouring bits whose strides double: [(length, first stride)], lowest first."""
    runs: list[tuple[int, int]] = []
    for stride in strides:
        if runs and runs[-1][0] * runs[-1][1] == stride:
            runs[-1] = (2 * runs[-1][0], runs[-1][1])
        else:
            runs.append((2, stride))
    return runs
