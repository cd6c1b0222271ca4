"""What rescaled_magnitude multiplies with: sum |x| / sum |kept|, per column of the operand.

The reference sums in float64 and rounds once, as ``sdgp.prune`` does. The kernel sums in float32,
in an order that follows from the shape alone: rows of a block, then blocks from first to last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sdgp_cusparselt.devices import current_stream, on_device
from sdgp_cusparselt.packing.launch import OCTET
from sdgp_cusparselt.packing.reference import keep_one, keep_two
from sdgp_cusparselt.packing.starting import grid_of, prepare_kernel
from sdgp_cusparselt.packing.variants import SumsVariant


def kernel_ratio(x: Tensor, transposed: bool, per_sample: int, n: int = 2) -> Tensor:
    """Return the ratios that the pack kernel reads, from one more read of x.

    Args:
        x: [M, width], as the kernels read it.
        transposed: whether groups run along tokens.
        per_sample: rows of x that share a ratio along features.
        n: values kept of four.

    Returns:
        float32 [samples, width] along features, or [M] along tokens.
    """
    return safe_ratio(*abs_sums(x, transposed, per_sample, n))


def abs_sums(x: Tensor, transpose: bool, rows_per_sample: int, n: int = 2) -> tuple[Tensor, Tensor]:
    """Return sums of |x| and of the |x| that magnitude keeps, per column of the operand.

    Args:
        x: [M, width] float16|bfloat16, as ``aligned`` returns it.
        transpose: prune along tokens and sum over features; else along features over tokens.
        rows_per_sample: rows of x that are summed together along features.
        n: values kept of four.

    Returns:
        two float32 [samples, width], or [M] when transposed.
    """
    num_rows, num_cols = x.shape
    variant = SumsVariant(x.dtype, transpose, n)
    tile, span = variant.tile, variant.span
    octets, row_octets = num_cols // OCTET, x.stride(0) // OCTET
    sizes: tuple[int, ...]
    if transpose:
        parts = -(-num_cols // span)
        grid = (parts, *grid_of((num_rows, num_cols), tile.block_m, tile.block_k)[1:])
        shape, sizes = (parts, num_rows), (num_rows, octets, row_octets, num_rows)
    else:
        parts, samples = -(-rows_per_sample // span), num_rows // rows_per_sample
        grid = grid_of((samples * parts, num_cols), 1, tile.block_k)
        shape = (grid[1] * grid[2], num_cols)
        sizes = (rows_per_sample, octets, row_octets, parts, samples)
    start = _prepare_sums(variant, x.device, grid, sizes)
    total, kept = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    with on_device(x.device):
        start(current_stream(x.device), x.data_ptr(), total.data_ptr(), kept.data_ptr())
    if transpose:
        return total.sum(0), kept.sum(0)
    split, used = (samples, parts, num_cols), samples * parts
    return total[:used].view(split).sum(1), kept[:used].view(split).sum(1)


@functools.lru_cache(maxsize=256)
def _prepare_sums(
    variant: SumsVariant, device: torch.device, grid: tuple[int, int, int], sizes: tuple[int, ...]
) -> Callable[..., None]:
    constants = variant.constants()
    return prepare_kernel(variant.kernel, device, grid, sizes, constants, variant.tile.num_warps)


def reference_ratio(operand: Tensor, per_sample: int, n: int = 2) -> Tensor:
    """Return float32 [rows, cols], each sample's ratio repeated over its rows; sums in float64."""
    keys = operand.contiguous().view(torch.int16) & 0x7FFF
    short = -operand.shape[1] % 4
    groups = torch.nn.functional.pad(keys, (0, short)).unflatten(1, (-1, 4))  # type: ignore[no-untyped-call]
    keep_n = keep_two if n == 2 else keep_one
    keep = torch.stack(keep_n(groups.unbind(-1)), -1).flatten(1)[:, : operand.shape[1]]
    size = operand.abs().float()
    kept = torch.where(keep, size, 0.0)
    samples = (-1, per_sample, operand.shape[1])
    sums = (part.view(samples).sum(1, dtype=torch.float64).float() for part in (size, kept))
    ratio = safe_ratio(*sums)
    return ratio.repeat_interleave(per_sample, 0)


def safe_ratio(total: Tensor, kept: Tensor) -> Tensor:
    """Return total / kept, and 1 where nothing was kept or a sum overflowed."""
    ratio = total / kept
    return torch.where(torch.isfinite(ratio) & (kept > 0), ratio, torch.ones_like(ratio))
