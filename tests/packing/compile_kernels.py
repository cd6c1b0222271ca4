"""Compile the pack kernels for GPUs that need not be there; print what became of them as JSON.

Run in a process of its own, because Triton decides at import whether kernels are interpreted:
    PYTHONPATH=. python tests/packing/compile_kernels.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdgp_cusparselt.packing import kernels, launch, selection
from sdgp_cusparselt.packing import layout as layouts

TARGETS = (80, 86, 89, 90, 100, 120)
POINTERS = {"seeds_ptr": "*i64", "ratio_ptr": "*fp32", "sums_ptr": "*fp32"}
# Arguments whose divisibility by 16 a launch cannot promise.
ODD = ("col_blocks", "COL_BLOCKS", "rows_per_ratio")
MAGNITUDE = {"METHOD": selection.MAGNITUDE.value, "METHOD_T": selection.MAGNITUDE.value}
FEATURES = {"FEATURES": True, "TOKENS": False, "SUMS": False, "RATIO": 0, **MAGNITUDE}
CASES: dict[str, dict[str, Any]] = {
    "features": FEATURES,
    "features+sums": {**FEATURES, "SUMS": True},
    "tokens": {**FEATURES, "FEATURES": False, "TOKENS": True},
    "both+sums": {**FEATURES, "TOKENS": True, "SUMS": True},
    "random": {**FEATURES, "METHOD": selection.RANDOM.value},
    "mvue": {**FEATURES, "METHOD": selection.MVUE.value},
    "rescaled": {**FEATURES, "METHOD": selection.RESCALED.value, "RATIO": 1},
}
ON_EVERY_TARGET = ("features+sums", "both+sums")


def compile_case(case: dict[str, Any], target: int, aligned: bool = True) -> Any:
    """Compile one case for [tokens, features] with the tile that a launch would choose."""
    both = case["FEATURES"] and case["TOKENS"]
    heavy = case["METHOD"] in (selection.RANDOM.value, selection.MVUE.value)
    tile = launch.choose_tile(1 << 14, 1 << 12, both, heavy)
    nbytes = 1 << 20
    constants = {
        **case,
        "DTYPE": tl.bfloat16,
        "NATIVE": True,
        "LAYOUT": launch.layout_table(layouts.BLOCKED, tile.block_m, tile.block_k // 4, nbytes)[0],
        "LAYOUT_T": launch.layout_table(layouts.BLOCKED, tile.block_k, tile.block_m // 4, nbytes)[
            0
        ],
        "PADDING": 0xE,
        "PADDING_T": 0xE,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
    }
    names = kernels.pack_kernel.arg_names
    signature = {}
    for name in names:
        kind = POINTERS.get(name, "*i16" if name.endswith("_ptr") else "i32")
        if name in ("metadata_ptr", "metadata_t_ptr"):
            kind = "*i32"
        signature[name] = "constexpr" if name in constants else kind
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and name not in ODD and aligned
    }
    source = ASTSource(
        kernels.pack_kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        divisible,
    )
    options = {"num_warps": tile.num_warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def report(compiled: Any) -> dict[str, Any]:
    """Count global accesses by width in the PTX; read registers and stack off the machine code."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"report: cuobjdump must print REG and STACK, got {usage!r}")
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "loads": Counter(re.findall(r"\bld\.global\S*?\.((?:v\d\.)?b\d+)", ptx)),
        "stores": Counter(re.findall(r"\bst\.global\S*?\.((?:v\d\.)?b\d+)", ptx)),
        "local": len(re.findall(r"\b(?:ld|st)\.local|\.local\b", ptx)),
    }


def main() -> None:
    result = {}
    for name, case in CASES.items():
        for target in TARGETS if name in ON_EVERY_TARGET else (90,):
            result[f"{name} sm_{target}"] = report(compile_case(case, target))
    result["unaligned sm_90"] = report(compile_case(FEATURES, 90, aligned=False))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
