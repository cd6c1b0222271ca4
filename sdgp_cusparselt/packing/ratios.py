"""What rescaled_magnitude multiplies with: sum |x| / sum |kept|, per column of the operand."""

from __future__ import annotations

import torch
from torch import Tensor

from sdgp_cusparselt.packing.launch import launch_abs_sums
from sdgp_cusparselt.packing.reference import keep_one, keep_two


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
    return safe_ratio(*launch_abs_sums(x, transposed, per_sample, n))


def reference_ratio(operand: Tensor, per_sample: int, n: int = 2) -> Tensor:
    """Return float32 [rows, cols], each sample's ratio repeated over its rows."""
    keys = operand.contiguous().view(torch.int16) & 0x7FFF
    short = -operand.shape[1] % 4
    groups = torch.nn.functional.pad(keys, (0, short)).unflatten(1, (-1, 4))  # type: ignore[no-untyped-call]
    keep_n = keep_two if n == 2 else keep_one
    keep = torch.stack(keep_n(groups.unbind(-1)), -1).flatten(1)[:, : operand.shape[1]]
    size = operand.abs().float()
    kept = torch.where(keep, size, 0.0)
    samples = (-1, per_sample, operand.shape[1])
    ratio = safe_ratio(size.view(samples).sum(1), kept.view(samples).sum(1))
    return ratio.repeat_interleave(per_sample, 0)


def safe_ratio(total: Tensor, kept: Tensor) -> Tensor:
    """Return total / kept, and 1 where nothing was kept or a sum overflowed."""
    ratio = total / kept
    return torch.where(torch.isfinite(ratio) & (kept > 0), ratio, torch.ones_like(ratio))
