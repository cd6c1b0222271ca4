"""Run float16 products and check them; ``float16`` starts this in a process of its own.

python -m sdgp_cusparselt.backends.selftest --device cuda:0
"""

import argparse
import sys

import torch

from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.gemm import Gemm
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.equivalence import compare_product
from sdgp_cusparselt.pruning.methods import prune

SIZES = (128, 512, 1024)


def main() -> int:
    """Run and check products of three sizes; exit 1 at the first wrong one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    device = torch.device(parser.parse_args().device)
    backend = CusparseLtBackend(Machine(device.type))
    for size in SIZES:
        gemm = Gemm(size, size, size, torch.float16, "row", device)
        left = prune(torch.randn(size, size, device=device).half())
        right = torch.randn(size, size, device=device).half()
        for candidate in backend.offered(gemm)[:4]:
            packed = backend.compress(left, gemm, candidate)
            mismatch = compare_product(backend.matmul(packed, right, gemm, candidate), left, right)
            if mismatch is not None:
                print(f"{gemm.describe()}, {candidate}: {mismatch.describe()}")
                return 1
    backend.plans.clear()
    return 0


if __name__ == "__main__":
    sys.exit(main())
