"""AlgSelection and MatmulPlan: what runs; and every object of the binding by one import."""

from __future__ import annotations

import ctypes

from pycusparselt import cusparselt as capi
from pycusparselt.abi import AlgAttribute, MatmulAlg, OpaqueStorage
from pycusparselt.descriptors import (
    Handle,
    MatDescriptor,
    MatmulDescriptor,
    read_attribute,
    read_sizes,
    write_attribute,
)
from pycusparselt.lifetime import Owned

__all__ = ["AlgSelection", "Handle", "MatDescriptor", "MatmulDescriptor", "MatmulPlan"]


class AlgSelection(Owned):
    """Which of the library's algorithms a plan uses. See `cusparseLtMatmulAlgSelectionInit`."""

    def __init__(
        self, handle: Handle, matmul: MatmulDescriptor, alg: MatmulAlg = MatmulAlg.DEFAULT
    ) -> None:
        self.handle, self.matmul = handle, matmul
        storage = OpaqueStorage()
        arguments = (handle.address, storage.address, matmul.address, alg)
        capi.matmul_alg_selection_init(handle.library, *arguments, context=str(matmul))
        # Versions before 0.8 have nothing to destroy here, and no function for it.
        destroy = capi.matmul_alg_selection_destroy
        exists = handle.library.has(destroy.name)
        self._own(handle.library, storage, destroy if exists else None, (handle, matmul))

    def __str__(self) -> str:
        return str(self.matmul)

    def get(self, attribute: AlgAttribute) -> int:
        """Return an attribute. See `cusparseLtMatmulAlgGetAttribute`."""
        return int(
            read_attribute(
                capi.matmul_alg_get_attribute, self, self.handle, AlgAttribute(attribute)
            )
        )

    def set(self, attribute: AlgAttribute, value: int) -> None:
        """Set an attribute; CONFIG_MAX_ID is read-only. See `cusparseLtMatmulAlgSetAttribute`."""
        write_attribute(
            capi.matmul_alg_set_attribute, self, self.handle, AlgAttribute(attribute), value
        )


class MatmulPlan(Owned):
    """A problem with its algorithm, ready to run many times. See `cusparseLtMatmulPlanInit`.

    alpha, beta and the stream live in memory of the plan that every call overwrites, so one plan
    is used by one thread at a time: the thread of its handle.
    """

    def __init__(
        self, handle: Handle, matmul: MatmulDescriptor, alg_selection: AlgSelection
    ) -> None:
        self.handle, self.descriptor, self.alg_selection = handle, matmul, alg_selection
        storage = OpaqueStorage()
        arguments = (handle.address, storage.address, matmul.address, alg_selection.address)
        capi.matmul_plan_init(handle.library, *arguments, context=str(matmul))
        self._own(
            handle.library, storage, capi.matmul_plan_destroy, (handle, matmul, alg_selection)
        )
        self._handle_pointer = ctypes.c_void_p(handle.address)
        self._plan_pointer = storage.pointer
        self._alpha, self._beta = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._alpha_pointer = ctypes.c_void_p(ctypes.addressof(self._alpha))
        self._beta_pointer = ctypes.c_void_p(ctypes.addressof(self._beta))
        self._stream = ctypes.c_void_p(0)
        self._streams_pointer = ctypes.c_void_p(ctypes.addressof(self._stream))
        self._matmul = capi.matmul.resolve(handle.library)

    def __str__(self) -> str:
        return str(self.descriptor)

    @property
    def workspace_size(self) -> int:
        """Bytes of device scratch for :meth:`matmul`. See `cusparseLtMatmulGetWorkspace`."""
        size = ctypes.c_size_t()
        arguments = (self.handle.address, self.address, ctypes.addressof(size))
        capi.matmul_get_workspace(self.library, *arguments, context=str(self))
        return size.value

    def compressed_size(self) -> tuple[int, int]:
        """Return (bytes of the compressed matrix, bytes of scratch for :meth:`compress`).

        See `cusparseLtSpMMACompressedSize`.
        """
        return read_sizes(capi.spmma_compressed_size, self, self.handle)

    def compress(self, d_dense: int, d_compressed: int, d_buffer: int, stream: int = 0) -> None:
        """Compress the structured operand, already 2:4, in the order that this plan reads.

        See `cusparseLtSpMMACompress`.
        """
        arguments = (self.handle.address, self.address, d_dense, d_compressed, d_buffer, stream)
        capi.spmma_compress(self.library, *arguments, context=str(self))

    def matmul(
        self,
        alpha: float,
        d_a: int,
        d_b: int,
        beta: float,
        d_c: int,
        d_d: int,
        workspace: int = 0,
        stream: int = 0,
    ) -> None:
        """D = alpha * op_a(A) @ op_b(B) + beta * C, asynchronous on the stream.

        Args:
            alpha, beta: host numbers. Where ALPHA_ or BETA_VECTOR_SCALING is set the library wants
                a device vector instead: call :func:`pycusparselt.cusparselt.matmul`.
            d_a, d_b: the structured one of the two is the compressed buffer.
            d_c, d_d: may be the same memory; d_c must not be null, even where beta is 0.
            workspace: of :attr:`workspace_size` bytes, or 0.
            stream: a cudaStream_t.

        Raises:
            CusparseLtError: the library refused.
            PlanStateError: the plan has been closed.

        Source: `cusparseLtMatmul`.
        """
        if not self._resource.alive:
            self._require_open("matmul")
        self._alpha.value = alpha
        self._beta.value = beta
        self._stream.value = stream
        status = self._matmul(
            self._handle_pointer,
            self._plan_pointer,
            self._alpha_pointer,
            d_a,
            d_b,
            self._beta_pointer,
            d_c,
            d_d,
            workspace,
            self._streams_pointer,
            1,
        )
        if status:
            capi.check_status(self.library, status, "cusparseLtMatmul", str(self))

    def search(
        self,
        alpha: float,
        d_a: int,
        d_b: int,
        beta: float,
        d_c: int,
        d_d: int,
        workspace: int = 0,
        stream: int = 0,
    ) -> None:
        """Time the library's algorithms and switch the plan to the fastest; blocks, overwrites D.

        Arguments as for :meth:`matmul`. It trusts every algorithm to be right; that is the
        library's choice, not a proof. See `cusparseLtMatmulSearch`.
        """
        address = self.address
        self._alpha.value, self._beta.value, self._stream.value = alpha, beta, stream
        left = (self._handle_pointer, address, self._alpha_pointer, d_a, d_b, self._beta_pointer)
        right = (d_c, d_d, workspace, self._streams_pointer, 1)
        capi.matmul_search(self.library, *left, *right, context=str(self))
