"""Structured Data Gradient Pruning (SDGP) on 2:4 sparse tensor cores.

output      = input              @ weight.T  dense, or the weight 2 of 4 along in_features
grad_input  = prune(grad_output) @ weight    2 of 4 along out_features, on sparse tensor cores
grad_weight = grad_output.T      @ input     dense, or 2 of 4 along tokens
"""

from sdgp_cusparselt.versions import __version__

try:
    import torch as _torch  # noqa: F401
# OSError is what a wheel raises whose own libraries do not load.
except (ImportError, OSError) as _error:
    _why = f"sdgp_cusparselt needs torch, which cannot be imported: {_error}"

    def _missing(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(_why)

    # ``sdgp info`` reports on such a machine all the same. Not by its name, which would tell type
    # checkers that this module has every attribute.
    globals()["__getattr__"] = _missing
else:
    from sdgp_cusparselt import functional, nn, weights
    from sdgp_cusparselt.arrays import same_kind
    from sdgp_cusparselt.config.choices import SDGPConfig
    from sdgp_cusparselt.config.schedule import Schedule
    from sdgp_cusparselt.errors import (
        EquivalenceError,
        NotSupportedError,
        SDGPCacheWarning,
        SDGPError,
        SDGPFallbackWarning,
        SDGPScheduleWarning,
    )
    from sdgp_cusparselt.layers.convert import convert_, revert_, set_enabled_
    from sdgp_cusparselt.layers.fuse import fuse_
    from sdgp_cusparselt.layers.report import ConversionReport, FusionReport
    from sdgp_cusparselt.layers.stepping import load_schedule_state, schedule_state, step, step_with
    from sdgp_cusparselt.packing import MetadataLayout, Packed24
    from sdgp_cusparselt.products.by_hand import library_layout, matmul, pack
    from sdgp_cusparselt.products.routes import BackendStatus, backend_status
    from sdgp_cusparselt.pruning import methods
    from sdgp_cusparselt.telemetry.counts import Telemetry, telemetry
    from sdgp_cusparselt.tuning.recorder import record_shapes
    from sdgp_cusparselt.weights.export import ExportReport, export_
    from sdgp_cusparselt.weights.files import load_exported_, save_exported

    #: ``pruning.prune`` for tensors, and for NumPy and CuPy arrays through DLPack.
    prune = same_kind(methods.prune)

__all__ = [
    "BackendStatus",
    "ConversionReport",
    "EquivalenceError",
    "ExportReport",
    "FusionReport",
    "MetadataLayout",
    "NotSupportedError",
    "Packed24",
    "SDGPCacheWarning",
    "SDGPConfig",
    "SDGPError",
    "SDGPFallbackWarning",
    "SDGPScheduleWarning",
    "Schedule",
    "Telemetry",
    "__version__",
    "backend_status",
    "convert_",
    "export_",
    "functional",
    "fuse_",
    "library_layout",
    "load_exported_",
    "load_schedule_state",
    "matmul",
    "nn",
    "pack",
    "prune",
    "record_shapes",
    "revert_",
    "save_exported",
    "schedule_state",
    "set_enabled_",
    "step",
    "step_with",
    "telemetry",
    "weights",
]
