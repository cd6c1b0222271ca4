"""No public name is lost: what a release had stays importable from where it was."""

import importlib

import pytest

#: Module -> the names that users import from it.
PUBLIC = {
    "sdgp_cusparselt": """
        BackendStatus ConversionReport EquivalenceError ExportReport FusionReport MetadataLayout
        NotSupportedError Packed24 SDGPCacheWarning SDGPConfig SDGPError SDGPFallbackWarning
        SDGPScheduleWarning Schedule Telemetry __version__ backend_status convert_ export_
        functional fuse_ library_layout load_exported_ load_schedule_state matmul nn pack prune
        record_shapes revert_ save_exported schedule_state set_enabled_ step step_with telemetry
        weights
    """,
    "sdgp_cusparselt.nn": "SDGPConv1D SDGPConv2d SDGPLinear SDGPModule",
    "sdgp_cusparselt.functional": "conv2d gated_mlp linear linear_cross_entropy mlp",
    "sdgp_cusparselt.config": "SDGPConfig Schedule check_config",
    "sdgp_cusparselt.pruning": "prune",
    "sdgp_cusparselt.packing": "MetadataLayout Packed24 matmul pack",
    "sdgp_cusparselt.diagnostics": "GradientDiagnostics GradientRow MEASURES",
    "sdgp_cusparselt.weights": """
        FST InputNorms MaskDecay Mishra OneShot SLoPe SRSTE StructureDecay Unstructured
        WeightRecipe finish_ magnitude_scores mask_gradients_ nm_mask set_masks_ sparsify_
        transposable_mask unstructured_mask
    """,
    "sdgp_cusparselt.errors": """
        CusparseLtError EquivalenceError LibraryNotFoundError NotSupportedError PlanStateError
        SDGPCacheWarning SDGPError SDGPFallbackWarning
    """,
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay_where_they_are(module: str) -> None:
    found = importlib.import_module(module)
    names = PUBLIC[module].split()
    missing = [name for name in names if not hasattr(found, name)]
    assert not missing
    if hasattr(found, "__all__"):
        assert set(found.__all__) >= set(names) and all(hasattr(found, n) for n in found.__all__)


def test_every_name_of_the_package_is_listed_here() -> None:
    """A name that is added becomes a promise."""
    package = importlib.import_module("sdgp_cusparselt")
    assert sorted(package.__all__) == sorted(PUBLIC["sdgp_cusparselt"].split())


def test_functions_of_the_package_are_not_hidden_by_folders_of_their_name() -> None:
    import sdgp_cusparselt as sdgp

    for room in ("telemetry.counts", "pruning.methods", "config.choices", "layers.convert"):
        importlib.import_module(f"sdgp_cusparselt.{room}")
    assert callable(sdgp.telemetry) and callable(sdgp.prune)
