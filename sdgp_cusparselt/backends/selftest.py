"""Run float16 products and check them; ``float16`` starts this in a process of its own.

python -m sdgp_cusparselt.backends.selftest --device cuda:0
"""

import argparse
import itertools
import sys
from typing import Literal

import torch
from pycusparselt import Status
from pycusparselt.errors import CusparseLtError

from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.equivalence import compare_product
from sdgp_cusparselt.pruning.methods import prune

ORDERS: tuple[Literal["row", "col"], ...] = ("row", "col")
#: Rows, columns and reduction: square ones, and one whose rows are few and whose reduction is long.
SIZES = ((128, 128, 128), (512, 512, 512), (1024, 1024, 1024), (64, 64, 1024))


def main() -> int:
    """Run every product that ``candidates`` offers; exit 1 at the first fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    device = torch.device(parser.parse_args().device)
    backend = CusparseLtBackend(Machine(device.type))
    for (m, n, k), order in itertools.product(SIZES, ORDERS):
        fault = product_fault(backend, Gemm(m, n, k, torch.float16, order, device))
        if fault:
            print(fault)
            return 1
    backend.plans.clear()
    return 0


def product_fault(backend: CusparseLtBackend, gemm: Gemm) -> str:
    """Return why float16 must not be used, after every candidate of gemm ran; "" for nothing.

    The default must be right. Of the others this asks only that they end without a fault of the
    device: one that is refused or wrong is found by the proof that precedes its use.
    """
    left = prune(torch.randn(gemm.m, gemm.k, device=gemm.device).half())
    stored = (gemm.k, gemm.n) if gemm.dense_order == "row" else (gemm.n, gemm.k)
    right = torch.randn(stored, device=gemm.device).half()
    right = right if gemm.dense_order == "row" else right.t()
    for candidate in backend.offered(gemm, safe=True):
        try:
            packed = backend.compress(left, gemm, candidate)
            result = backend.matmul(packed, right, gemm, candidate)
        except CusparseLtError as error:
            if error.status != Status.NOT_SUPPORTED:
                return f"{gemm.describe()}, {candidate}: {error}"
            continue
        mismatch = compare_product(result, left, right)
        if mismatch is not None and candidate == Candidate(0):
            return f"{gemm.describe()}, {candidate}: {mismatch.describe()}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
