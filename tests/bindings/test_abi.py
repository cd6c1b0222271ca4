"""The Python side of the ABI against the header of the installed wheel, and against itself."""

import ctypes
import re
import subprocess
from enum import IntEnum
from pathlib import Path

import pytest
from pycusparselt import abi
from pycusparselt.cusparselt import FUNCTIONS

from tests.bindings.header import (
    ENUMS,
    assert_header_agrees,
    declared_enumerators,
    prototypes,
    python_name,
)
from tests.bindings.wheels import CUSPARSELT, installed_file, installed_version, parsed

C_TYPES = {
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "size_t": ctypes.c_size_t,
    "cudaStream_t": ctypes.c_void_p,
    **dict.fromkeys(ENUMS, ctypes.c_int),
}


def installed_header() -> Path:
    return installed_file("cusparseLt.h")


def test_the_installed_header_agrees(tmp_path: Path) -> None:
    answers = assert_header_agrees(installed_header(), tmp_path)
    older = {parsed(row[1]): row for row in CUSPARSELT if parsed(row[1]) <= installed_version()}
    _, _, size, _, alignment = older[max(older)]
    assert answers["sizeof cusparseLtHandle_t"] == size
    assert answers["alignof cusparseLtMatmulPlan_t"] == alignment


def test_every_member_stands_in_the_installed_header() -> None:
    declared = declared_enumerators(installed_header())
    for enum, enumerators in declared.items():
        names = {python_name(enum, enumerator) for enumerator in enumerators}
        assert {member.name for member in ENUMS[enum][0]} <= names


def test_every_function_has_its_prototype() -> None:
    assert set(prototypes()) == set(FUNCTIONS)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_ctypes_follow_the_prototype(name: str) -> None:
    text = prototypes()[name]
    function = FUNCTIONS[name]
    parameters = text[text.index("(") + 1 : text.rindex(")")].split(",")
    expected = []
    for parameter in parameters:
        kind = re.sub(r"\s*\w+$", "", parameter.replace("const ", "").strip())
        expected.append(ctypes.c_void_p if kind.endswith("*") else C_TYPES[kind])
    assert list(function.argtypes) == expected
    text_result = text.startswith("const char*")
    assert function.restype is (ctypes.c_char_p if text_result else ctypes.c_int)


def test_storage_is_zeroed_aligned_and_inside_its_memory() -> None:
    for _ in range(50):
        storage = abi.OpaqueStorage()
        start = ctypes.addressof(storage._memory)
        assert storage.address % abi.OPAQUE_ALIGNMENT == 0
        assert start <= storage.address
        end = start + ctypes.sizeof(storage._memory)
        assert storage.address + abi.OPAQUE_SIZE <= end
        assert not any(ctypes.string_at(storage.address, abi.OPAQUE_SIZE))


ORDERS = "typedef enum { CUSPARSE_ORDER_COL = 1,\n CUSPARSE_ORDER_ROW = 2 } cusparseOrder_t;"


def test_a_wrong_value_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = tmp_path / "wheel" / "cusparseLt.h"
    header.parent.mkdir()
    header.write_text(installed_header().read_text())
    header.with_name("cusparseLt_cusparse_stub.h").write_text(ORDERS)
    assert_header_agrees(header, tmp_path)
    swapped = IntEnum("Order", {"COL": 2, "ROW": 1})
    monkeypatch.setitem(ENUMS, "cusparseOrder_t", (swapped, ("CUSPARSE_ORDER_",)))
    with pytest.raises(AssertionError, match="CUSPARSE_ORDER"):
        assert_header_agrees(header, tmp_path)


def test_a_wrong_prototype_is_seen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    header = tmp_path / "wheel" / "cusparseLt.h"
    header.parent.mkdir()
    text = installed_header().read_text()
    header.write_text(text.replace("int32_t                       numStreams", "int64_t n", 1))
    assert header.read_text() != text
    with pytest.raises(subprocess.CalledProcessError):
        assert_header_agrees(header, tmp_path)
    assert "conflicting types" in capfd.readouterr().err
