"""Oracles and bounds that several test modules share."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

#: every N:M of the tables of the SDGP paper
SDGP_PATTERNS = [(1, 4), (2, 4), (1, 8), (2, 8), (4, 8)]
SDGP_PATTERNS += [(2, 16), (4, 16), (8, 16), (4, 32), (8, 32), (16, 32)]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Have new models and random tensors be of float64.

    Half batches, compiled code and other CPUs' libraries add up in other orders. In float32 that
    decides now and then which of two nearly equal gradients survives, and AdamW makes a full step
    of it.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def bits(x: Tensor) -> Tensor:
    """Return the bit patterns of x, so that NaN equals NaN and -0.0 differs from +0.0."""
    return x.contiguous().view(_BITS[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def product_bound(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound |computed - exact| of a @ b elementwise, for any order of accumulation.

    |error| <= gamma(K) * (|a| @ |b|) with gamma(K) = K u / (1 - K u), u the unit roundoff of the
    accumulator, plus one rounding to the dtype of the result (Higham, section 3.5).
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    k = a.shape[-1]
    u = torch.finfo(accumulator).eps / 2
    gamma = k * u / (1 - k * u)
    size = a.double().abs() @ b.double().abs()
    exact = (a.double() @ b.double()).abs()
    return gamma * size + torch.finfo(dtype).eps * exact + torch.finfo(dtype).tiny


def assert_product(result: Tensor, a: Tensor, b: Tensor) -> None:
    """Assert that result is a @ b up to the order of accumulation and its own rounding."""
    error = (result.double() - a.double() @ b.double()).abs()
    excess = (error / product_bound(a, b, result.dtype)).max() if error.numel() else 0.0
    assert excess <= 1, f"error is {float(excess):.3g} times its bound"


def oracle_magnitude(x: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Prune by magnitude in plain Python loops: NaN first, then |x|, then the lower index."""
    moved = x.movedim(dim, -1)
    lines = moved.reshape(-1, moved.shape[-1]).double().tolist()
    mask = torch.tensor([kept_of_line(line, n, m) for line in lines]).view(moved.shape)
    return torch.where(mask.movedim(-1, dim), x, torch.zeros_like(x))


def kept_of_line(values: list[float], n: int, m: int) -> list[bool]:
    kept = [False] * len(values)
    for start in range(0, len(values), m):
        group = list(enumerate(values[start : start + m], start))
        group.sort(key=lambda pair: (not math.isnan(pair[1]), -abs(pair[1]), pair[0]))
        for index, _ in group[:n]:
            kept[index] = True
    return kept
