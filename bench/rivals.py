"""What others offer for the same work, each with the reason where it cannot run here."""

import importlib
from collections.abc import Callable
from typing import Any

import pycusparselt as cslt
import torch
from torch import Tensor

from bench.operands import UnavailableError, executor
from bench.verify import check_pruned
from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.backends.plans import PlannedGemm, plan_gemm
from sdgp_cusparselt.devices import current_stream


def need_cuda(device: torch.device) -> None:
    """Raise UnavailableError on a CPU."""
    if device.type != "cuda":
        raise UnavailableError("runs on CUDA devices only")


def compiled(*functions: Any, mode: str = "default") -> list[Any]:
    """Compile functions or modules, each for one shape.

    What was compiled before is dropped: after eight shapes of one function torch would go on
    uncompiled, without a word in the result.
    """
    torch.compiler.reset()
    return [torch.compile(function, mode=mode, dynamic=False) for function in functions]


def compiled_mm() -> Callable[[Tensor, Tensor], Tensor]:
    """Return torch.compile's own search for the fastest dense product."""
    return compiled(torch.mm, mode="max-autotune-no-cudagraphs")[0]


class TorchCslt:
    """torch's direct use of cuSPARSELt: ``_cslt_compress`` of a pruned matrix, ``_cslt_sparse_mm``.

    torch 2.13 has both as private functions; the algorithm is the library's default.
    """

    def __init__(self, device: torch.device) -> None:
        need_cuda(device)
        if not torch.backends.cusparselt.is_available():
            raise UnavailableError("this build of torch has no cuSPARSELt")

    def compress(self, pruned: Tensor) -> Tensor:
        """Return the compressed matrix of [M, K] ``pruned``."""
        return torch._cslt_compress(pruned)

    def matmul(self, compressed: Tensor, dense: Tensor) -> Tensor:
        """Return [M, N]."""
        return torch._cslt_sparse_mm(compressed, dense)


class TorchTile:
    """torch's prune and compress in one kernel, by 4 x 4 tiles, for both directions at once.

    Its choice of elements is greedy in a tile so that rows and columns are both 2:4; it is not
    magnitude pruning along one dimension.
    """

    def __init__(self, device: torch.device) -> None:
        need_cuda(device)
        if not torch.backends.cusparselt.is_available():
            raise UnavailableError("this build of torch has no cuSPARSELt")

    def pack(self, x: Tensor) -> Any:
        """Return torch's packed tensors; the raw kernel."""
        return torch._sparse_semi_structured_tile(x, algorithm="", use_cutlass=False)

    def sparse(self, x: Tensor) -> Any:
        """Return a sparse tensor that multiplies with ``@``."""
        return torch.sparse.SparseSemiStructuredTensorCUSPARSELT.prune_dense_static_sort(x)


class XFormers:
    """xFormers' sp24: prune and compress in one kernel, as ``TorchTile``, which came from it."""

    def __init__(self, device: torch.device) -> None:
        need_cuda(device)
        try:
            self.sp24 = importlib.import_module("xformers.ops.sp24")
        except ImportError as error:
            raise UnavailableError(f"xFormers is not installed ({error})") from error

    def sparse(self, x: Tensor) -> Any:
        """Return a sparse tensor that multiplies with ``@``."""
        algorithm = "largest_abs_values_greedy"
        return self.sp24.sparsify24(x, algo=algorithm, backend="cusparselt")


class Stock:
    """The library's own prune (magnitude, along rows) and compress, through pycusparselt.

    Args:
        gemm: the product; its rows must be a multiple of 16.
    """

    def __init__(self, gemm: Gemm) -> None:
        library = executor(gemm.device.type).machine.library()
        self.gemm = gemm
        self.handle = cslt.Handle(library)
        self.planned: PlannedGemm = plan_gemm(self.handle, gemm, Candidate(0))
        device = gemm.device
        self.pruned = torch.empty(gemm.m, gemm.k, dtype=gemm.dtype, device=device)
        size, scratch = self.planned.compressed_size, max(16, self.planned.buffer_size)
        self.packed = torch.empty(size, dtype=torch.uint8, device=device)
        self.scratch = torch.empty(scratch, dtype=torch.uint8, device=device)
        work = self.planned.workspace_size
        self.workspace = torch.empty(work, dtype=torch.uint8, device=device)
        self.out = torch.empty(gemm.m, gemm.n, dtype=gemm.dtype, device=device)

    def pack(self, x: Tensor) -> Tensor:
        """Prune and compress [M, K] ``x``; two library calls."""
        stream, plan = current_stream(self.gemm.device), self.planned.plan
        plan.descriptor.prune(x.data_ptr(), self.pruned.data_ptr(), cslt.PruneAlg.STRIP, stream)
        plan.compress(
            self.pruned.data_ptr(), self.packed.data_ptr(), self.scratch.data_ptr(), stream
        )
        return self.packed

    def matmul(self, dense: Tensor) -> Tensor:
        """Return [M, N], the packed matrix times ``dense``, by the default algorithm."""
        out = self.out.data_ptr()
        self.planned.plan.matmul(
            1.0,
            self.packed.data_ptr(),
            dense.data_ptr(),
            0.0,
            out,
            out,
            self.workspace.data_ptr() if self.workspace.numel() else 0,
            current_stream(self.gemm.device),
        )
        return self.out

    def close(self) -> None:
        """Destroy the plan and its handle."""
        self.handle.close()


def pruned_by(sparse: Any, x: Tensor) -> Tensor:
    """Return what a rival kept of ``x``, read off its product with the identity, and check it.

    Args:
        sparse: multiplies with ``@``.
        x: [M, K] what it was made of.

    Raises:
        WrongResultError: it is not 2:4, or holds values that x does not.
    """
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    pruned: Tensor = sparse @ identity
    check_pruned(pruned, x)
    return pruned
