"""Matrices and layouts that packing tests share."""

import random

import torch
from torch import Tensor

from sdgp_cusparselt.packing.layout import MetadataLayout

FLOAT_DTYPES = (torch.bfloat16, torch.float16)


def adversarial(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random numbers with ties, zeros of both signs, NaN, Inf and denormals strewn in."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.3, x.round(), x)
    tiny = torch.finfo(dtype).tiny / 2
    largest = torch.finfo(dtype).max
    for value in (0.0, -0.0, float("nan"), float("inf"), -float("inf"), tiny, -largest):
        share = 0.15 if value == 0 else 0.02
        x = torch.where(torch.rand(x.shape, generator=generator) < share, value, x)
    return x.to(dtype)


def random_layout(seed: int, row_bits: int, group_bits: int, order: str = "rows") -> MetadataLayout:
    """A bit permutation that no hardware has."""
    strides = [1 << bit for bit in range(row_bits + group_bits)]
    random.Random(seed).shuffle(strides)
    row, group = tuple(strides[:row_bits]), tuple(strides[row_bits:])
    region = ((1 << row_bits, 4 << group_bits),)
    return MetadataLayout(f"random-{seed}", row, group, order, region)  # type: ignore[arg-type]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes; NaN payloads and signs of zero included."""
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
