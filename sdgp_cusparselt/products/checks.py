"""Check a sparse product during training against the dense one, within its bound."""

from torch import Tensor

from sdgp_cusparselt.backends.base import Problem
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.gemm import Candidate
from sdgp_cusparselt.equivalence import compare_product
from sdgp_cusparselt.pruning.methods import prune


def fault(
    problem: Problem, backend: CusparseLtBackend, candidate: Candidate, left: Tensor, right: Tensor
) -> str | None:
    """Return what is wrong with a sparse product of these operands, or None.

    [M, N] = prune(left) @ right, compared with float32 within a bound from K and the dtype

    Args:
        problem: the product; its pruning method is replaced by magnitude, which draws nothing.
        backend: what multiplies sparsely.
        candidate: the algorithm under test.
        left: [M, K], or [K, M] for grad_weight: the gradient, not pruned.
        right: [K, N].

    Returns:
        Shape, algorithm, worst element, or None. Waits for the device.
    """
    transpose = problem.product == "grad_weight"
    gemm = backend.gemm_of(problem)
    left, right = (left[: gemm.k], right[: gemm.k]) if transpose else (left, right)
    pruned = prune(left.t() if transpose else left)
    packed = backend.pack(left, gemm, candidate, method="magnitude", transpose=transpose)
    result = backend.matmul(packed, backend.operand(right), gemm, candidate)
    mismatch = compare_product(result, pruned, right)
    if mismatch is None:
        return None
    return f"{gemm.describe()}, {candidate}: {mismatch.describe()}"
