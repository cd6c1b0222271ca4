"""Is there memory to tune in, and was that error for want of it?"""

import math

import torch
from pycusparselt.errors import CusparseLtError

from sdgp_cusparselt.backends.gemm import Gemm

#: Bytes that a proof and a race hold for each element of the operands and of the result: both as
#: they come and in float32, the packed operand, and two results. An estimate; running out all the
#: same is caught.
BYTES_PER_ELEMENT = 12
#: cuSPARSELt's CUSPARSE_STATUS_ALLOC_FAILED.
ALLOC_FAILED = 2


def needed_bytes(gemm: Gemm) -> int:
    """Return about how much memory proving and timing ``gemm`` takes."""
    return BYTES_PER_ELEMENT * (gemm.m * gemm.k + gemm.k * gemm.n + gemm.m * gemm.n)


def free_bytes(device: torch.device) -> float:
    """Return what can be allocated on ``device`` now; a CPU is not asked."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(free + kept)


def shortage(gemm: Gemm) -> str:
    """Return why ``gemm`` is not proven or timed now for want of memory, or ""."""
    needed, free = needed_bytes(gemm), free_bytes(gemm.device)
    if needed <= free:
        return ""
    return f"no memory to tune in: about {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, the library, Triton or the driver raised this for want of memory."""
    if isinstance(error, CusparseLtError):
        return error.status == ALLOC_FAILED
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
