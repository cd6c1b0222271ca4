"""Packing spelled out, one group at a time, from the published word formulas and nothing else."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

BITS = {1: torch.int8, 2: torch.int16}


def word_in_32(r: int, c16: int) -> int:
    return (r % 8) * 8 + (r // 16 % 2) * 4 + (c16 % 2) * 2 + (r // 8 % 2)


def plain(r: int, g: int, rows: int, cols: int) -> int:
    c16, high = g // 4, -(-rows // 32) * 32
    return ((c16 // 2) * 2 * high + (r // 32) * 64 + word_in_32(r, c16)) * 4 + g % 4


def blocked(r: int, g: int, rows: int, cols: int) -> int:
    c16, tiles = g // 4, -(-rows // 128)
    word = (r // 128) * 512 + (c16 // 4) * 512 * tiles + (r % 128 // 32) * 64
    return (word + (c16 % 4 // 2) * 256 + word_in_32(r, c16)) * 4 + g % 4


def sm90_atom(r: int, g: int, rows: int, cols: int) -> int:
    c16, tiles = g // 4, -(-rows // 64)
    word = (r // 64) * 128 + (c16 // 2) * tiles * 128 + r // 8 % 2 + (r % 8) * 2
    return (word + (c16 % 2) * 16 + (r // 16 % 4) * 32) * 4 + g % 4


def sm90_interleaved(r: int, g: int, rows: int, cols: int) -> int:
    tiles = -(-rows // 16)
    word = (r // 16) * 32 + (g // 8) * tiles * 32 + (r % 8) * 4 + g % 4
    return word * 4 + (r // 8 % 2) + 2 * (g // 4 % 2)


def sm90_published(r: int, g: int, rows: int, cols: int) -> int:
    tile = (r // 64) * -(-cols // 32) + g // 8
    inside = (r % 64 // 16) * 128 + (r % 8) * 16 + r // 8 % 2
    return tile * 512 + inside + (g % 4) * 4 + (g % 8 // 4) * 2


def eight_bit(r: int, g: int, rows: int, cols: int) -> int:
    block = (g // 16) * -(-rows // 16) + r // 16
    word = block * 32 + (r % 8) * 4 + (g % 16 // 8) * 2 + r % 16 // 8
    return word * 8 + g % 8


ADDRESS: dict[str, Callable[[int, int, int, int], int]] = {
    "plain": plain,
    "blocked": blocked,
    "sm90-atom": sm90_atom,
    "sm90-interleaved": sm90_interleaved,
    "sm90-published": sm90_published,
    "eight-bit": eight_bit,
}


def metadata_nbytes(layout: str, rows: int, cols: int) -> int:
    """Bytes of the region: a plan's as measured, for 64-row tiles those of a bare descriptor."""
    if layout == "eight-bit":
        return -(-rows // 64) * 64 * (-(-cols // 128) * 128) // 4
    by_plan = -(-rows // 32) * 32 * (-(-cols // 64) * 64) // 8
    if layout not in ("sm90-atom", "sm90-published"):
        return by_plan
    return max(by_plan, -(-rows // 64) * 64 * (-(-cols // 32) * 32) // 8)


def keep_indices(members: Sequence[float]) -> tuple[int, int]:
    """Indices that the library writes for a group with at most two non-zeros."""
    nonzero = [i for i, v in enumerate(members) if v != 0 or v != v]
    if len(nonzero) == 2:
        return nonzero[0], nonzero[1]
    return {(0,): (0, 3), (1,): (1, 3)}.get(tuple(nonzero), (2, 3))


def prune_magnitude(x: Tensor) -> Tensor:
    """Keep two of four by (-|x|, index), NaN above Inf; what is not kept becomes +0."""
    rows, cols = x.shape
    wide = torch.nn.functional.pad(x.float(), (0, -cols % 4)).numpy().copy()
    size = np.where(np.isnan(wide), np.inf, np.abs(wide)).reshape(rows, -1, 4)
    nan = np.isnan(wide).reshape(rows, -1, 4)
    order = np.lexsort((np.broadcast_to(np.arange(4), size.shape), -size, ~nan), axis=-1)
    keep = np.zeros(size.shape, dtype=bool)
    np.put_along_axis(keep, order[..., :2], True, axis=-1)
    mask = torch.from_numpy(keep.reshape(rows, -1)[:, :cols].copy())
    bits = x.contiguous().view(BITS[x.element_size()])
    return torch.where(mask, bits, torch.zeros_like(bits)).view(x.dtype)


def pack(pruned: Tensor, layout: str, multiple: int) -> tuple[Tensor, Tensor]:
    """(values, metadata bytes) of a pruned operand, group by group."""
    rows, cols = pruned.shape
    high, wide = -(-rows // multiple) * multiple, -(-cols // multiple) * multiple
    bits = torch.zeros(high, wide, dtype=BITS[pruned.element_size()])
    bits[:rows, :cols] = pruned.contiguous().view(bits.dtype)
    floats = bits.view(pruned.dtype).float()
    nibbles = [0xE] * (2 * metadata_nbytes(layout, high, wide))
    values = torch.zeros(high, wide // 2, dtype=bits.dtype)
    for r in range(high):
        for g in range(wide // 4):
            i0, i1 = keep_indices(floats[r, 4 * g : 4 * g + 4].tolist())
            for slot, i in enumerate((i0, i1)):
                if floats[r, 4 * g + i] != 0:
                    values[r, 2 * g + slot] = bits[r, 4 * g + i]
            nibbles[ADDRESS[layout](r, g, high, wide)] = i0 | i1 << 2
    flat = torch.tensor(nibbles, dtype=torch.uint8)
    return values, flat[0::2] | flat[1::2] << 4
