"""cuSPARSELt in Python: the C API as it is, and objects that own its lifetimes.

    lib = load()                        # finds libcusparseLt; needs no GPU
    with Handle(lib) as handle:
        a = MatDescriptor.structured(handle, m, k, dtype=DataType.R_16BF)
        ...

``pycusparselt.cusparselt`` has the 31 C functions one to one.
"""

from pycusparselt.abi import (
    AlgAttribute,
    ComputeType,
    DataType,
    MatDescAttribute,
    MatmulAlg,
    MatmulDescAttribute,
    MatmulMatrixScale,
    Operation,
    Order,
    PruneAlg,
    SplitKMode,
    Status,
)
from pycusparselt.errors import (
    CusparseLtError,
    FunctionNotAvailableError,
    LibraryNotFoundError,
    LibraryVersionWarning,
    PlanStateError,
    UnsupportedVersionError,
)
from pycusparselt.loader import Library, load
from pycusparselt.objects import (
    AlgSelection,
    Handle,
    MatDescriptor,
    MatmulDescriptor,
    MatmulPlan,
)

__all__ = [
    "AlgAttribute",
    "AlgSelection",
    "ComputeType",
    "CusparseLtError",
    "DataType",
    "FunctionNotAvailableError",
    "Handle",
    "Library",
    "LibraryNotFoundError",
    "LibraryVersionWarning",
    "MatDescAttribute",
    "MatDescriptor",
    "MatmulAlg",
    "MatmulDescAttribute",
    "MatmulDescriptor",
    "MatmulMatrixScale",
    "MatmulPlan",
    "Operation",
    "Order",
    "PlanStateError",
    "PruneAlg",
    "SplitKMode",
    "Status",
    "UnsupportedVersionError",
    "load",
]
