"""Check a sparse product during training against the dense one, within its bound."""

from dataclasses import replace

import torch

from sdgp_cusparselt.equivalence import compare_product
from sdgp_cusparselt.products.operands import GradientOperands, OfWeight
from sdgp_cusparselt.products.sparse import SparseProduct
from sdgp_cusparselt.products.weight_product import WeightProduct
from sdgp_cusparselt.pruning.methods import prune


def fault(sparse: SparseProduct, operands: GradientOperands) -> str | None:
    """Return what is wrong with a sparse product of these operands, or None.

    [M, N] = prune(left) @ right, compared with float32 within a bound from K and the dtype

    Args:
        sparse: the product; its pruning method is replaced by magnitude, which draws nothing.
        operands: what to multiply.

    Returns:
        Shape, algorithm, worst element, or None. Waits for the device.
    """
    library, gemm, candidate = sparse.library, sparse.gemm, sparse.candidate
    left, right = operands.matrices()
    transpose = operands.product == "grad_weight"
    if transpose:  # the tokens past the last multiple of 16 take no part
        left, right = left[: gemm.k], right[: gemm.k]
    elif gemm.m > len(left):  # rows of heavy tokens: the plan, not what they hold, is checked
        left = torch.nn.functional.pad(left, (0, 0, 0, gemm.m - len(left)))
    pruned = prune(left.t() if transpose else left)
    packed = library.pack(left, gemm, candidate, method="magnitude", transpose=transpose)
    mismatch = compare_product(library.matmul(packed, right, gemm, candidate), pruned, right)
    if mismatch is None:
        return None
    return f"{gemm.describe()}, {candidate}: {mismatch.describe()}"


def weight_fault(sparse: WeightProduct, operands: OfWeight) -> str | None:
    """Return what is wrong with a product of a packed weight, or None.

    The weight is pruned anew: what was kept of an older version shows here.

    Args:
        sparse: the product.
        operands: what to multiply.

    Returns:
        Shape, algorithm, worst element, or None. Waits for the device.
    """
    anew = replace(operands.pruned_weight, keeps=False)
    left, right = replace(operands, pruned_weight=anew).matrices()
    mismatch = compare_product(sparse.multiplied(operands).t(), left, right)
    if mismatch is None:
        return None
    return f"{sparse.gemm.describe()}, {sparse.candidate}: {mismatch.describe()}"
