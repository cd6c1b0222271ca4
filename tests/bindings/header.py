"""Compare a cusparseLt.h with the Python side, through the machine's C compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from enum import IntEnum
from pathlib import Path

import triton
from pycusparselt import abi, cusparselt

STRUCTS = (
    "cusparseLtHandle_t",
    "cusparseLtMatDescriptor_t",
    "cusparseLtMatmulDescriptor_t",
    "cusparseLtMatmulAlgSelection_t",
    "cusparseLtMatmulPlan_t",
)
# C enum: Python enum, and how its C names begin; the first prefix that fits is cut off.
ENUMS: dict[str, tuple[type[IntEnum], tuple[str, ...]]] = {
    "cusparseStatus_t": (abi.Status, ("CUSPARSE_STATUS_",)),
    "cusparseOperation_t": (abi.Operation, ("CUSPARSE_OPERATION_",)),
    "cusparseOrder_t": (abi.Order, ("CUSPARSE_ORDER_",)),
    "cusparseLtSparsity_t": (abi.Sparsity, ("CUSPARSELT_",)),
    "cusparseLtMatDescAttribute_t": (abi.MatDescAttribute, ("CUSPARSELT_MAT_",)),
    "cusparseComputeType": (abi.ComputeType, ("CUSPARSE_",)),
    "cusparseLtMatmulDescAttribute_t": (abi.MatmulDescAttribute, ("CUSPARSELT_MATMUL_",)),
    "cusparseLtMatmulMatrixScale_t": (
        abi.MatmulMatrixScale,
        ("CUSPARSELT_MATMUL_MATRIX_SCALE_", "CUSPARSELT_MATMUL_SCALE_"),
    ),
    "cusparseLtMatmulAlg_t": (abi.MatmulAlg, ("CUSPARSELT_MATMUL_ALG_",)),
    "cusparseLtMatmulAlgAttribute_t": (
        abi.AlgAttribute,
        ("CUSPARSELT_MATMUL_ALG_", "CUSPARSELT_MATMUL_"),
    ),
    "cusparseLtSplitKMode_t": (abi.SplitKMode, ("CUSPARSELT_SPLIT_K_MODE_", "CUSPARSELT_")),
    "cusparseLtPruneAlg_t": (abi.PruneAlg, ("CUSPARSELT_PRUNE_SPMMA_",)),
    "cudaDataType": (abi.DataType, ("CUDA_",)),
    "libraryPropertyType": (abi.Property, ("",)),
}
RENAMED = {"NON_TRANSPOSE": "N", "TRANSPOSE": "T", "INVALID_MODE": "INVALID"}
NOT_BOUND = {"CONJUGATE_TRANSPOSE"}  # complex matrices, which the library does not have

# cusparse.h belongs to another package of 200 MB; 0.10.0 ships these types itself, which is where
# they are compared. Older headers only need the names.
CUSPARSE_H = """
typedef enum { %(status)s } cusparseStatus_t;
typedef enum { CUSPARSE_OPERATION_NON_TRANSPOSE = 0, CUSPARSE_OPERATION_TRANSPOSE = 1,
               CUSPARSE_OPERATION_CONJUGATE_TRANSPOSE = 2 } cusparseOperation_t;
typedef enum { CUSPARSE_ORDER_COL = 1, CUSPARSE_ORDER_ROW = 2 } cusparseOrder_t;
"""


def prototypes() -> dict[str, str]:
    """Return the C prototypes that stand as comments in cusparselt.py, by function."""
    source = Path(cusparselt.__file__).read_text()
    found = {}
    for block in re.findall(r"((?:^# .*\n)+)\w+ = CFunction\(", source, re.MULTILINE):
        text = " ".join(line[1:].strip() for line in block.splitlines())
        name = re.search(r"(cusparseLt\w+)\(", text)
        if name is None:
            raise ValueError(f"prototypes: the comment must name a function, got {text}")
        found[name.group(1)] = text
    return found


def cuda_include() -> Path:
    """Return a folder with driver_types.h and library_types.h; triton brings one."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "include"


def declared_functions(header: Path) -> set[str]:
    """Return the functions that a header declares."""
    return set(re.findall(r"^(cusparseLt\w+)\(", _text(header), re.MULTILINE))


def declared_enumerators(header: Path) -> dict[str, list[str]]:
    """Return the enumerators of every enum that a header or what it brings along defines."""
    text = _text(header)
    stub = header.with_name("cusparseLt_cusparse_stub.h")
    if stub.exists():
        text += _text(stub)
    text += _text(cuda_include() / "library_types.h")
    found: dict[str, list[str]] = {}
    for body, name in re.findall(r"typedef enum\s*\w*\s*\{([^}]*)\}\s*(\w+)\s*;", text):
        if name in ENUMS:
            found[name] = re.findall(r"^\s*(\w+)\s*(?:=[^,]*)?(?:,|$)", body, re.MULTILINE)
    return found


def _text(header: Path) -> str:
    text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
    return re.sub(r"//.*", "", text)


def python_name(enum: str, enumerator: str) -> str:
    """Return what the Python side calls an enumerator."""
    for prefix in ENUMS[enum][1]:
        if enumerator.startswith(prefix):
            name = enumerator[len(prefix) :]
            return RENAMED.get(name, name)
    raise ValueError(f"python_name: {enumerator} must begin as {enum} does, got another name")


def compile_and_ask(header: Path, folder: Path) -> dict[str, int]:
    """Compile a program against a header; return sizes, alignments and enum values by C name.

    Every prototype of the Python side that the header knows is declared a second time, so the
    compiler itself refuses any difference.
    """
    declared = declared_functions(header)
    known = [text for name, text in prototypes().items() if name in declared]
    asked = [f'"sizeof {s}", sizeof({s})' for s in STRUCTS]
    asked += [f'"alignof {s}", _Alignof({s})' for s in STRUCTS]
    enums = declared_enumerators(header)
    asked += [f'"sizeof {name}", sizeof({name})' for name in enums]
    asked += [f'"{name}", {name}' for names in enums.values() for name in names]
    lines = "\n".join(
        f'    printf("%s=%ld\\n", {item.replace(", ", ", (long)")});' for item in asked
    )
    program = folder / "ask.c"
    declarations = "\n".join(f"{text};" for text in known)
    program.write_text(
        f"#include <stdalign.h>\n#include <stdio.h>\n#include <cusparseLt.h>\n{declarations}\n"
        f"int main(void) {{\n{lines}\n    return 0;\n}}\n"
    )
    _write_shims(folder)
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RuntimeError("compile_and_ask: CC must be a C compiler, got none. Install gcc")
    # The wheel's own folder comes before the shims, so a header that it ships is the one used.
    includes = [f"-I{path}" for path in (header.parent, folder, cuda_include())]
    binary = folder / "ask"
    command = [compiler, "-std=c11", "-Werror", *includes, str(program), "-o", str(binary)]
    subprocess.run(command, check=True, timeout=60)
    answer = subprocess.run([str(binary)], check=True, capture_output=True, text=True, timeout=60)
    pairs = (line.split("=") for line in answer.stdout.splitlines())
    return {name: int(value) for name, value in pairs}


def _write_shims(folder: Path) -> None:
    """Write what a C compiler without the CUDA toolkit lacks."""
    status = ", ".join(f"CUSPARSE_STATUS_{s.name} = {s.value}" for s in abi.Status)
    (folder / "cusparse.h").write_text(CUSPARSE_H % {"status": status})
    (folder / "cstddef").write_text("#include <stddef.h>\n")  # 0.7.1 asks for the C++ header


def assert_header_agrees(header: Path, folder: Path) -> dict[str, int]:
    """Fail at the first thing that a header and the Python side see differently."""
    answers = compile_and_ask(header, folder)
    for struct in STRUCTS:
        assert answers[f"sizeof {struct}"] <= abi.OPAQUE_SIZE
        assert abi.OPAQUE_ALIGNMENT % answers[f"alignof {struct}"] == 0
    assert declared_functions(header) <= set(cusparselt.FUNCTIONS)
    for enum, enumerators in declared_enumerators(header).items():
        assert answers[f"sizeof {enum}"] == 4
        members = {m.name: m.value for m in ENUMS[enum][0]}
        for enumerator in enumerators:
            name = python_name(enum, enumerator)
            if name in members:
                assert members[name] == answers[enumerator], enumerator
            else:
                assert enum == "cudaDataType" or name in NOT_BOUND, enumerator
    return answers
