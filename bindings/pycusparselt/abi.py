"""What the C header fixes: enum values, struct sizes and alignment. No function, no library.

One set of numbers serves 0.6.2 to 0.10.0, since no value ever changed in that range; what newer
headers added is marked. ``make test-abi`` compares all of it with each version's own header.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum

# Largest sizeof of the five opaque structs: 13072 bytes in 0.6.x, 1024 in 0.7.x, 512 since 0.8.
OPAQUE_SIZE = 16384
# 0.8 declares alignas(16) and reads the structs with aligned instructions.
OPAQUE_ALIGNMENT = 16


class Status(IntEnum):
    """cusparseStatus_t."""

    SUCCESS = 0
    NOT_INITIALIZED = 1
    ALLOC_FAILED = 2
    INVALID_VALUE = 3
    ARCH_MISMATCH = 4
    MAPPING_ERROR = 5
    EXECUTION_FAILED = 6
    INTERNAL_ERROR = 7
    MATRIX_TYPE_NOT_SUPPORTED = 8
    ZERO_PIVOT = 9
    NOT_SUPPORTED = 10
    INSUFFICIENT_RESOURCES = 11


class DataType(IntEnum):
    """cudaDataType, the real types that a matrix may have."""

    R_32F = 0
    R_16F = 2
    R_8I = 3
    R_32I = 10
    R_16BF = 14
    R_8F_E4M3 = 28
    R_8F_E5M2 = 29
    R_4F_E2M1 = 33


class Operation(IntEnum):
    """cusparseOperation_t."""

    N = 0
    T = 1


class Order(IntEnum):
    """cusparseOrder_t."""

    COL = 1
    ROW = 2


class Property(IntEnum):
    """libraryPropertyType."""

    MAJOR_VERSION = 0
    MINOR_VERSION = 1
    PATCH_LEVEL = 2


class Sparsity(IntEnum):
    """cusparseLtSparsity_t."""

    SPARSITY_50_PERCENT = 0


class MatDescAttribute(IntEnum):
    """cusparseLtMatDescAttribute_t."""

    NUM_BATCHES = 0
    BATCH_STRIDE = 1


class ComputeType(IntEnum):
    """cusparseComputeType; the values before 0.5.2 meant something else."""

    COMPUTE_32I = 0
    COMPUTE_16F = 1
    COMPUTE_32F = 2


class MatmulDescAttribute(IntEnum):
    """cusparseLtMatmulDescAttribute_t; the scale attributes came with 0.7."""

    ACTIVATION_RELU = 0
    ACTIVATION_RELU_UPPERBOUND = 1
    ACTIVATION_RELU_THRESHOLD = 2
    ACTIVATION_GELU = 3
    ACTIVATION_GELU_SCALING = 4
    ALPHA_VECTOR_SCALING = 5
    BETA_VECTOR_SCALING = 6
    BIAS_STRIDE = 7
    BIAS_POINTER = 8
    SPARSE_MAT_POINTER = 9
    A_SCALE_MODE = 10
    B_SCALE_MODE = 11
    C_SCALE_MODE = 12
    D_SCALE_MODE = 13
    D_OUT_SCALE_MODE = 14
    A_SCALE_POINTER = 15
    B_SCALE_POINTER = 16
    C_SCALE_POINTER = 17
    D_SCALE_POINTER = 18
    D_OUT_SCALE_POINTER = 19


class MatmulMatrixScale(IntEnum):
    """cusparseLtMatmulMatrixScale_t, since 0.7."""

    NONE = 0
    SCALAR_32F = 1
    VEC32_UE4M3 = 2
    VEC64_UE8M0 = 3


class MatmulAlg(IntEnum):
    """cusparseLtMatmulAlg_t."""

    DEFAULT = 0


class AlgAttribute(IntEnum):
    """cusparseLtMatmulAlgAttribute_t."""

    CONFIG_ID = 0
    CONFIG_MAX_ID = 1
    SEARCH_ITERATIONS = 2
    SPLIT_K = 3
    SPLIT_K_MODE = 4
    SPLIT_K_BUFFERS = 5


class SplitKMode(IntEnum):
    """cusparseLtSplitKMode_t; values from 3 on came with 0.7."""

    INVALID = 0
    ONE_KERNEL = 1
    TWO_KERNELS = 2
    HEURISTIC = 3
    DATAPARALLEL = 4
    SPLITK = 5
    STREAMK = 6


class PruneAlg(IntEnum):
    """cusparseLtPruneAlg_t."""

    TILE = 0
    STRIP = 1


_POINTER_ATTRIBUTES = (
    MatmulDescAttribute.BIAS_POINTER,
    MatmulDescAttribute.SPARSE_MAT_POINTER,
    MatmulDescAttribute.A_SCALE_POINTER,
    MatmulDescAttribute.B_SCALE_POINTER,
    MatmulDescAttribute.C_SCALE_POINTER,
    MatmulDescAttribute.D_SCALE_POINTER,
    MatmulDescAttribute.D_OUT_SCALE_POINTER,
)
_FLOAT_ATTRIBUTES = (
    MatmulDescAttribute.ACTIVATION_RELU_UPPERBOUND,
    MatmulDescAttribute.ACTIVATION_RELU_THRESHOLD,
    MatmulDescAttribute.ACTIVATION_GELU_SCALING,
)

Scalar = type[ctypes.c_int] | type[ctypes.c_int64] | type[ctypes.c_float] | type[ctypes.c_void_p]


def attribute_type(attribute: IntEnum) -> Scalar:
    """Return the C type behind one attribute of a matrix, a matmul or an algorithm selection."""
    if attribute is MatDescAttribute.BATCH_STRIDE:
        return ctypes.c_int64
    if isinstance(attribute, MatmulDescAttribute):
        if attribute in _POINTER_ATTRIBUTES:
            return ctypes.c_void_p
        if attribute in _FLOAT_ATTRIBUTES:
            return ctypes.c_float
        if attribute is MatmulDescAttribute.BIAS_STRIDE:
            return ctypes.c_int64
    return ctypes.c_int


class OpaqueStorage:
    """Zeroed memory for one opaque struct, aligned, large enough for every version, never moved.

    The library may keep pointers into these structs, so one is neither copied nor reused.
    """

    __slots__ = ("_memory", "address", "pointer")

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(OPAQUE_SIZE + OPAQUE_ALIGNMENT)
        start = ctypes.addressof(self._memory)
        self.address: int = -(-start // OPAQUE_ALIGNMENT) * OPAQUE_ALIGNMENT
        self.pointer = ctypes.c_void_p(self.address)
