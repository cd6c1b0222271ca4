"""Every promised version: its header against the Python side, its library loaded with no GPU."""

import enum
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from pycusparselt import abi
from pycusparselt.cusparselt import FUNCTIONS

from tests.bindings.header import STRUCTS, assert_header_agrees
from tests.bindings.wheels import CUSPARSELT, SINCE_0_8, fetch, one_file

pytestmark = [pytest.mark.abi, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
VERSIONS = {version: row for row in CUSPARSELT for version in (f"{row[0][-4:]}-{row[1]}",)}

LOAD = """
import json, sys, warnings
import pycusparselt as cslt
from pycusparselt import cusparselt as capi
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    lib = cslt.load(sys.argv[1])
result = {"version": list(lib.version), "path": lib.path}
result["warnings"] = [str(w.message) for w in caught]
result["exports"] = [name for name in capi.FUNCTIONS if lib.has(name)]
result["names"] = {}
if lib.has("cusparseLtGetErrorName"):
    result["names"] = {s.value: capi.get_error_name(lib, s) for s in cslt.Status}
    result["texts"] = [capi.get_error_string(lib, s) for s in cslt.Status]
try:
    cslt.Handle(lib).close()
    result["init"] = None
except cslt.CusparseLtError as error:
    result["init"] = [error.status, str(error)]
try:
    capi.get_error_name(lib, 1)
    result["missing"] = None
except cslt.FunctionNotAvailableError as error:
    result["missing"] = error.function
print(json.dumps(result))
"""


def load_in_a_process(path: Path) -> dict[str, object]:
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "bindings"))
    command = [sys.executable, "-c", LOAD, str(path)]
    finished = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=True
    )
    result: dict[str, object] = json.loads(finished.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("version", VERSIONS)
def test_header(version: str, tmp_path: Path) -> None:
    distribution, number, size, _, alignment = VERSIONS[version]
    header = one_file(fetch(distribution, number), "cusparseLt.h")
    answers = assert_header_agrees(header, tmp_path)
    assert {answers[f"sizeof {s}"] for s in STRUCTS} == {size}
    assert {answers[f"alignof {s}"] for s in STRUCTS} == {alignment}
    assert ("CUSPARSELT_MATMUL_A_SCALE_MODE" in answers) == (number not in ("0.6.2", "0.6.3"))
    # 0.10.0 brings the cusparse types along, so these too come from NVIDIA there.
    assert ("CUSPARSE_ORDER_ROW" in answers) == (number == "0.10.0")


@pytest.mark.parametrize("version", VERSIONS)
def test_library(version: str) -> None:
    distribution, number, _, exported, _ = VERSIONS[version]
    path = one_file(fetch(distribution, number), "libcusparseLt.so.0")
    seen = load_in_a_process(path)
    assert ".".join(str(part) for part in seen["version"]) == number  # type: ignore[union-attr]
    exports = set(seen["exports"])  # type: ignore[call-overload]
    assert len(exports) == exported
    assert exports == set(FUNCTIONS) - (set() if exported == 31 else SINCE_0_8)
    assert symbols(path) == exports
    assert seen["missing"] == (None if exported == 31 else "cusparseLtGetErrorName")
    if exported == 31:
        names = {int(k): v for k, v in seen["names"].items()}  # type: ignore[attr-defined]
        assert names == {s.value: f"CUSPARSE_STATUS_{s.name}" for s in abi.Status}
        assert all(seen["texts"])  # type: ignore[call-overload]
    warned = bool(seen["warnings"])
    assert warned == (number == "0.8.0")
    assert not warned or "H100" in seen["warnings"][0]  # type: ignore[index]
    if seen["init"] is not None:  # on a machine with a GPU the handle simply opens
        status, message = seen["init"]  # type: ignore[misc]
        assert status == abi.Status.NOT_INITIALIZED
        assert "no usable NVIDIA GPU or driver" in message


def symbols(path: Path) -> set[str]:
    """Return the C functions that nm finds, so that none is unknown to the binding."""
    command = ["nm", "-D", "--defined-only", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    rows = (line.split() for line in listing.stdout.splitlines())
    return {row[-1].split("@")[0] for row in rows if row[-1].startswith("cusparseLt")}


NVMATH = {
    "ComputeType": abi.ComputeType,
    "MatDescAttribute": abi.MatDescAttribute,
    "MatmulAlg": abi.MatmulAlg,
    "MatmulAlgAttribute": abi.AlgAttribute,
    "MatmulDescAttribute": abi.MatmulDescAttribute,
    "MatmulMatrixScale": abi.MatmulMatrixScale,
    "PruneAlg": abi.PruneAlg,
    "Sparsity": abi.Sparsity,
    "SplitKMode": abi.SplitKMode,
}
NVMATH_NAMES = {"SPMMA_TILE": "TILE", "SPMMA_STRIP": "STRIP", "INVALID_MODE": "INVALID"}


@pytest.fixture
def nvmath_binding(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Import only nvmath's low-level binding; its packages would ask for half of CUDA."""
    root = fetch("nvmath-python", "1.0.0") / "nvmath"
    for name in ("nvmath", "nvmath.bindings", "nvmath.bindings._internal"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, package)
    return pytest.importorskip(
        "nvmath.bindings.cusparseLt", reason="nvmath-python 1.0.0 has no build for this Python"
    )


@pytest.mark.parametrize("name", NVMATH)
def test_enums_agree_with_nvmath(nvmath_binding: types.ModuleType, name: str) -> None:
    theirs: type[enum.IntEnum] = getattr(nvmath_binding, name)
    seen = {NVMATH_NAMES.get(member.name, member.name): int(member) for member in theirs}
    assert seen == {member.name: member.value for member in NVMATH[name]}


def test_attribute_types_agree_with_nvmath(nvmath_binding: types.ModuleType) -> None:
    kinds = {"c_int": "int32", "c_long": "int64", "c_float": "float32", "c_void_p": "int64"}
    ask = {
        abi.MatDescAttribute: nvmath_binding.get_mat_desc_attribute_dtype,
        abi.MatmulDescAttribute: nvmath_binding.get_matmul_desc_attribute_dtype,
        abi.AlgAttribute: nvmath_binding.get_matmul_alg_attribute_dtype,
    }
    for enumeration, function in ask.items():
        for attribute in enumeration:
            ours = kinds[abi.attribute_type(attribute).__name__]
            assert function(int(attribute)).__name__ == ours, attribute
