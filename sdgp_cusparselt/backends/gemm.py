"""One sparse product as the library sees it, and what can run it."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

#: What packs an operand: our own kernel, or the library's Compress after pruning in plain torch.
Packer = Literal["ours", "library"]


@dataclass(frozen=True)
class Gemm:
    """[M, N] = [M, K] @ [K, N], the left operand 2:4 along K.

    A gradient is packed at every call and tokens are M, or K of grad_weight. A weight is packed
    ahead, once per version, and tokens are N: both dense matrices are column-major then, which is
    activations as they lie in memory, so none is copied.

    Attributes:
        m: rows of the packed operand, before padding.
        n: columns of the result.
        k: reduced dimension.
        dtype: of both operands; accumulation is in float32, of int8 in int32.
        dense_order: "row" or "col": how [K, N] lies in memory.
        device: where everything lies.
        result_order: "row" or "col": how [M, N] lies in memory.
        result_dtype: of the result; that of the operands if None.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    dense_order: Literal["row", "col"]
    device: torch.device
    result_order: Literal["row", "col"] = "row"
    result_dtype: torch.dtype | None = None

    @property
    def packed_ahead(self) -> bool:
        """Whether the packed operand is a weight, which is not packed at every call."""
        return self.result_order == "col"

    @property
    def out_dtype(self) -> torch.dtype:
        """Element type of the result."""
        return self.dtype if self.result_dtype is None else self.result_dtype

    def describe(self) -> str:
        """Return a short form for messages and tables."""
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"M={self.m} N={self.n} K={self.k} {dtype} {self.dense_order}"
        if self.result_order == "col":
            text += " to col"
        if self.result_dtype is not None:
            text += f" {str(self.result_dtype).removeprefix('torch.')}"
        return text


@dataclass(frozen=True)
class Candidate:
    """One way in which the library can run a product.

    Attributes:
        alg_id: the library's algorithm number; it means something only for one library version,
            architecture and problem.
        split_k: number of slices of K; 1 for none, -1 for segment-K on sm90.
        split_k_mode: the library's SplitKMode, or None to leave it.
        split_k_buffers: extra buffers of split-K.
    """

    alg_id: int
    split_k: int = 1
    split_k_mode: int | None = None
    split_k_buffers: int = 0


class SparseExecutor(Protocol):
    """What the tuner needs of a backend."""

    def candidates(self, gemm: Gemm, *, safe: bool = True) -> list[Candidate]:
        """Return ways of running gemm, the default first.

        Args:
            gemm: the product.
            safe: only those that cannot hang or end the process; else all of them, for a process
                that can be spared.
        """
        ...

    def packer(self, gemm: Gemm, candidate: Candidate) -> Packer:
        """Return what ``pack`` would use for a plan: ours only where it is proven.

        Raises:
            CusparseLtError: the library refused the plan.
        """
        ...

    def pack(
        self, x: Tensor, gemm: Gemm, candidate: Candidate, *, method: str, transpose: bool = False
    ) -> Tensor:
        """Return x (or its transpose) pruned 2:4 and packed as candidate's plan reads it.

        With method "none" x must be 2:4 already and is packed as it is. The result is opaque, a
        uint8 buffer: where no layout is proven for the plan, the library's own Compress wrote it.

        Raises:
            CusparseLtError: the library refused the plan.
        """
        ...

    def matmul(self, packed: Tensor, dense: Tensor, gemm: Gemm, candidate: Candidate) -> Tensor:
        """Return packed @ dense: [M, K] @ [K, N] -> [M, N], asynchronous on the current stream.

        Raises:
            CusparseLtError: the library refused the plan or the product.
        """
        ...

    def machine_key(self, device: torch.device) -> dict[str, str]:
        """Return what a measurement depends on: GPU, driver, library and package versions."""
        ...
