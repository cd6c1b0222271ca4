"""Is a result right? Bounds from K and the dtype; nothing is timed before it passes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


class WrongResultError(ArithmeticError):
    """A contender computed something else; its time would mean nothing."""


@dataclass(frozen=True)
class Check:
    """How far a result was from the reference.

    Attributes:
        max_error: largest absolute difference.
        of_bound: largest difference in units of its bound; at most 1.
        against: what it was compared with.
    """

    max_error: float
    of_bound: float
    against: str


@dataclass(frozen=True)
class Expected:
    """A reference and the bound of |result - reference|, elementwise.

    Attributes:
        reference: [...] float32 or float64.
        bound: [...] of the same dtype.
        what: names the reference.
    """

    reference: Tensor
    bound: Tensor
    what: str

    def check(self, result: Tensor) -> Check:
        """Return how far ``result`` is off.

        Raises:
            WrongResultError: it is out of bound somewhere, or of another shape.
        """
        if result.shape != self.reference.shape:
            shapes = f"{tuple(result.shape)}, not {tuple(self.reference.shape)}"
            raise WrongResultError(f"the result is {shapes}")
        error = (result.to(self.reference.dtype) - self.reference).abs()
        worst = float((error / self.bound).nan_to_num_(nan=math.inf).max())
        if not worst <= 1:
            raise WrongResultError(f"wrong: {worst:.3g} times its bound from {self.what}")
        return Check(float(error.max()), worst, self.what)


def product(a: Tensor, b: Tensor, what: str, roundings: int = 1) -> Expected:
    """Return a @ b with the bound of any order of accumulation in float32.

    bound = (gamma(1.25 K) + gamma_ref(K)) * |a| @ |b| + roundings * eps * |a @ b| + underflow

    Args:
        a: [M, K] float16 or bfloat16; zeros where it was pruned.
        b: [K, N] of the same dtype.
        what: names the reference in messages.
        roundings: of the result to its dtype; those after the first count against |a| @ |b|.

    Returns:
        Reference [M, N] and bound, in float32 on a GPU and float64 on a CPU.

    Source:
        Higham, Accuracy and Stability of Numerical Algorithms, section 3.5. A tensor core aligns
        the products of a block to the largest and truncates, hence eps instead of eps / 2 and K / 4
        further additions (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021).
    """
    wide = torch.float32 if a.device.type == "cuda" else torch.float64
    a_wide, b_wide = a.to(wide), b.to(wide)
    reference, size = a_wide @ b_wide, a_wide.abs() @ b_wide.abs()
    return Expected(
        reference, rounding_bound(size, reference, a.shape[1], a.dtype, roundings), what
    )


def rounding_bound(
    size: Tensor, reference: Tensor, k: int, dtype: torch.dtype, roundings: int = 1
) -> Tensor:
    """Return the bound of ``product`` for sums of k products whose sizes sum to ``size``."""
    rate = _gamma(k + math.ceil(k / 4), torch.finfo(torch.float32).eps)
    rate += _gamma(k, torch.finfo(reference.dtype).eps / 2)
    info = torch.finfo(dtype)
    rounded = info.eps * (reference.abs() + (roundings - 1) * size)
    return size * (rate * (1 + info.eps)) + rounded + info.tiny


def check_any(result: Tensor, *expected: Expected) -> Check:
    """Return the check against the first reference that ``result`` fits.

    Raises:
        WrongResultError: it fits none of them.
    """
    faults = []
    for one in expected:
        try:
            return one.check(result)
        except WrongResultError as fault:
            faults.append(str(fault))
    raise WrongResultError("; ".join(faults))


def check_pruned(pruned: Tensor, x: Tensor) -> None:
    """Check a pruned matrix whose choice of elements is its maker's own.

    Args:
        pruned: [M, K] with zeros.
        x: [M, K] what was pruned.

    Raises:
        WrongResultError: a group of four keeps more than two, or a kept value is not x's.
    """
    kept = pruned != 0
    if int(kept.unflatten(-1, (-1, 4)).sum(-1).max()) > 2:
        raise WrongResultError("wrong: a group of four keeps more than two values")
    if not torch.equal(pruned, torch.where(kept, x, torch.zeros_like(x))):
        raise WrongResultError("wrong: a kept value is not the one that was given")


def _gamma(n: int, u: float) -> float:
    return n * u / (1 - n * u)
