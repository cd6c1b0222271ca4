"""Compile one variant of a kernel for an architecture and count its machine code."""

from __future__ import annotations

import re
from typing import Any

import torch

from bench import sass
from bench.pack_model import Pass, partial_sectors
from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing import variants
from sdgp_cusparselt.packing.layout import MetadataLayout
from sdgp_cusparselt.packing.variants import Target

TARGETS = (80, 90, 100, 120)
METHODS = ("magnitude", "random", "mvue", "rescaled_magnitude")
LAYOUTS = {
    layout.name: layout
    for layout in (layouts.PLAIN, layouts.BLOCKED, layouts.SM90_ATOM, layouts.SM90_INTERLEAVED)
}
#: Of the gradient that blocks are chosen for.
ROWS, COLS = 1 << 14, 1 << 12
# Bytes a lane that accesses of x and of values may have, and those of metadata, sums and ratios.
WIDE = (8, 16)
WORD = 4


def written(
    layout: MetadataLayout, features: Target | None, tokens: Target | None, tile: variants.Tile
) -> float:
    """Return the bytes written per element of x, sectors that are filled in part twice."""
    total = 0.0
    for wanted, rows, cols in operands(features, tokens, tile):
        if wanted is not None:
            total += 1 + (1 + partial_sectors(layout, rows, cols)) / 8
    return total


def operands(
    features: Target | None, tokens: Target | None, tile: variants.Tile
) -> tuple[tuple[Target | None, int, int], ...]:
    """Return each operand that is wanted, and the rows and columns of it in a block."""
    return (features, tile.block_m, tile.block_k), (tokens, tile.block_k, tile.block_m)


def count(
    name: str,
    constants: dict[str, Any],
    tile: variants.Tile,
    target: int,
    moved: float,
    trips: int = 1,
) -> Pass:
    compiled = compile_kernel(name, constants, tile.num_warps, target)
    code = sass.read(compiled, target, trips)
    return Pass(code, tile.block_m * tile.block_k * trips, moved, ptx_opcodes(compiled))


def ptx_opcodes(compiled: Any) -> frozenset[str]:
    """Return the PTX instructions of a kernel, with their modifiers."""
    found = re.findall(r"^\s*(?:@!?%\w+ )?([a-z][\w.:]*)\s", compiled.asm["ptx"], re.MULTILINE)
    return frozenset(found)


def compile_kernel(
    name: str, constants: dict[str, Any], num_warps: int, target: int, aligned: bool = True
) -> Any:
    """Return what a launch would compile on a GPU of that architecture."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sdgp_cusparselt.packing import kernels, starting

    kernel = getattr(kernels, name)
    pointers = {
        torch.int16: "*i16",
        torch.int32: "*i32",
        torch.int64: "*i64",
        torch.float32: "*fp32",
    }
    types = kernels.POINTERS[name]
    names = kernel.arg_names
    signature = {
        argument: "constexpr"
        if argument in constants
        else pointers[types[i]]
        if i < len(types)
        else "i64"
        if argument in kernels.DRAWS
        else "i32"
        for i, argument in enumerate(names)
    }
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(types)) if aligned}
    source = ASTSource(
        kernel,
        signature,
        {(names.index(key),): value for key, value in constants.items()},
        attributes,
    )
    options = {"num_warps": num_warps, **starting.COMPILE_OPTIONS}
    return triton_compile(source, target=GPUTarget("cuda", target, 32), options=options)
