"""sdgp.pack and sdgp.matmul: packed operands by hand, on whatever this machine has.

packed = pack(x);  matmul(packed, dense) = prune(x) @ dense
"""

from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt import packing
from sdgp_cusparselt.arrays import like, to_tensor
from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.backends.plans import (
    DATA_TYPES,
    DENSE_MULTIPLE,
    STRUCTURED_MULTIPLE,
    dense_order,
)
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.devices import is_capturing, on_device
from sdgp_cusparselt.errors import NotSupportedError, value_error
from sdgp_cusparselt.packing import MetadataLayout, Packed24
from sdgp_cusparselt.products import routes
from sdgp_cusparselt.tuning import decision_for

#: Prove the library's default algorithm right, time nothing.
_PROVEN = SDGPConfig(prune="magnitude", tune="never")


def pack(
    x: Any,
    *,
    method: str = "magnitude",
    transpose: bool = False,
    backend: str = "auto",
    generator: torch.Generator | None = None,
    layout: MetadataLayout | None = None,
) -> Packed24:
    """Prune 2:4 and compress.

    pack(x).unpack() = prune(x, dim=-1);  pack(x, transpose=True).unpack() = prune(x.T, dim=-1)

    Args:
        x: [M, K] float16|bfloat16, any device: a tensor, or an array that shares its memory
            through DLPack (NumPy, CuPy). int8|float8 for none, magnitude and random, without the
            kernel. K is a multiple of 4 unless transpose, where M may be anything.
        method: none (x is 2:4 already), random, magnitude, rescaled_magnitude or mvue.
        transpose: pack x.T along tokens, from the same row-major x.
        backend: "triton", "reference" (plain torch), or "auto". Both give the same bytes.
        generator: source of random numbers for random and mvue; torch's own if None.
        layout: where the metadata goes. If None, the order that the library on this machine reads,
            where it is proven, else the order of sm80.

    Returns:
        Packed24 on x's device.

    Raises:
        ValueError: x not 2-D, a width that is not in groups, an unknown method or backend, a
            layout that does not fit.
        TypeError: a dtype without a 2:4 format.
        NotSupportedError: backend "triton" where the kernel cannot run; the reason is named.
    """
    tensor = to_tensor(x, "pack", "x")
    if layout is None and tensor.ndim == 2:
        rows, cols = tensor.shape[::-1] if transpose else tensor.shape
        layout = library_layout(rows, cols, tensor.dtype, tensor.device)
    with on_device(tensor.device):  # the kernel starts on the current device
        return packing.pack(
            tensor,
            method=method,
            transpose=transpose,
            backend=backend,
            generator=generator,
            layout=layout,
        )


def matmul(packed: Packed24, dense: Any, *, backend: str = "auto") -> Any:
    """Multiply a packed operand with a dense matrix.

    out = packed.unpack() @ dense

    Args:
        packed: [M, K].
        dense: [K, N] of packed's dtype, on its device: a tensor or a DLPack array.
        backend: "cusparselt", "dense" (unpack and multiply), or "auto": the first that can.

    Returns:
        [M, N] of packed's dtype, of dense's kind.

    Raises:
        ValueError: shapes that do not match, or an unknown backend.
        TypeError: dtypes that differ.
        NotSupportedError: backend "cusparselt" where it cannot run; every reason is named.
    """
    if backend not in ("auto", "cusparselt", "dense"):
        rule = "'auto', 'cusparselt' or 'dense'"
        raise value_error("matmul", "backend", rule, repr(backend), "Pick one.")
    right = to_tensor(dense, "matmul", "dense")
    if backend == "dense":
        return like(dense, packing.matmul(packed, right))
    library, reasons = routes.LIBRARY, _reasons(packed, right)
    if not reasons:
        gemm = _gemm(packed, right)
        decision = decision_for(
            gemm,
            library,
            _PROVEN,
            method="none",
            transpose=False,
            capturing=is_capturing(gemm.device),
        )
        candidate = decision.candidate if decision.use == "sparse" else None
        if candidate is None:
            reasons = [decision.reason]
        elif not _reads(library.certificate(gemm, candidate).layout, packed):
            reasons = ["the library reads another metadata order; pack with layout=None"]
        else:
            return like(dense, library.matmul(packed.buffer, right, gemm, candidate))
    if backend == "cusparselt":
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        raise NotSupportedError(f"matmul: cusparselt cannot multiply {packed!r}:\n{lines}")
    return like(dense, packing.matmul(packed, right))


def library_layout(
    rows: int, cols: int, dtype: torch.dtype, device: torch.device
) -> MetadataLayout | None:
    """Return the metadata order that the library's default algorithm reads, where it is proven.

    Args:
        rows: of the operand.
        cols: of the operand.
        dtype: of the operand.
        device: where it lies.

    Returns:
        The order, or None: no library, no device for it, another dtype, or no proof.
    """
    library = routes.LIBRARY
    fits = dtype in DATA_TYPES and cols % STRUCTURED_MULTIPLE == 0 and rows > 0
    if not fits or library.machine_reasons(device):
        return None
    gemm = Gemm(rows, STRUCTURED_MULTIPLE, cols, dtype, "row", device)
    return library.certificate(gemm, Candidate(0)).layout


def _gemm(packed: Packed24, dense: Tensor) -> Gemm:
    (m, k), n = packed.shape, dense.shape[1]
    return Gemm(m, n, k, packed.dtype, dense_order(dense) or "row", dense.device)


def _reads(layout: MetadataLayout | None, packed: Packed24) -> bool:
    return layout is not None and layout.reads_as(packed.layout, *packed.padded_shape)


def _reasons(packed: Packed24, dense: Tensor) -> list[str]:
    reasons = routes.LIBRARY.machine_reasons(dense.device)
    if reasons:
        return reasons
    reasons = []
    if packed.dtype not in DATA_TYPES:
        reasons.append(f"{packed.dtype} is neither bfloat16 nor float16")
    if dense.dtype != packed.dtype or dense.ndim != 2 or dense.shape[0] != packed.shape[1]:
        reasons.append(f"the dense operand is {list(dense.shape)} {dense.dtype}")
    elif dense.shape[1] % DENSE_MULTIPLE or packed.shape[1] % STRUCTURED_MULTIPLE:
        reasons.append(f"K must be a multiple of {STRUCTURED_MULTIPLE}, N of {DENSE_MULTIPLE}")
    elif dense_order(dense) is None:
        reasons.append("the dense operand is neither row- nor column-major, or not aligned")
    return reasons
