"""Pack and unpack in plain torch: the truth for every kernel, and what runs without one.

Everything happens on the bits: a kept element is never rounded or compared as a float unless its
method says so. A group has two increasing indices whatever it holds. Where a ranking finds fewer
than two non-zeros they are the library's: x000 -> (0, 3), 0x00 -> (1, 3), everything else (2, 3);
and -0.0 becomes +0.0. Under random and mvue, which keep the sign of a zero, a group that holds an
Inf or a NaN, or whose sum overflows float32, becomes NaN, so that the overflow stays visible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.packing.layout import MetadataLayout, padded_shape
from sdgp_cusparselt.packing.nibbles import arrange
from sdgp_cusparselt.packing.packed import BITS, Packed24
from sdgp_cusparselt.packing.sampling import (
    Chosen,
    group_bits,
    mvue_one,
    mvue_two,
    random_one,
    random_pair,
)

# Elements per chunk: large enough to hide torch's cost per call, small enough for a core's cache.
_CHUNK = 1 << 19

# What NaN becomes where a method computes: every bit but the sign, in both 16-bit types and fp8.
_NAN = {1: 0x7F, 2: 0x7FFF}

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
    n: int = 2,
    ratio: Tensor | None = None,
    draws: Draws | None = None,
    transposed: bool = False,
) -> Packed24:
    """Prune an operand n of 4 along its columns and pack it.

    packed.unpack() = prune(operand, n=n, dim=-1)

    Args:
        operand: [rows, cols] any 2:4 dtype, any strides, any device; cols may be ragged.
        layout: where the metadata goes.
        method: none, random, magnitude, rescaled_magnitude or mvue.
        n: values kept of four, 1 or 2.
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
    values = packed.values.view(BITS[operand.element_size()]).view(padded_rows, -1, 2)
    nibbles = torch.empty((padded_rows, padded_cols // 4), dtype=torch.uint8, device=operand.device)
    step = max(1, _CHUNK // max(padded_cols, 1))
    for start in range(0, padded_rows, step):
        stop = min(padded_rows, start + step)
        bits = _padded_bits(operand[start:stop], stop - start, padded_cols)
        fours = bits.view(-1, 4)
        x = tuple(fours[:, i].contiguous().view(stop - start, -1) for i in range(4))
        out = (values[start:stop], nibbles[start:stop])
        if method in ("random", "mvue"):
            if draws is None:
                raise value_error("pack", "draws", "given for " + method, None, "Pass Draws.")
            _draw(x, operand.dtype, method, n, start, draws, *out)
        elif method == "rescaled_magnitude":
            if ratio is None:
                raise value_error("pack", "ratio", "given for " + method, None, "Pass a tensor.")
            part = ratio.expand(rows, cols)[start:stop]
            kept = _kept(x, operand.dtype, n)
            _encode(kept, _scaled(kept, operand.dtype, part), *out)
        else:
            if method == "none":
                _check_24(tuple(magnitude_keys(m, operand.dtype) for m in x), start, n)
            kept = _kept(x, operand.dtype, n)
            _encode(kept, kept, *out)
    packed.metadata.copy_(arrange(nibbles, layout, padded_rows, padded_cols))
    return packed


def magnitude_keys(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return integers that order as |x| with NaN on top; int8 data gives int16 keys."""
    if dtype == torch.int8:
        return bits.to(torch.int16).abs_()
    return bits & (0x7F if dtype.itemsize == 1 else 0x7FFF)


def _kept(x: Four, dtype: torch.dtype, n: int) -> Four:
    """Return the members' bits where they are among the n largest and not zero, else 0."""
    keys = tuple(magnitude_keys(member, dtype) for member in x)
    return _select(x, keys, keep_two(keys) if n == 2 else keep_one(keys))


def _draw(
    x: Four,
    dtype: torch.dtype,
    method: str,
    n: int,
    first_row: int,
    draws: Draws,
    values: Tensor,
    nibbles: Tensor,
) -> None:
    """Write what random or mvue keeps of each group, and where it stood."""
    sizes = tuple(member.view(dtype).to(torch.float32).abs() for member in x)
    rows, groups = x[0].shape
    bits = group_bits(rows, groups, first_row, draws.seeds, draws.stream)
    if method == "mvue":
        chosen, worth, total = (mvue_two if n == 2 else mvue_one)(sizes, bits)
        # NaN if any of the four is Inf or NaN.
        amount = magnitude_keys(rounded(worth + total * 0.0, dtype), dtype)
        kept = [_worth(member, amount, dtype) for member in chosen.of(x)]
    else:
        chosen = (random_pair if n == 2 else random_one)(bits)
        total = (sizes[0] + sizes[1]) + (sizes[2] + sizes[3])
        kept = list(chosen.of(x))
        if dtype != torch.int8:
            kept = [member | rounded(total * 0.0, dtype) for member in kept]
    for slot, member in enumerate(kept):
        values[..., slot] = member
    _blank_second(chosen, values)
    nibbles.copy_(chosen.nibbles())


def _worth(member: Tensor, amount: Tensor, dtype: torch.dtype) -> Tensor:
    """Return sign | max(|member|, amount), where NaN is the largest amount."""
    sign = -0x80 if dtype.itemsize == 1 else -0x8000
    return torch.maximum(magnitude_keys(member, dtype), amount) | member & sign


def _blank_second(chosen: Chosen, values: Tensor) -> None:
    """Where one is kept of four, zero the other value of the pair."""
    if chosen.only_second is not None:
        values[..., 0].masked_fill_(chosen.only_second, 0)
        values[..., 1].masked_fill_(~chosen.only_second, 0)


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 rounded to nearest even, as bits; every NaN has the same ones."""
    bits = value.to(dtype).view(BITS[dtype.itemsize])
    return torch.where(value.isnan(), _NAN[dtype.itemsize], bits).to(bits.dtype)


def _padded_bits(part: Tensor, padded_rows: int, padded_cols: int) -> Tensor:
    """Return the rows as contiguous integers, zero-filled up to the padded shape."""
    bits = part.contiguous().view(BITS[part.element_size()])
    if part.shape == (padded_rows, padded_cols):
        return bits
    wide = bits.new_zeros((padded_rows, padded_cols))
    wide[: part.shape[0], : part.shape[1]] = bits
    return wide


def keep_one(keys: Four) -> Four:
    """Return bool masks of the largest of four keys; on a tie the lower index wins."""
    k0, k1, k2, k3 = keys
    left, right = torch.maximum(k0, k1), torch.maximum(k2, k3)
    from_left, is_0, is_2 = left >= right, k0 >= k1, k2 >= k3
    return from_left & is_0, from_left & ~is_0, ~from_left & is_2, ~from_left & ~is_2


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


def _scaled(kept: Four, dtype: torch.dtype, ratio: Tensor) -> Four:
    """Return kept values times ratio, rounded to dtype."""
    rows, groups = kept[0].shape
    wide = ratio.new_ones((rows, 4 * groups))
    wide[: ratio.shape[0], : ratio.shape[1]] = ratio
    scale = wide.view(rows, groups, 4)
    members = []
    for i, member in enumerate(kept):
        scaled = rounded(member.view(dtype).to(torch.float32) * scale[..., i], dtype)
        members.append(torch.where(magnitude_keys(scaled, dtype) == 0, 0, scaled))
    return tuple(members)


def _check_24(keys: Four, first_row: int, n: int) -> None:
    """Raise ValueError where a group has more than n non-zeros."""
    count = torch.stack([key != 0 for key in keys]).sum(0)
    bad = (count > n).nonzero()
    if len(bad):
        row, group = (int(i) for i in bad[0])
        raise value_error(
            "pack",
            "x",
            f"{n}:4 already under method='none'",
            f"{int(count[row, group])} non-zeros in row {first_row + row}, columns "
            f"{4 * group} to {4 * group + 3}",
            "Prune it, or pass another method.",
        )


def _encode(kept: Four, worth: Four, values: Tensor, nibbles: Tensor) -> None:
    """Write the two values and the nibble of each group that keeps at most two non-zeros.

    kept: the group's own bits, which name the places; worth: what is written for each.
    """
    n0, n1, n2 = (y.to(torch.bool) for y in kept[:3])
    y0, y1, y2, y3 = worth
    full0, full1 = _mask(n0, y0.dtype), _mask(n1, y0.dtype)
    values[..., 0] = y2.bitwise_and(~full1).bitwise_or_(y1).bitwise_and_(~full0).bitwise_or_(y0)
    full1.bitwise_or_(full0).bitwise_and_(y2)
    values[..., 1] = full0.bitwise_and_(y1).bitwise_or_(full1).bitwise_or_(y3)
    # 0xE is (2, 3); each term moves one index down to where the non-zero is. The four flags are
    # bytes of 0 or 1, and no sum of terms borrows from another's bit.
    b0, b1, b2 = (n.view(torch.uint8) for n in (n0, n1, n2))
    torch.sub(0xE, b1 & ~b0, out=nibbles)
    nibbles.sub_(b0, alpha=2).sub_((b0 | b1).bitwise_and_(b2), alpha=4).sub_(b0 & b1, alpha=8)
