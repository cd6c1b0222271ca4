"""Does a candidate compute the right result? Several runs, fresh data, before anything is timed.

Most trials hold small integers, whose products and sums are exact in any order: there the result
must be the exact one, bit for bit, and a single wrong or missing term shows at any K. The others
hold normal random numbers and are compared within the bound of ``equivalence``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdgp_cusparselt.backends.gemm import Candidate, Gemm, SparseExecutor
from sdgp_cusparselt.equivalence import Mismatch, compare, exact_bound, product_bound
from sdgp_cusparselt.packing.trials import (
    few_integers,
    normal,
    pruned_24,
    share_of_nonzeros,
    some_rows,
    two_of_four,
    wide_product,
)

#: Which trials hold integers; each has fresh data.
EXACT_TRIALS = (True, True, False)
#: Runs of a candidate on the same operands, whose bits must agree.
REPEATS = 3

_CHUNK = 1 << 24
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Trial:
    """Operands of one product, and what it must give.

    Attributes:
        x: what is packed: [M, K], or [K, M] if the packed operand is its transpose.
        method: what it is packed with: "none" where x is 2:4 already.
        dense: [K, N] in the order that the product asks for.
        expected: [R, N] the right result in R of its rows.
        bound: [R, N] of the error, or None where ``exact_bound`` rules.
        rows: [R] which rows, or None for all of them.
    """

    x: Tensor
    method: str
    dense: Tensor
    expected: Tensor
    bound: Tensor | None
    rows: Tensor | None = None

    def mismatch(self, result: Tensor) -> Mismatch | None:
        """Return the worst element of a result that is wrong, or None."""
        got = result if self.rows is None else result[self.rows]
        if self.bound is None and torch.equal(got, self.expected):
            return None
        wide = torch.float64 if got.dtype == torch.float64 else torch.float32
        step = max(1, _CHUNK // max(1, got.shape[1]))
        for start in range(0, got.shape[0], step):
            part = slice(start, start + step)
            expected = self.expected[part].to(wide)
            # Twice: the expected integers were rounded to the result's dtype as well.
            integers = 2 * exact_bound(expected, got.dtype)
            bound = integers if self.bound is None else self.bound[part]
            found = compare(got[part], expected, bound)
            if found is not None:
                return found
        return None


def trials(gemm: Gemm, *, method: str, transpose: bool, seed: int) -> Iterator[Trial]:
    """Make the trials one after the other, so that one set of operands is alive at a time.

    Args:
        gemm: the product.
        method: how the executor prunes; under "magnitude" the trial with normal numbers is not
            pruned beforehand, so that it covers the pruning of the pack as well.
        transpose: whether the packed operand is the transpose of what is packed.
        seed: of the data; torch's own generators are left alone.
    """
    generator = torch.Generator(gemm.device).manual_seed(seed)
    for exact in EXACT_TRIALS:
        whole = exact or gemm.dtype.itemsize == 1  # as integers 8-bit operands are exact
        yield (_exact_trial if whole else _normal_trial)(gemm, method, transpose, generator)


def fault(
    executor: SparseExecutor,
    gemm: Gemm,
    candidate: Candidate,
    trial: Trial,
    *,
    transpose: bool,
) -> str:
    """Return what is wrong with a candidate in one trial, "" if nothing is.

    Raises:
        CusparseLtError: the library refused it.
        torch.OutOfMemoryError: no memory for it.
    """
    packed = executor.pack(trial.x, gemm, candidate, method=trial.method, transpose=transpose)
    first: Tensor | None = None
    for _ in range(REPEATS):
        _poison(gemm)
        result = executor.matmul(packed, trial.dense, gemm, candidate)
        if first is None:
            first = result
        elif not _same_bits(first, result):
            share = (_bits(first) != _bits(result)).sum().item() / first.numel()
            return f"not deterministic: {share:.2%} of the elements differ between two equal runs"
    assert first is not None  # REPEATS is at least one
    mismatch = trial.mismatch(first)
    return f"wrong: {mismatch.describe()}" if mismatch else ""


def dense_operand(gemm: Gemm, generator: torch.Generator) -> Tensor:
    """Return [K, N] normal random numbers, in memory as the product asks for."""
    return _in_order(gemm, normal(*_stored(gemm), gemm.dtype, gemm.device, generator))


def packed_operand(gemm: Gemm, transpose: bool, generator: torch.Generator) -> Tensor:
    """Return normal random numbers of the shape that ``pack`` is given."""
    shape = (gemm.k, gemm.m) if transpose else (gemm.m, gemm.k)
    return normal(*shape, gemm.dtype, gemm.device, generator)


def _exact_trial(gemm: Gemm, method: str, transpose: bool, generator: torch.Generator) -> Trial:
    """Integers: +-1 and +-2 in two places of every group, -1, 0 and 1 in the dense operand."""
    dtype, device = gemm.dtype, gemm.device
    left = two_of_four(gemm.m, gemm.k, dtype, device, generator)
    share = share_of_nonzeros(gemm.k, gemm.out_dtype)
    stored = few_integers(*_stored(gemm), dtype, device, generator, share=share)
    dense = _in_order(gemm, stored)
    expected = wide_product(left, dense, gemm.out_dtype)
    return Trial(_as_given(left, transpose), "none", dense, expected, None)


def _normal_trial(gemm: Gemm, method: str, transpose: bool, generator: torch.Generator) -> Trial:
    """Normal random numbers; for a large result some rows of every part of it are compared."""
    x = packed_operand(gemm, transpose, generator)
    left = pruned_24(x.t() if transpose else x)
    if method != "magnitude":
        x, method = _as_given(left, transpose), "none"
    dense = dense_operand(gemm, generator)
    rows = some_rows(gemm.m, gemm.n, gemm.device, generator)
    some = left if rows is None else left[rows]
    expected = wide_product(some, dense, torch.float32)
    size = wide_product(some.abs(), dense.abs(), torch.float32)
    bound = product_bound(size, expected, gemm.k, gemm.dtype)
    return Trial(x, method, dense, expected, bound, rows)


def _stored(gemm: Gemm) -> tuple[int, int]:
    return (gemm.k, gemm.n) if gemm.dense_order == "row" else (gemm.n, gemm.k)


def _in_order(gemm: Gemm, stored: Tensor) -> Tensor:
    return stored if gemm.dense_order == "row" else stored.t()


def _as_given(left: Tensor, transpose: bool) -> Tensor:
    return left.t().contiguous() if transpose else left


def _poison(gemm: Gemm) -> None:
    """Fill the memory that the next result is likely to get, so that no old result passes."""
    value = torch.nan if gemm.out_dtype.is_floating_point else -(2**31)
    torch.full((gemm.m, gemm.n), value, dtype=gemm.out_dtype, device=gemm.device)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(_BITS[x.element_size()])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(_bits(a), _bits(b))
