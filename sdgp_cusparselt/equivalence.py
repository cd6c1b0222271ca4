"""How far a product may lie from the exact one, and where one lies further.

No tolerance is chosen: the bound follows from K, the accumulator and the dtype of the result.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Elements of a float32 intermediate, so that no comparison holds more than a few of 64 MiB.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Mismatch:
    """The element that lies furthest out of its bound, and how many others do.

    Attributes:
        index: of that element.
        got: what was computed.
        expected: what the reference has there.
        bound: of the difference.
        share: of all elements, those that are out of bound.
    """

    index: tuple[int, ...]
    got: float
    expected: float
    bound: float
    share: float

    def describe(self) -> str:
        """Return one clause for a message or a table."""
        return (
            f"{self.share:.2%} of the elements are out of bound; worst {self.index}: "
            f"got {self.got:.6g}, expected {self.expected:.6g} +- {self.bound:.2g}"
        )


def reference_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of two such numbers are exact, or float64."""
    return torch.float32 if dtype.itemsize <= 2 else torch.float64


def product_bound(
    size: Tensor, reference: Tensor, k: int, dtype: torch.dtype, *, roundings: int = 1
) -> Tensor:
    """Bound |computed - reference| elementwise for any order of accumulation.

    bound = (gamma(K) + gamma_ref(K)) * (|a| @ |b|) + roundings * eps(dtype) * (result) + underflow

    gamma(n) = n u / (1 - n u). A tensor core aligns a block of at least four products to the
    largest and truncates, so it makes up to K + K/4 errors of u = eps(float32), not eps / 2.

    Args:
        size: |a| @ |b|, float32 or float64.
        reference: a @ b, in the same dtype and accumulated in it.
        k: number of products summed.
        dtype: of the computed result.
        roundings: 1 where only the result is rounded to ``dtype``; more where that many partial
            sums are, each bounded by ``size``.

    Returns:
        Tensor of reference's shape and dtype.

    Source:
        Higham, Accuracy and Stability of Numerical Algorithms, section 3.5; for tensor cores Fasi,
        Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores (2021).
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    rate = _gamma(k + math.ceil(k / 4), torch.finfo(accumulator).eps)
    rate += _gamma(k, torch.finfo(reference.dtype).eps / 2)
    eps = torch.finfo(dtype).eps
    rounded = reference.abs() if roundings == 1 else size * roundings
    underflow = torch.finfo(dtype).smallest_normal * eps + (k + 1) * torch.finfo(accumulator).tiny
    return size * (rate * (1 + eps)) + rounded * eps + underflow


def exact_bound(reference: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound |computed - reference| where every sum of products is exact in the accumulator.

    Args:
        reference: a @ b of integers with |a| @ |b| < 2**24, float32 or float64.
        dtype: of the computed result.

    Returns:
        0 where the exact result is a number of ``dtype``, else one rounding to it; 0 for integers.
    """
    magnitude = reference.abs()
    if not dtype.is_floating_point:
        return torch.zeros_like(magnitude)
    eps = torch.finfo(dtype).eps
    return torch.where(magnitude * eps <= 2, 0.0, magnitude * eps)


def compare(result: Tensor, reference: Tensor, bound: Tensor) -> Mismatch | None:
    """Return the worst element of result that is out of bound, or None if none is.

    |result - reference| <= bound; equal infinities and two NaN in one place are equal.

    Args:
        result: [...] any float dtype.
        reference: [...] float32 or float64, result's shape and device.
        bound: [...] like reference; infinite where nothing is to be compared.

    Returns:
        Mismatch or None. Waits for the device.

    Raises:
        ValueError: the shapes differ.
    """
    if result.shape != reference.shape or bound.shape != reference.shape:
        shapes = f"{tuple(result.shape)}, {tuple(reference.shape)} and {tuple(bound.shape)}"
        raise ValueError(f"compare: result, reference and bound must be of one shape, got {shapes}")
    excess = _excess(result, reference, bound).reshape(-1)
    if not excess.numel():
        return None
    worst = int(excess.argmax())
    if not excess[worst] > 1:
        return None
    index = _unravel(worst, result.shape)
    out = int((excess > 1).sum())
    got, expected, limit = (float(t[index]) for t in (result, reference, bound))
    return Mismatch(index, got, expected, limit, out / excess.numel())


def compare_product(
    result: Tensor, a: Tensor, b: Tensor, *, exact: bool = False
) -> Mismatch | None:
    """Return where result is not a @ b within its bound, or None.

    Args:
        result: [M, N] the product under test.
        a: [M, K] any float dtype, the pruned operand with its zeros.
        b: [K, N] any float dtype.
        exact: a and b hold integers whose sums are exact, see ``exact_bound``.

    Returns:
        Mismatch or None. Columns of b with an Inf or NaN are left out: a sparse product skips
        the zeros of a that a dense one multiplies with them. Waits for the device.

    Note:
        The reference is accumulated in float32 on the device (products of two 16-bit numbers are
        exact in it, also as TF32), in float64 for wider operands, some rows at a time.
    """
    wide = reference_dtype(a.dtype)
    b_wide = b.to(wide)
    skipped = ~torch.isfinite(b_wide).all(0)
    b_size = None if exact else b_wide.abs()
    found: list[tuple[float, Mismatch]] = []
    step = max(1, _CHUNK // max(1, b.shape[1], a.shape[1]))
    for start in range(0, a.shape[0], step):
        rows = a[start : start + step].to(wide)
        reference = rows @ b_wide
        if b_size is None:
            bound = exact_bound(reference, result.dtype)
        else:
            bound = product_bound(rows.abs() @ b_size, reference, a.shape[1], result.dtype)
        # Where an operand is Inf or NaN nothing bounds the error: only the same value will do.
        bound.nan_to_num_(nan=0.0, posinf=0.0).masked_fill_(skipped, torch.inf)
        mismatch = compare(result[start : start + step], reference, bound)
        if mismatch is not None:
            index = (start + mismatch.index[0], mismatch.index[1])
            share = mismatch.share * reference.numel() / result.numel()
            found.append((_ratio(mismatch), replace(mismatch, index=index, share=share)))
    if not found:
        return None
    _, worst = max(found, key=lambda pair: pair[0])
    return replace(worst, share=sum(mismatch.share for _, mismatch in found))


def _gamma(n: int, u: float) -> float:
    """Return n u / (1 - n u); infinite where the estimate says nothing."""
    return n * u / (1 - n * u) if n * u < 1 else math.inf


def _excess(result: Tensor, reference: Tensor, bound: Tensor) -> Tensor:
    """Return error / bound, 0 where equal or not compared, infinite where NaN or Inf differ."""
    got = result.to(reference.dtype)
    limit = torch.finfo(result.dtype).max
    # A reference beyond the largest number of the result's dtype is rounded to infinity.
    overflowed = torch.isinf(got) & (reference.abs() + bound > limit) & (got * reference > 0)
    equal = (got == reference) | (got.isnan() & reference.isnan()) | overflowed
    ignored = torch.isposinf(bound)
    error = (got - reference).abs()
    ratio = torch.where(error <= bound, 0.5, torch.where(bound > 0, error / bound, torch.inf))
    ratio = ratio.masked_fill(~torch.isfinite(ratio), torch.inf)
    return ratio.masked_fill(equal | ignored, 0.0)


def _ratio(found: Mismatch) -> float:
    error = abs(found.got - found.expected)
    return error / found.bound if found.bound and math.isfinite(error) else math.inf


def _unravel(flat: int, shape: torch.Size) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return tuple(reversed(index))
