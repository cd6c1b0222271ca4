"""Pack and unpack in plain torch: the truth for every kernel, and what runs without one.

Everything happens on the bits: a kept element is never rounded, compared as a float or turned
from -0.0 into a value. A group with fewer than two non-zeros still has two increasing indices,
chosen as the library chooses them: x000 -> (0, 3), 0x00 -> (1, 3), everything else (2, 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.packing.layout import MetadataLayout, padded_shape
from sdgp_cusparselt.packing.nibbles import arrange
from sdgp_cusparselt.packing.packed import BITS, Packed24
from sdgp_cusparselt.packing.sampling import mvue_bits, random_subsets
from sdgp_cusparselt.pruning.bits import overflows

# Elements per chunk: large enough to hide torch's cost per call, small enough for a core's cache.
_CHUNK = 1 << 19

Four = tuple[Tensor, ...]


@dataclass(frozen=True)
class Draws:
    """Where random numbers come from: two int64 words, and which direction is being packed."""

    seeds: Tensor
    stream: int


def pack_operand(
    operand: Tensor,
    layout: MetadataLayout,
    *,
    method: str = "magnitude",
    ratio: Tensor | None = None,
    draws: Draws | None = None,
    transposed: bool = False,
) -> Packed24:
    """Prune an operand 2:4 along its columns and pack it.

    packed.unpack() = prune(operand, dim=-1)

    Args:
        operand: [rows, cols] any 2:4 dtype, any strides, any device; cols may be ragged.
        layout: where the metadata goes.
        method: none, random, magnitude, rescaled_magnitude or mvue.
        ratio: float32, broadcasts to [rows, cols]; what rescaled_magnitude multiplies with.
        draws: random numbers for random and mvue.
        transposed: recorded in the result.

    Returns:
        Packed24: on the operand's device.

    Raises:
        ValueError: method none and a group with more than two non-zeros; a layout that does not
            fit; a method without the ratio or the draws that it needs.
        TypeError: a dtype without a 2:4 format.
    """
    rows, cols = operand.shape
    packed = Packed24.empty(
        (rows, cols), operand.dtype, layout, device=operand.device, transposed=transposed
    )
    padded_rows, padded_cols = padded_shape(rows, cols, operand.dtype)
    values = packed.values.view(BITS[operand.element_size()]).view(padded_rows, -1)
    nibbles = torch.full(
        (padded_rows, padded_cols // 4), 0xE, dtype=torch.uint8, device=operand.device
    )
    values[rows:].zero_()
    step = max(1, _CHUNK // max(padded_cols, 1))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        part = None if ratio is None else ratio.expand(rows, cols)[start:stop]
        kept = _kept(operand[start:stop], start, padded_cols, method, part, draws)
        _encode(kept, values[start:stop], nibbles[start:stop])
    packed.metadata.copy_(arrange(nibbles, layout, padded_rows, padded_cols))
    return packed


def magnitude_keys(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return integers that order as |x| with NaN on top; int8 data gives int16 keys."""
    if dtype == torch.int8:
        return bits.to(torch.int16).abs_()
    return bits & (0x7F if dtype.itemsize == 1 else 0x7FFF)


def _kept(
    part: Tensor,
    first_row: int,
    padded_cols: int,
    method: str,
    ratio: Tensor | None,
    draws: Draws | None,
) -> Four:
    """Return the four members [rows, groups] of each group, as bits, +0 where not kept."""
    bits = _padded_bits(part, padded_cols)
    fours = bits.view(-1, 4)
    x = tuple(fours[:, i].contiguous().view(part.shape[0], -1) for i in range(4))
    keys = tuple(magnitude_keys(member, part.dtype) for member in x)
    if method == "none":
        _check_24(keys, first_row)
        return _select(x, keys, tuple(key != 0 for key in keys))
    kept = _select(x, keys, keep_two(keys))
    if method in ("random", "mvue"):
        if draws is None:
            raise value_error("pack", "draws", "given for " + method, None, "Pass Draws.")
        drawn, usable = _drawn(x, keys, part.dtype, method, first_row, draws)
        pairs = zip(drawn, kept, strict=True)
        return tuple(torch.where(usable, d, k) for d, k in pairs)
    if method == "rescaled_magnitude":
        if ratio is None:
            raise value_error("pack", "ratio", "given for " + method, None, "Pass a tensor.")
        return _scaled(kept, part.dtype, ratio, padded_cols)
    return kept


def _drawn(
    x: Four, keys: Four, dtype: torch.dtype, method: str, first_row: int, draws: Draws
) -> tuple[Four, Tensor]:
    """Return the members' bits where drawn, and in which groups nothing overflowed."""
    if method == "mvue":
        draw = mvue_bits(x, dtype, first_row, draws.seeds, draws.stream)
        return draw.bits, draw.usable
    rows, groups = x[0].shape
    keep = random_subsets(rows, groups, first_row, draws.seeds, draws.stream)
    overflow = reduce(or_, (overflows(key, dtype) for key in keys))
    return _select(x, keys, keep), ~overflow


def _padded_bits(part: Tensor, padded_cols: int) -> Tensor:
    """Return the rows as contiguous integers, zero-filled up to padded_cols."""
    bits = part.contiguous().view(BITS[part.element_size()])
    if part.shape[1] == padded_cols:
        return bits
    wide = bits.new_zeros((part.shape[0], padded_cols))
    wide[:, : part.shape[1]] = bits
    return wide


def keep_two(keys: Four) -> Four:
    """Return bool masks of the two largest of four keys; on a tie the lower index wins."""
    k0, k1, k2, k3 = keys
    b01, b02, b03, b12, b13, b23 = (
        k0 >= k1, k0 >= k2, k0 >= k3, k1 >= k2, k1 >= k3, k2 >= k3
    )  # fmt: skip
    return (
        _two_of_three(b01, b02, b03),
        _two_of_three(~b01, b12, b13),
        _two_of_three(~b02, ~b12, b23),
        _two_of_three(~b03, ~b13, ~b23),
    )


def _two_of_three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a & b) | (c & (a | b))


def _select(x: Four, keys: Four, keep: Four) -> Four:
    """Return the members' bits where kept and not zero, else 0: -0.0 must not survive."""
    return tuple(
        _mask(kept & (key != 0), member.dtype) & member
        for member, key, kept in zip(x, keys, keep, strict=True)
    )


def _mask(flag: Tensor, dtype: torch.dtype) -> Tensor:
    """Return all ones where flag, else 0."""
    return flag.to(dtype).neg_()


def _scaled(kept: Four, dtype: torch.dtype, ratio: Tensor, padded_cols: int) -> Four:
    """Return kept values times ratio, rounded to dtype; Inf and NaN keep their bits."""
    wide = ratio.new_ones((ratio.shape[0], padded_cols))
    wide[:, : ratio.shape[1]] = ratio
    scale = wide.view(ratio.shape[0], -1, 4)
    members = []
    for i, member in enumerate(kept):
        value = member.view(dtype).to(torch.float32)
        scaled = (value * scale[..., i]).to(dtype).view(member.dtype)
        scaled = torch.where(torch.isfinite(value), scaled, member)
        members.append(torch.where(magnitude_keys(scaled, dtype) == 0, 0, scaled))
    return tuple(members)


def _check_24(keys: Four, first_row: int) -> None:
    """Raise ValueError where a group has more than two non-zeros."""
    count = torch.stack([key != 0 for key in keys]).sum(0)
    bad = (count > 2).nonzero()
    if len(bad):
        row, group = (int(i) for i in bad[0])
        raise value_error(
            "pack",
            "x",
            "2:4 already under method='none'",
            f"{int(count[row, group])} non-zeros in row {first_row + row}, columns "
            f"{4 * group} to {4 * group + 3}",
            "Prune it, or pass another method.",
        )


def _encode(kept: Four, values: Tensor, nibbles: Tensor) -> None:
    """Write the two values and the nibble of each group that has at most two non-zeros."""
    y0, y1, y2, y3 = kept
    n0, n1, n2 = (y.to(torch.bool) for y in (y0, y1, y2))
    full0, full1 = _mask(n0, y0.dtype), _mask(n1, y0.dtype)
    pairs = values.view(*y0.shape, 2)
    pairs[..., 0] = y2.bitwise_and(~full1).bitwise_or_(y1).bitwise_and_(~full0).bitwise_or_(y0)
    full1.bitwise_or_(full0).bitwise_and_(y2)
    pairs[..., 1] = full0.bitwise_and_(y1).bitwise_or_(full1).bitwise_or_(y3)
    # 0xE is (2, 3); each term moves one index down to where the non-zero is. The four flags are
    # bytes of 0 or 1, and no sum of terms borrows from another's bit.
    b0, b1, b2 = (n.view(torch.uint8) for n in (n0, n1, n2))
    torch.sub(0xE, b1 & ~b0, out=nibbles)
    nibbles.sub_(b0, alpha=2).sub_((b0 | b1).bitwise_and_(b2), alpha=4).sub_(b0 & b1, alpha=8)
