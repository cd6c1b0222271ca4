"""cuSPARSELt plans: one handle per thread and device, plans cached by problem, oldest out first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import pycusparselt as cslt
import torch
from pycusparselt.loader import Library
from torch import Tensor

from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.devices import current_stream, on_device

DATA_TYPES = {torch.bfloat16: cslt.DataType.R_16BF, torch.float16: cslt.DataType.R_16F}
#: What exported weights may have besides, and what their products come in.
NARROW_TYPES = {
    torch.int8: cslt.DataType.R_8I,
    torch.float8_e4m3fn: cslt.DataType.R_8F_E4M3,
    torch.int32: cslt.DataType.R_32I,
    torch.float32: cslt.DataType.R_32F,
}
#: 8-bit operand -> the type of its products here: exact for int8, as accumulated for fp8.
RESULT_TYPES = {torch.int8: torch.int32, torch.float8_e4m3fn: torch.float32}
_TYPES = DATA_TYPES | NARROW_TYPES

#: Rows and columns of the structured operand are multiples of this, those of the dense one of
#: half of it, for 16-bit types; twice that for 8-bit ones (cuSPARSELt documentation).
STRUCTURED_MULTIPLE = 16
DENSE_MULTIPLE = 8
ALIGNMENT = 16


@dataclass(frozen=True)
class PlannedGemm:
    """A plan and what a call needs to know of it.

    Attributes:
        plan: the library's plan; it keeps its descriptors alive.
        rows: rows of the structured operand and of the result, padded.
        workspace_size: bytes of scratch for a product.
        compressed_size: bytes of the packed operand.
        buffer_size: bytes of scratch for the library's own Compress.
        out_dtype: element type of the result.
        by_columns: whether the result lies in memory column by column.
    """

    plan: cslt.MatmulPlan
    rows: int
    workspace_size: int
    compressed_size: int
    buffer_size: int
    out_dtype: torch.dtype
    by_columns: bool = False

    def product(self, packed: Tensor, dense: Tensor) -> Tensor:
        """Return packed @ dense: [rows, N], asynchronous on the current stream.

        Args:
            packed: uint8 [compressed_size], on the plan's device, which is current.
            dense: [K, N] in the plan's order.
        """
        device = packed.device
        shape = (self.rows, dense.shape[1])
        if self.by_columns:
            out = torch.empty(shape[::-1], dtype=self.out_dtype, device=device).t()
        else:
            out = torch.empty(shape, dtype=self.out_dtype, device=device)
        size = self.workspace_size
        workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
        self.plan.matmul(
            1.0,
            packed.data_ptr(),
            dense.data_ptr(),
            0.0,
            out.data_ptr(),
            out.data_ptr(),
            0 if workspace is None else workspace.data_ptr(),
            current_stream(device),
        )
        return out

    def compress(self, pruned: Tensor, address: int, stream: int) -> None:
        """Write pruned [M, K], which is 2:4, at an address as the library itself packs it.

        The plan's device is current; M may lack the padding.
        """
        missing = self.rows - pruned.shape[0]
        padded = torch.nn.functional.pad(pruned, (0, 0, 0, missing)) if missing else pruned
        padded = padded.contiguous()
        size = max(self.buffer_size, 16)
        scratch = torch.empty(size, dtype=torch.uint8, device=padded.device)
        self.plan.compress(padded.data_ptr(), address, scratch.data_ptr(), stream)

    def close(self) -> None:
        """Destroy the matrices' descriptors and with them what was built on them: the plan."""
        for matrix in (self.plan.descriptor.a, self.plan.descriptor.b, self.plan.descriptor.d):
            matrix.close()


class PlanCache:
    """Plans of every thread and device, at most ``limit`` of them per thread.

    cuSPARSELt's handles cannot be shared between threads, and autograd runs backward passes on
    threads of its own; hence one handle, and plans, per (thread, device).

    Args:
        library: what ``pycusparselt.load`` returned.
        limit: plans kept per thread and device before the least recently used one is destroyed.
    """

    def __init__(self, library: Library, limit: int = 512) -> None:
        self.library, self.limit = library, limit
        self._local = threading.local()

    def get(self, gemm: Gemm, candidate: Candidate) -> PlannedGemm:
        """Return the plan for gemm by candidate, made on the first call of this thread.

        Raises:
            CusparseLtError: the library refused the problem or the algorithm.
        """
        context = self._context(gemm.device)
        key: Hashable = (planned_as(gemm), candidate)
        planned = context.plans.get(key)
        if planned is None:
            planned = context.plans[key] = plan_gemm(context.handle, gemm, candidate)
            while len(context.plans) > self.limit:
                context.plans.popitem(last=False)[1].close()
        else:
            context.plans.move_to_end(key)
        return planned

    def max_alg_id(self, gemm: Gemm) -> int:
        """Return how many algorithm ids the library has for gemm; they run from 0.

        Raises:
            CusparseLtError: the library refused the problem.
        """
        handle = self._context(gemm.device).handle
        with on_device(gemm.device), ExitStack() as stack:
            selection = cslt.AlgSelection(handle, describe(handle, gemm, stack))
            return selection.get(cslt.AlgAttribute.CONFIG_MAX_ID)

    def clear(self) -> None:
        """Destroy this thread's plans and handles."""
        for context in self._contexts().values():
            context.handle.close()  # and everything built on it
        self._contexts().clear()

    def __len__(self) -> int:
        """Return how many plans this thread holds."""
        return sum(len(context.plans) for context in self._contexts().values())

    def _contexts(self) -> dict[torch.device, _Context]:
        contexts: dict[torch.device, _Context] | None = getattr(self._local, "contexts", None)
        if contexts is None:
            contexts = self._local.contexts = {}
        return contexts

    def _context(self, device: torch.device) -> _Context:
        contexts = self._contexts()
        context = contexts.get(device)
        if context is None:
            with on_device(device):
                context = contexts[device] = _Context(cslt.Handle(self.library), OrderedDict())
        return context


@dataclass
class _Context:
    handle: cslt.Handle
    plans: OrderedDict[Hashable, PlannedGemm]


def describe(handle: cslt.Handle, gemm: Gemm, stack: ExitStack) -> cslt.MatmulDescriptor:
    """Return the matmul descriptor of gemm; ``stack`` closes it and its matrices.

    Raises:
        CusparseLtError: the library refused the problem.
    """
    dtype, rows, row = _TYPES[gemm.dtype], padded_rows(gemm.m, gemm.dtype), cslt.Order.ROW
    orders = {"row": row, "col": cslt.Order.COL}
    order, out_order, out_dtype = (
        orders[gemm.dense_order],
        orders[gemm.result_order],
        _TYPES[gemm.out_dtype],
    )
    whole = gemm.dtype == torch.int8
    compute = cslt.ComputeType.COMPUTE_32I if whole else cslt.ComputeType.COMPUTE_32F
    structured, dense = cslt.MatDescriptor.structured, cslt.MatDescriptor.dense
    a = stack.enter_context(
        structured(handle, rows, gemm.k, dtype=dtype, order=row, alignment=ALIGNMENT)
    )
    b = stack.enter_context(
        dense(handle, gemm.k, gemm.n, dtype=dtype, order=order, alignment=ALIGNMENT)
    )
    d = stack.enter_context(
        dense(handle, rows, gemm.n, dtype=out_dtype, order=out_order, alignment=ALIGNMENT)
    )
    return stack.enter_context(cslt.MatmulDescriptor(handle, a=a, b=b, c=d, compute_type=compute))


def plan_gemm(handle: cslt.Handle, gemm: Gemm, candidate: Candidate) -> PlannedGemm:
    """Return a new plan for gemm by candidate.

    Raises:
        CusparseLtError: the library refused; nothing is left behind.
    """
    with on_device(gemm.device), ExitStack() as stack:
        matmul = describe(handle, gemm, stack)
        selection = stack.enter_context(cslt.AlgSelection(handle, matmul))
        _select(selection, candidate)
        plan = stack.enter_context(cslt.MatmulPlan(handle, matmul, selection))
        compressed, buffer = plan.compressed_size()
        planned = PlannedGemm(
            plan,
            matmul.a.rows,
            plan.workspace_size,
            compressed,
            buffer,
            gemm.out_dtype,
            gemm.result_order == "col",
        )
        stack.pop_all()
        return planned


def _select(selection: cslt.AlgSelection, candidate: Candidate) -> None:
    attribute = cslt.AlgAttribute
    selection.set(attribute.CONFIG_ID, candidate.alg_id)
    if candidate.split_k_mode is not None:
        selection.set(attribute.SPLIT_K_MODE, candidate.split_k_mode)
    # One card's default was seen to be -1, segment-K: what is not asked for is not left to chance.
    if selection.get(attribute.SPLIT_K) != candidate.split_k:
        selection.set(attribute.SPLIT_K, candidate.split_k)
    if candidate.split_k_buffers:
        selection.set(attribute.SPLIT_K_BUFFERS, candidate.split_k_buffers)


def padded_rows(rows: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return rows rounded up to what the library takes for a structured operand."""
    multiple = STRUCTURED_MULTIPLE * 2 // dtype.itemsize
    return -(-rows // multiple) * multiple


def padded_columns(columns: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return columns rounded up to what the library takes for a dense operand."""
    multiple = DENSE_MULTIPLE * 2 // dtype.itemsize
    return -(-columns // multiple) * multiple


def planned_as(gemm: Gemm) -> Gemm:
    """Return gemm with its rows padded: token counts that pad alike share a plan."""
    rows = padded_rows(gemm.m, gemm.dtype)
    return gemm if rows == gemm.m else replace(gemm, m=rows)


def dense_order(x: Tensor) -> Literal["row", "col"] | None:
    """Return how a matrix lies in memory, "row" or "col", or None where a copy is needed."""
    if x.data_ptr() % ALIGNMENT:
        return None
    rows, cols = x.shape
    if x.stride() == (cols, 1):
        return "row"
    return "col" if x.stride() == (1, rows) else None
