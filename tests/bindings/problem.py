"""A whole 2:4 matmul on host memory, and the numbers it must give, from torch alone."""

from __future__ import annotations

from dataclasses import dataclass

import pycusparselt as cslt
import torch
from pycusparselt import DataType, Operation, Order

TORCH = {
    DataType.R_32F: torch.float32,
    DataType.R_16F: torch.float16,
    DataType.R_16BF: torch.bfloat16,
    DataType.R_8I: torch.int8,
    DataType.R_32I: torch.int32,
    DataType.R_8F_E4M3: torch.float8_e4m3fn,
    DataType.R_8F_E5M2: torch.float8_e5m2,
}


def random_matrix(rows: int, cols: int, dtype: DataType) -> torch.Tensor:
    """Draw a [rows, cols] matrix of a type: integers over their range, floats from a normal."""
    if dtype == DataType.R_8I:
        return torch.randint(-128, 128, (rows, cols), dtype=torch.int8)
    return torch.randn(rows, cols).to(TORCH[dtype])


def prune_24(x: torch.Tensor) -> torch.Tensor:
    """Keep the two largest of every four along the last dimension; the first wins a tie."""
    groups = x.float().abs().unflatten(-1, (-1, 4))
    keep = torch.zeros_like(groups, dtype=torch.bool)
    keep.scatter_(-1, groups.argsort(dim=-1, descending=True, stable=True)[..., :2], True)
    return torch.where(keep.flatten(-2), x.float(), 0.0).to(x.dtype)


def in_memory(x: torch.Tensor, order: Order, ld_extra: int = 0) -> tuple[torch.Tensor, int]:
    """Lay a matrix out in an order with padding; return the memory and its leading dimension."""
    lines = x if order == Order.ROW else x.t()
    ld = lines.shape[1] + ld_extra
    memory = torch.zeros(lines.shape[0], ld, dtype=torch.float32)
    memory[:, : lines.shape[1]] = lines.float()
    return memory.to(x.dtype).contiguous(), ld


def from_memory(memory: torch.Tensor, rows: int, cols: int, order: Order) -> torch.Tensor:
    """Read a matrix back from memory that :func:`in_memory` laid out."""
    lines = memory[:, : cols if order == Order.ROW else rows]
    return lines if order == Order.ROW else lines.t()


@dataclass
class Case:
    """D[M, N] = op_a(A) @ op_b(B), one of the two structured along K."""

    m: int = 64
    n: int = 48
    k: int = 64
    dtype: DataType = DataType.R_16BF
    out_dtype: DataType | None = None
    c_dtype: DataType | None = None
    op_a: Operation = Operation.N
    op_b: Operation = Operation.N
    order_a: Order = Order.ROW
    order_b: Order = Order.ROW
    order_d: Order = Order.ROW
    sparse_is_a: bool = True
    ld_extra: int = 0
    compute_type: cslt.ComputeType = cslt.ComputeType.COMPUTE_32F


class Problem:
    """One case with its data, descriptors, plan and compressed operand.

    The operands stay on the host for the expected numbers; what the library reads lies on device.
    """

    def __init__(
        self, handle: cslt.Handle, case: Case, alg_id: int | None = None, device: str = "cpu"
    ) -> None:
        self.case, self.handle, self.device = case, handle, device
        # R_32F is 0: compare with None.
        self.out_dtype = case.dtype if case.out_dtype is None else case.out_dtype
        self.a = random_matrix(case.m, case.k, case.dtype)
        self.b = random_matrix(case.k, case.n, case.dtype)
        if case.sparse_is_a:
            self.a = prune_24(self.a)
        else:
            self.b = prune_24(self.b.t()).t()
        self.a_memory, a = self._matrix(self.a, case.op_a, case.order_a, case.sparse_is_a)
        self.b_memory, b = self._matrix(self.b, case.op_b, case.order_b, not case.sparse_is_a)
        zeros = torch.zeros(case.m, case.n).to(TORCH[self.out_dtype])
        d_memory, ld = in_memory(zeros, case.order_d, case.ld_extra)
        self.d_memory = d_memory.to(device)
        shape = {"ld": ld, "order": case.order_d}
        d = cslt.MatDescriptor.dense(handle, case.m, case.n, dtype=self.out_dtype, **shape)
        c = d
        if case.c_dtype is not None:
            c = cslt.MatDescriptor.dense(handle, case.m, case.n, dtype=case.c_dtype, **shape)
        self.matmul = cslt.MatmulDescriptor(
            handle,
            op_a=case.op_a,
            op_b=case.op_b,
            a=a,
            b=b,
            c=c,
            d=d,
            compute_type=case.compute_type,
        )
        self.alg = cslt.AlgSelection(handle, self.matmul)
        if alg_id is not None:
            self.alg.set(cslt.AlgAttribute.CONFIG_ID, alg_id)
        self.plan = cslt.MatmulPlan(handle, self.matmul, self.alg)
        size, scratch = self.plan.compressed_size()
        self.compressed = torch.empty(size, dtype=torch.uint8, device=device)
        self.scratch = torch.empty(scratch, dtype=torch.uint8, device=device)
        sparse = self.a_memory if case.sparse_is_a else self.b_memory
        self.plan.compress(sparse.data_ptr(), self.compressed.data_ptr(), self.scratch.data_ptr())

    def _matrix(
        self, x: torch.Tensor, op: Operation, order: Order, structured: bool
    ) -> tuple[torch.Tensor, cslt.MatDescriptor]:
        stored = x if op == Operation.N else x.t()
        memory, ld = in_memory(stored, order, self.case.ld_extra)
        make = cslt.MatDescriptor.structured if structured else cslt.MatDescriptor.dense
        rows, cols = stored.shape
        memory = memory.to(self.device)
        return memory, make(self.handle, rows, cols, ld=ld, dtype=self.case.dtype, order=order)

    def pointers(self) -> tuple[int, int, int]:
        """Return the addresses of A, B and D as matmul wants them."""
        if self.case.sparse_is_a:
            left, right = self.compressed, self.b_memory
        else:
            left, right = self.a_memory, self.compressed
        return left.data_ptr(), right.data_ptr(), self.d_memory.data_ptr()

    def run(self, alpha: float = 1.0, beta: float = 0.0) -> torch.Tensor:
        """Multiply and return D as a [M, N] tensor."""
        a, b, d = self.pointers()
        self.plan.matmul(alpha, a, b, beta, d, d)
        return self.result()

    def result(self) -> torch.Tensor:
        """Return D as a [M, N] tensor."""
        return from_memory(self.d_memory.cpu(), self.case.m, self.case.n, self.case.order_d)

    def expected(self) -> torch.Tensor:
        """Return A @ B in float64, from the operands before compression."""
        return self.a.double() @ self.b.double()

    def bound(self, alpha: float = 1.0) -> torch.Tensor:
        """Bound |D - expected| elementwise: K fp32 roundings of the sum, one of the result.

        Standard error analysis: gamma_K * |A| @ |B| with unit roundoff 2^-24, and half a unit of
        the output type of the value itself; integers are exact.
        """
        total = abs(alpha) * (self.a.double().abs() @ self.b.double().abs())
        if TORCH[self.out_dtype] in (torch.int8, torch.int32):
            return torch.zeros_like(total)
        info = torch.finfo(TORCH[self.out_dtype])
        rounding = info.eps / 2 * abs(alpha) * self.expected().abs() + info.smallest_normal
        return 1.01 * (self.case.k * 2.0**-24 * total + rounding)

    def assert_right(self, alpha: float = 1.0) -> None:
        """Run and compare with the bound."""
        error = (self.run(alpha).double() - alpha * self.expected()).abs()
        worst = (error - self.bound(alpha)).max().item()
        assert worst <= 0, f"off by {worst} beyond the bound"
