"""Every C function of cuSPARSELt 0.10.0, one to one; pointers go in as plain integers.

Each function takes the library first and the C arguments after it, and raises
:class:`CusparseLtError` on any status but success. Nothing is converted, allocated or kept.
Functions marked deprecated by NVIDIA (the names that end in 2) are here, since every version
still exports them.
"""

from __future__ import annotations

import ctypes
from typing import Any

from pycusparselt.abi import Status
from pycusparselt.errors import CusparseLtError
from pycusparselt.loader import Library

STATUS = ENUM = INT = ctypes.c_int
INT32 = ctypes.c_int32
INT64 = ctypes.c_int64
UINT32 = ctypes.c_uint32
SIZE = ctypes.c_size_t
TEXT = ctypes.c_char_p
POINTER = STREAM = ctypes.c_void_p

_HINTS = {
    ("cusparseLtInit", Status.NOT_INITIALIZED): (
        "no usable NVIDIA GPU or driver: nvidia-smi must list a GPU of compute capability 8.0 or "
        "more"
    ),
    ("cusparseLtInit", Status.ARCH_MISMATCH): (
        "this library has no kernels for this GPU: it needs compute capability 8.0 or more and a "
        "library that knows the GPU"
    ),
}

# Measured on 0.8.1 and 0.10.0: this one reads through a null pointer, all others refuse it.
_CRASHES_ON_NULL = {"cusparseLtDestroy"}


class CFunction:
    """One C function: its name, its types, and how to call it on a library."""

    def __init__(self, name: str, restype: Any, *argtypes: Any) -> None:
        self.name = name
        self.restype = restype
        self.argtypes = argtypes

    def __repr__(self) -> str:
        return f"CFunction({self.name})"

    def resolve(self, library: Library) -> Any:
        """Return the ctypes function of this library, types set, status unchecked.

        Raises:
            FunctionNotAvailableError: this version of the library does not export it.
        """
        return library.symbol(self.name, self.argtypes, self.restype)

    def __call__(self, library: Library, *arguments: Any, context: str = "") -> Any:
        """Call the C function; return its text, or None where it returns a status.

        Raises:
            CusparseLtError: the status is not success; context is part of its message.
            FunctionNotAvailableError: this version of the library does not export it.
            ValueError: a null pointer where the library would crash on it.
        """
        if self.name in _CRASHES_ON_NULL and not arguments[0]:
            raise ValueError(f"{self.name}: handle must be an address, got 0. Initialise it first")
        result = self.resolve(library)(*arguments)
        if self.restype is TEXT:
            return result.decode() if result is not None else ""
        if result:
            check_status(library, result, self.name, context)
        return None


def check_status(library: Library, status: int, function: str, context: str = "") -> None:
    """Raise unless status is success.

    Args:
        library: asked for its own sentence on the status, where it exports one (0.8 and later).
        status: what the C function returned.
        function: the name of the C function.
        context: shapes and dtypes at hand.

    Raises:
        CusparseLtError: status is not success.
    """
    if status == Status.SUCCESS:
        return
    try:
        known = Status(status)
        name = f"CUSPARSE_STATUS_{known.name}"
        hint = _HINTS.get((function, known), "")
    except ValueError:
        name, hint = f"CUSPARSE_STATUS_{status}", ""
    text = ""
    if library.has(get_error_string.name):
        text = get_error_string(library, status)
    parts = (hint, context, f"library {library.version_text}")
    raise CusparseLtError(status, name, function, text, "; ".join(part for part in parts if part))


# cusparseStatus_t cusparseLtInit(cusparseLtHandle_t* handle)
init = CFunction("cusparseLtInit", STATUS, POINTER)

# cusparseStatus_t cusparseLtDestroy(const cusparseLtHandle_t* handle)
destroy = CFunction("cusparseLtDestroy", STATUS, POINTER)

# cusparseStatus_t cusparseLtGetVersion(const cusparseLtHandle_t* handle, int* version)
get_version = CFunction("cusparseLtGetVersion", STATUS, POINTER, POINTER)

# cusparseStatus_t cusparseLtGetProperty(libraryPropertyType propertyType, int* value)
get_property = CFunction("cusparseLtGetProperty", STATUS, ENUM, POINTER)

# const char* cusparseLtGetErrorName(cusparseStatus_t status)
get_error_name = CFunction("cusparseLtGetErrorName", TEXT, ENUM)

# const char* cusparseLtGetErrorString(cusparseStatus_t status)
get_error_string = CFunction("cusparseLtGetErrorString", TEXT, ENUM)

# cusparseStatus_t cusparseLtDenseDescriptorInit(const cusparseLtHandle_t* handle,
#     cusparseLtMatDescriptor_t* matDescr, int64_t rows, int64_t cols, int64_t ld,
#     uint32_t alignment, cudaDataType valueType, cusparseOrder_t order)
dense_descriptor_init = CFunction(
    "cusparseLtDenseDescriptorInit",
    STATUS,
    POINTER,
    POINTER,
    INT64,
    INT64,
    INT64,
    UINT32,
    ENUM,
    ENUM,
)

# cusparseStatus_t cusparseLtStructuredDescriptorInit(const cusparseLtHandle_t* handle,
#     cusparseLtMatDescriptor_t* matDescr, int64_t rows, int64_t cols, int64_t ld,
#     uint32_t alignment, cudaDataType valueType, cusparseOrder_t order,
#     cusparseLtSparsity_t sparsity)
structured_descriptor_init = CFunction(
    "cusparseLtStructuredDescriptorInit",
    STATUS,
    POINTER,
    POINTER,
    INT64,
    INT64,
    INT64,
    UINT32,
    ENUM,
    ENUM,
    ENUM,
)

# cusparseStatus_t cusparseLtMatDescriptorDestroy(const cusparseLtMatDescriptor_t* matDescr)
mat_descriptor_destroy = CFunction("cusparseLtMatDescriptorDestroy", STATUS, POINTER)

# cusparseStatus_t cusparseLtMatDescSetAttribute(const cusparseLtHandle_t* handle,
#     cusparseLtMatDescriptor_t* matmulDescr, cusparseLtMatDescAttribute_t matAttribute,
#     const void* data, size_t dataSize)
mat_desc_set_attribute = CFunction(
    "cusparseLtMatDescSetAttribute", STATUS, POINTER, POINTER, ENUM, POINTER, SIZE
)

# cusparseStatus_t cusparseLtMatDescGetAttribute(const cusparseLtHandle_t* handle,
#     const cusparseLtMatDescriptor_t* matmulDescr, cusparseLtMatDescAttribute_t matAttribute,
#     void* data, size_t dataSize)
mat_desc_get_attribute = CFunction(
    "cusparseLtMatDescGetAttribute", STATUS, POINTER, POINTER, ENUM, POINTER, SIZE
)

# cusparseStatus_t cusparseLtMatmulDescriptorInit(const cusparseLtHandle_t* handle,
#     cusparseLtMatmulDescriptor_t* matmulDescr, cusparseOperation_t opA, cusparseOperation_t opB,
#     const cusparseLtMatDescriptor_t* matA, const cusparseLtMatDescriptor_t* matB,
#     const cusparseLtMatDescriptor_t* matC, const cusparseLtMatDescriptor_t* matD,
#     cusparseComputeType computeType)
matmul_descriptor_init = CFunction(
    "cusparseLtMatmulDescriptorInit",
    STATUS,
    POINTER,
    POINTER,
    ENUM,
    ENUM,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    ENUM,
)

# cusparseStatus_t cusparseLtMatmulDescSetAttribute(const cusparseLtHandle_t* handle,
#     cusparseLtMatmulDescriptor_t* matmulDescr, cusparseLtMatmulDescAttribute_t matmulAttribute,
#     const void* data, size_t dataSize)
matmul_desc_set_attribute = CFunction(
    "cusparseLtMatmulDescSetAttribute", STATUS, POINTER, POINTER, ENUM, POINTER, SIZE
)

# cusparseStatus_t cusparseLtMatmulDescGetAttribute(const cusparseLtHandle_t* handle,
#     const cusparseLtMatmulDescriptor_t* matmulDescr,
#     cusparseLtMatmulDescAttribute_t matmulAttribute, void* data, size_t dataSize)
matmul_desc_get_attribute = CFunction(
    "cusparseLtMatmulDescGetAttribute", STATUS, POINTER, POINTER, ENUM, POINTER, SIZE
)

# cusparseStatus_t cusparseLtMatmulAlgSelectionInit(const cusparseLtHandle_t* handle,
#     cusparseLtMatmulAlgSelection_t* algSelection,
#     const cusparseLtMatmulDescriptor_t* matmulDescr, cusparseLtMatmulAlg_t alg)
matmul_alg_selection_init = CFunction(
    "cusparseLtMatmulAlgSelectionInit", STATUS, POINTER, POINTER, POINTER, ENUM
)

# cusparseStatus_t cusparseLtMatmulAlgSelectionDestroy(
#     const cusparseLtMatmulAlgSelection_t* algSelection)
matmul_alg_selection_destroy = CFunction("cusparseLtMatmulAlgSelectionDestroy", STATUS, POINTER)

# cusparseStatus_t cusparseLtMatmulAlgSetAttribute(const cusparseLtHandle_t* handle,
#     cusparseLtMatmulAlgSelection_t* algSelection, cusparseLtMatmulAlgAttribute_t attribute,
#     const void* data, size_t dataSize)
matmul_alg_set_attribute = CFunction(
    "cusparseLtMatmulAlgSetAttribute", STATUS, POINTER, POINTER, ENUM, POINTER, SIZE
)

# cusparseStatus_t cusparseLtMatmulAlgGetAttribute(const cusparseLtHandle_t* handle,
#     const cusparseLtMatmulAlgSelection_t* algSelection, cusparseLtMatmulAlgAttribute_t attribute,
#     void* data, size_t dataSize)
matmul_alg_get_attribute = CFunction(
    "cusparseLtMatmulAlgGetAttribute", STATUS, POINTER, POINTER, ENUM, POINTER, SIZE
)

# cusparseStatus_t cusparseLtMatmulGetWorkspace(const cusparseLtHandle_t* handle,
#     const cusparseLtMatmulPlan_t* plan, size_t* workspaceSize)
matmul_get_workspace = CFunction("cusparseLtMatmulGetWorkspace", STATUS, POINTER, POINTER, POINTER)

# cusparseStatus_t cusparseLtMatmulPlanInit(const cusparseLtHandle_t* handle,
#     cusparseLtMatmulPlan_t* plan, const cusparseLtMatmulDescriptor_t* matmulDescr,
#     const cusparseLtMatmulAlgSelection_t* algSelection)
matmul_plan_init = CFunction("cusparseLtMatmulPlanInit", STATUS, POINTER, POINTER, POINTER, POINTER)

# cusparseStatus_t cusparseLtMatmulPlanDestroy(const cusparseLtMatmulPlan_t* plan)
matmul_plan_destroy = CFunction("cusparseLtMatmulPlanDestroy", STATUS, POINTER)

# cusparseStatus_t cusparseLtMatmul(const cusparseLtHandle_t* handle,
#     const cusparseLtMatmulPlan_t* plan, const void* alpha, const void* d_A, const void* d_B,
#     const void* beta, const void* d_C, void* d_D, void* workspace, cudaStream_t* streams,
#     int32_t numStreams)
matmul = CFunction(
    "cusparseLtMatmul",
    STATUS,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    INT32,
)

# cusparseStatus_t cusparseLtMatmulSearch(const cusparseLtHandle_t* handle,
#     cusparseLtMatmulPlan_t* plan, const void* alpha, const void* d_A, const void* d_B,
#     const void* beta, const void* d_C, void* d_D, void* workspace, cudaStream_t* streams,
#     int32_t numStreams)
matmul_search = CFunction(
    "cusparseLtMatmulSearch",
    STATUS,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    INT32,
)

# cusparseStatus_t cusparseLtSpMMAPrune(const cusparseLtHandle_t* handle,
#     const cusparseLtMatmulDescriptor_t* matmulDescr, const void* d_in, void* d_out,
#     cusparseLtPruneAlg_t pruneAlg, cudaStream_t stream)
spmma_prune = CFunction(
    "cusparseLtSpMMAPrune", STATUS, POINTER, POINTER, POINTER, POINTER, ENUM, STREAM
)

# cusparseStatus_t cusparseLtSpMMAPruneCheck(const cusparseLtHandle_t* handle,
#     const cusparseLtMatmulDescriptor_t* matmulDescr, const void* d_in, int* valid,
#     cudaStream_t stream)
spmma_prune_check = CFunction(
    "cusparseLtSpMMAPruneCheck", STATUS, POINTER, POINTER, POINTER, POINTER, STREAM
)

# cusparseStatus_t cusparseLtSpMMAPrune2(const cusparseLtHandle_t* handle,
#     const cusparseLtMatDescriptor_t* sparseMatDescr, int isSparseA, cusparseOperation_t op,
#     const void* d_in, void* d_out, cusparseLtPruneAlg_t pruneAlg, cudaStream_t stream)
spmma_prune2 = CFunction(
    "cusparseLtSpMMAPrune2", STATUS, POINTER, POINTER, INT, ENUM, POINTER, POINTER, ENUM, STREAM
)

# cusparseStatus_t cusparseLtSpMMAPruneCheck2(const cusparseLtHandle_t* handle,
#     const cusparseLtMatDescriptor_t* sparseMatDescr, int isSparseA, cusparseOperation_t op,
#     const void* d_in, int* d_valid, cudaStream_t stream)
spmma_prune_check2 = CFunction(
    "cusparseLtSpMMAPruneCheck2", STATUS, POINTER, POINTER, INT, ENUM, POINTER, POINTER, STREAM
)

# cusparseStatus_t cusparseLtSpMMACompressedSize(const cusparseLtHandle_t* handle,
#     const cusparseLtMatmulPlan_t* plan, size_t* compressedSize, size_t* compressedBufferSize)
spmma_compressed_size = CFunction(
    "cusparseLtSpMMACompressedSize", STATUS, POINTER, POINTER, POINTER, POINTER
)

# cusparseStatus_t cusparseLtSpMMACompress(const cusparseLtHandle_t* handle,
#     const cusparseLtMatmulPlan_t* plan, const void* d_dense, void* d_compressed,
#     void* d_compressed_buffer, cudaStream_t stream)
spmma_compress = CFunction(
    "cusparseLtSpMMACompress", STATUS, POINTER, POINTER, POINTER, POINTER, POINTER, STREAM
)

# cusparseStatus_t cusparseLtSpMMACompressedSize2(const cusparseLtHandle_t* handle,
#     const cusparseLtMatDescriptor_t* sparseMatDescr, size_t* compressedSize,
#     size_t* compressedBufferSize)
spmma_compressed_size2 = CFunction(
    "cusparseLtSpMMACompressedSize2", STATUS, POINTER, POINTER, POINTER, POINTER
)

# cusparseStatus_t cusparseLtSpMMACompress2(const cusparseLtHandle_t* handle,
#     const cusparseLtMatDescriptor_t* sparseMatDescr, int isSparseA, cusparseOperation_t op,
#     const void* d_dense, void* d_compressed, void* d_compressed_buffer, cudaStream_t stream)
spmma_compress2 = CFunction(
    "cusparseLtSpMMACompress2",
    STATUS,
    POINTER,
    POINTER,
    INT,
    ENUM,
    POINTER,
    POINTER,
    POINTER,
    STREAM,
)

FUNCTIONS: dict[str, CFunction] = {
    value.name: value for value in list(globals().values()) if isinstance(value, CFunction)
}
