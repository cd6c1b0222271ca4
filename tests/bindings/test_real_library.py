"""The installed wheel itself: it loads and answers on a machine with no GPU."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pycusparselt as cslt
import pytest
from pycusparselt import Status
from pycusparselt import cusparselt as capi
from pycusparselt.abi import OpaqueStorage, Property

from tests.bindings.wheels import SINCE_0_8, installed_file, installed_version

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def real() -> cslt.Library:
    with warnings.catch_warnings():  # about 0.8.0, which torch 2.11 brings
        warnings.simplefilter("ignore", cslt.LibraryVersionWarning)
        return cslt.load(installed_file("libcusparseLt.so.0"))


def test_version_is_the_wheels(real: cslt.Library) -> None:
    assert real.version == installed_version()


def test_properties(real: cslt.Library) -> None:
    storage = OpaqueStorage()
    with pytest.raises(cslt.CusparseLtError, match="INVALID_VALUE"):
        capi.get_property(real, Property.MAJOR_VERSION, 0)
    capi.get_property(real, Property.MINOR_VERSION, storage.address)


def test_every_function_is_exported(real: cslt.Library) -> None:
    missing = set() if real.version >= (0, 8) else SINCE_0_8
    assert {name for name in capi.FUNCTIONS if not real.has(name)} == missing
    for name in capi.FUNCTIONS.keys() - missing:
        function = capi.FUNCTIONS[name]
        assert function.resolve(real).argtypes == function.argtypes


def test_error_names_and_texts(real: cslt.Library) -> None:
    if not real.has("cusparseLtGetErrorName"):
        pytest.skip(f"cuSPARSELt {real.version_text} has no texts; 0.8 brought them")
    for status in Status:
        assert capi.get_error_name(real, status) == f"CUSPARSE_STATUS_{status.name}"
        assert capi.get_error_string(real, status)


def test_init_without_a_gpu_is_a_clear_error(real: cslt.Library) -> None:
    try:
        handle = cslt.Handle(real)
    except cslt.CusparseLtError as error:
        assert error.status == Status.NOT_INITIALIZED
        assert error.function == "cusparseLtInit"
        if real.version >= (0, 8):  # older libraries have no texts of their own
            assert "initialization error" in str(error)
        assert "no usable NVIDIA GPU or driver" in str(error)
        return
    assert handle.version() == real.version[1] * 100 + real.version[2]
    handle.close()


NULLS = """
import sys
import pycusparselt as cslt
from pycusparselt.abi import OpaqueStorage
from pycusparselt.cusparselt import FUNCTIONS
lib = cslt.load(sys.argv[1])
empty = OpaqueStorage()
for name, function in FUNCTIONS.items():
    if not lib.has(name):
        continue
    for first in (0, empty.address):
        if name.startswith("cusparseLtGetError") or name == "cusparseLtInit" and first:
            continue
        arguments = [first, *[0] * (len(function.argtypes) - 1)]
        print(name, first != 0, flush=True)
        try:
            function(lib, *arguments)
            # These two look at nothing but the pointer.
            assert name in ("cusparseLtMatDescriptorDestroy",
                            "cusparseLtMatmulAlgSelectionDestroy") and first, name
        except cslt.CusparseLtError as error:
            assert error.status == cslt.Status.INVALID_VALUE, error
        except ValueError:
            assert name == "cusparseLtDestroy" and not first
print("done")
"""


def test_null_pointers_and_empty_structs_never_crash(real: cslt.Library) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", NULLS, real.path],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT / "bindings")),
        timeout=120,
    )
    assert finished.returncode == 0, finished.stdout[-200:] + finished.stderr[-600:]
    assert finished.stdout.splitlines()[-1] == "done"
