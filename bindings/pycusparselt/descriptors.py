"""Handle and descriptors: arguments by name, lifetimes kept, errors with shapes.

Device memory is the caller's: every ``d_...`` argument is the address of device memory as an int,
every stream a ``cudaStream_t`` as an int (0 is the default stream). An object belongs to the
thread that made its handle.
"""

from __future__ import annotations

import ctypes
from typing import Any

from pycusparselt import cusparselt as capi
from pycusparselt.abi import (
    ComputeType,
    DataType,
    MatDescAttribute,
    MatmulDescAttribute,
    OpaqueStorage,
    Operation,
    Order,
    PruneAlg,
    Sparsity,
    attribute_type,
)
from pycusparselt.lifetime import Owned
from pycusparselt.loader import Library

_INT64_MAX = 2**63 - 1
_UINT32_MAX = 2**32 - 1


class Handle(Owned):
    """A library context, tied to the current CUDA device and to this thread. See `cusparseLtInit`.

    Args:
        library: what :func:`pycusparselt.load` returned.

    Raises:
        CusparseLtError: the library refused; status 1 where there is no usable GPU or driver.
    """

    def __init__(self, library: Library) -> None:
        storage = OpaqueStorage()
        capi.init(library, storage.address)
        self._own(library, storage, capi.destroy)

    def version(self) -> int:
        """Return the library's version as one number. See `cusparseLtGetVersion`."""
        value = ctypes.c_int()
        capi.get_version(self.library, self.address, ctypes.addressof(value))
        return value.value


class MatDescriptor(Owned):
    """Shape, type and memory order of one matrix; made by :meth:`dense` or :meth:`structured`.

    Attributes:
        rows, cols, ld: in elements; ld is the distance of two rows (ROW) or columns (COL).
        dtype, order: as given.
        is_structured: whether the matrix is 2:4 sparse.
    """

    def __init__(
        self,
        handle: Handle,
        rows: int,
        cols: int,
        *,
        ld: int | None,
        dtype: DataType,
        order: Order,
        alignment: int,
        structured: bool,
    ) -> None:
        self.rows = _whole("MatDescriptor", "rows", rows, _INT64_MAX)
        self.cols = _whole("MatDescriptor", "cols", cols, _INT64_MAX)
        if ld is None:
            ld = cols if order == Order.ROW else rows
        self.ld = _whole("MatDescriptor", "ld", ld, _INT64_MAX)
        alignment = _whole("MatDescriptor", "alignment", alignment, _UINT32_MAX)
        self.dtype, self.order = DataType(dtype), Order(order)
        self.is_structured = structured
        self.handle = handle
        storage = OpaqueStorage()
        arguments = (handle.address, storage.address, rows, cols, ld, alignment, dtype, order)
        library = handle.library
        if structured:
            sparsity = Sparsity.SPARSITY_50_PERCENT
            capi.structured_descriptor_init(library, *arguments, sparsity, context=str(self))
        else:
            capi.dense_descriptor_init(library, *arguments, context=str(self))
        self._own(library, storage, capi.mat_descriptor_destroy, (handle,))

    @classmethod
    def dense(
        cls,
        handle: Handle,
        rows: int,
        cols: int,
        *,
        dtype: DataType,
        order: Order = Order.ROW,
        ld: int | None = None,
        alignment: int = 16,
    ) -> MatDescriptor:
        """Describe a dense [rows, cols] matrix; ld defaults to no padding.

        Raises:
            CusparseLtError: the library refuses the shape, type, order or alignment.

        Source: `cusparseLtDenseDescriptorInit`.
        """
        return cls(
            handle,
            rows,
            cols,
            ld=ld,
            dtype=dtype,
            order=order,
            alignment=alignment,
            structured=False,
        )

    @classmethod
    def structured(
        cls,
        handle: Handle,
        rows: int,
        cols: int,
        *,
        dtype: DataType,
        order: Order = Order.ROW,
        ld: int | None = None,
        alignment: int = 16,
    ) -> MatDescriptor:
        """Describe a 2:4 sparse [rows, cols] matrix as it is before compression.

        Raises:
            CusparseLtError: the library refuses the shape, type, order or alignment.

        Source: `cusparseLtStructuredDescriptorInit`.
        """
        return cls(
            handle,
            rows,
            cols,
            ld=ld,
            dtype=dtype,
            order=order,
            alignment=alignment,
            structured=True,
        )

    def __str__(self) -> str:
        kind = "structured" if self.is_structured else "dense"
        return f"{kind} {self.rows}x{self.cols} {self.dtype.name} {self.order.name} ld={self.ld}"

    def get(self, attribute: MatDescAttribute) -> int:
        """Return an attribute. See `cusparseLtMatDescGetAttribute`."""
        return int(
            read_attribute(
                capi.mat_desc_get_attribute, self, self.handle, MatDescAttribute(attribute)
            )
        )

    def set(self, attribute: MatDescAttribute, value: int) -> None:
        """Set an attribute. See `cusparseLtMatDescSetAttribute`."""
        write_attribute(
            capi.mat_desc_set_attribute, self, self.handle, MatDescAttribute(attribute), value
        )

    def compressed_size(self) -> tuple[int, int]:
        """Deprecated by NVIDIA, use the plan's: (bytes of the result, bytes of scratch).

        See `cusparseLtSpMMACompressedSize2`.
        """
        return read_sizes(capi.spmma_compressed_size2, self, self.handle)

    def compress(
        self,
        d_dense: int,
        d_compressed: int,
        d_buffer: int,
        *,
        is_sparse_a: bool = True,
        op: Operation = Operation.N,
        stream: int = 0,
    ) -> None:
        """Deprecated by NVIDIA, use the plan's: it cannot know which metadata order a plan reads.

        See `cusparseLtSpMMACompress2`.
        """
        pointers = (d_dense, d_compressed, d_buffer, stream)
        arguments = (self.handle.address, self.address, int(is_sparse_a), op, *pointers)
        capi.spmma_compress2(self.library, *arguments, context=str(self))

    def prune(
        self,
        d_in: int,
        d_out: int,
        prune_alg: PruneAlg,
        *,
        is_sparse_a: bool = True,
        op: Operation = Operation.N,
        stream: int = 0,
    ) -> None:
        """Deprecated by NVIDIA, use the matmul descriptor's. See `cusparseLtSpMMAPrune2`."""
        arguments = (self.handle.address, self.address, int(is_sparse_a), op)
        capi.spmma_prune2(
            self.library, *arguments, d_in, d_out, prune_alg, stream, context=str(self)
        )

    def prune_check(
        self,
        d_in: int,
        d_valid: int,
        *,
        is_sparse_a: bool = True,
        op: Operation = Operation.N,
        stream: int = 0,
    ) -> None:
        """Deprecated by NVIDIA, use the matmul descriptor's. See `cusparseLtSpMMAPruneCheck2`."""
        arguments = (self.handle.address, self.address, int(is_sparse_a), op, d_in, d_valid, stream)
        capi.spmma_prune_check2(self.library, *arguments, context=str(self))


class MatmulDescriptor(Owned):
    """D = alpha * op_a(A) @ op_b(B) + beta * C, with exactly one of A and B structured.

    Args:
        handle: the context that the descriptors were made with.
        op_a, op_b: N as it is, T transposed.
        a, b, c, d: the matrices; without d, D is described by c.
        compute_type: COMPUTE_32F for 16-bit and fp8 inputs, COMPUTE_32I for int8.

    Raises:
        CusparseLtError: the library refuses the combination; the message has all four matrices.

    Source: `cusparseLtMatmulDescriptorInit`.
    """

    def __init__(
        self,
        handle: Handle,
        *,
        op_a: Operation = Operation.N,
        op_b: Operation = Operation.N,
        a: MatDescriptor,
        b: MatDescriptor,
        c: MatDescriptor,
        d: MatDescriptor | None = None,
        compute_type: ComputeType = ComputeType.COMPUTE_32F,
    ) -> None:
        d = c if d is None else d
        self.handle = handle
        self.a, self.b, self.c, self.d = a, b, c, d
        self.op_a, self.op_b = Operation(op_a), Operation(op_b)
        self.compute_type = ComputeType(compute_type)
        storage = OpaqueStorage()
        capi.matmul_descriptor_init(
            handle.library,
            handle.address,
            storage.address,
            self.op_a,
            self.op_b,
            *(matrix.address for matrix in (a, b, c, d)),
            self.compute_type,
            context=str(self),
        )
        # This struct has no destroy function of its own in any version.
        self._own(handle.library, storage, None, (handle, *dict.fromkeys((a, b, c, d))))

    def __str__(self) -> str:
        m, k = (self.a.rows, self.a.cols)[:: -1 if self.op_a == Operation.T else 1]
        n = self.b.rows if self.op_b == Operation.T else self.b.cols
        return (
            f"M={m}, N={n}, K={k}, A={self.op_a.name}({self.a}), B={self.op_b.name}({self.b}), "
            f"C={self.c}, D={self.d}, {self.compute_type.name}"
        )

    def get(self, attribute: MatmulDescAttribute) -> int | float:
        """Return an attribute; a null pointer is 0. See `cusparseLtMatmulDescGetAttribute`."""
        key = MatmulDescAttribute(attribute)
        return read_attribute(capi.matmul_desc_get_attribute, self, self.handle, key)

    def set(self, attribute: MatmulDescAttribute, value: int | float) -> None:
        """Set an attribute; pointers are ints. See `cusparseLtMatmulDescSetAttribute`."""
        key = MatmulDescAttribute(attribute)
        write_attribute(capi.matmul_desc_set_attribute, self, self.handle, key, value)

    def prune(self, d_in: int, d_out: int, prune_alg: PruneAlg, stream: int = 0) -> None:
        """Prune the structured operand to 2:4. See `cusparseLtSpMMAPrune`."""
        arguments = (self.handle.address, self.address, d_in, d_out, prune_alg, stream)
        capi.spmma_prune(self.library, *arguments, context=str(self))

    def prune_check(self, d_in: int, d_valid: int, stream: int = 0) -> None:
        """Write the int32 at d_valid: 0 where d_in is 2:4, else 1.

        See `cusparseLtSpMMAPruneCheck`.
        """
        arguments = (self.handle.address, self.address, d_in, d_valid, stream)
        capi.spmma_prune_check(self.library, *arguments, context=str(self))


def _whole(function: str, argument: str, value: int, largest: int) -> int:
    """Refuse what C would silently truncate; what fits is for the library to judge."""
    if not isinstance(value, int):
        raise TypeError(
            f"{function}: {argument} must be an int, got {type(value).__name__}. Convert it first"
        )
    lowest = 0 if largest == _UINT32_MAX else -largest - 1
    if not lowest <= value <= largest:
        raise ValueError(
            f"{function}: {argument} must be from {lowest} to {largest}, got {value}. "
            "Split the matrix"
        )
    return value


def read_attribute(function: Any, owner: Owned, handle: Handle, attribute: Any) -> int | float:
    """Read one attribute through memory of its C type."""
    value = attribute_type(attribute)()
    where = (ctypes.addressof(value), ctypes.sizeof(value))
    context = f"{attribute.name} of {owner}"
    function(owner.library, handle.address, owner.address, attribute, *where, context=context)
    return value.value or 0


def write_attribute(
    function: Any, owner: Owned, handle: Handle, attribute: Any, number: Any
) -> None:
    """Write one attribute through memory of its C type."""
    value = attribute_type(attribute)(number)
    where = (ctypes.addressof(value), ctypes.sizeof(value))
    context = f"{attribute.name}={number} of {owner}"
    function(owner.library, handle.address, owner.address, attribute, *where, context=context)


def read_sizes(function: Any, owner: Owned, handle: Handle) -> tuple[int, int]:
    """Read the two sizes of a compressed matrix."""
    compressed, buffer = ctypes.c_size_t(), ctypes.c_size_t()
    where = (ctypes.addressof(compressed), ctypes.addressof(buffer))
    function(owner.library, handle.address, owner.address, *where, context=str(owner))
    return compressed.value, buffer.value
