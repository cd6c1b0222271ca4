"""Compile a kernel once and start it often: grids, addresses, the way past Triton's launcher."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Programs along the second and third axis of a grid.
_MAX_GRID = 65535
# Of every compilation: the reference rounds after every operation, and so must the kernel.
COMPILE_OPTIONS = {"enable_fp_fusion": False}


@functools.cache
def kernels() -> ModuleType | None:
    """Return the kernel module, or None where Triton cannot be imported."""
    if importlib.util.find_spec("triton") is None:
        return None
    from sdgp_cusparselt.packing import kernels as module

    return module


def interpreted() -> bool:
    """Whether the kernels were imported under Triton's interpreter, and so run on a CPU."""
    module = kernels()
    return module is not None and type(module.pack_kernel).__name__ == "InterpretedFunction"


def grid_of(covered: tuple[int, int], block_m: int, block_k: int) -> tuple[int, int, int]:
    """Return blocks along columns, and blocks along rows split over the two short axes.

    ``kernels`` counts row blocks as z * grid[1] + y. Those beyond the last do nothing.
    """
    row_blocks, col_blocks = -(-covered[0] // block_m), -(-covered[1] // block_k)
    layers = -(-row_blocks // _MAX_GRID)
    return col_blocks, -(-row_blocks // layers), layers


def prepare_kernel(
    name: str,
    device: torch.device,
    grid: tuple[int, int, int],
    sizes: Sequence[int],
    constants: Mapping[str, Any],
    num_warps: int,
) -> Callable[..., None]:
    """Return start(stream, *pointers, *draws) of a kernel; the rest is folded in.

    A kernel's parameters are pointers, sizes, the seed and offset if it draws, then constants.
    """
    module = kernels()
    if module is None:
        raise ModuleNotFoundError(f"{name}: needs triton. Install it, or use the reference.")
    function = getattr(module, name)
    types = module.POINTERS[name]
    count, sizes, constants = len(types), tuple(sizes), dict(constants)
    if interpreted():

        def interpret(stream: int, *given: int) -> None:
            tensors = [_tensor_at(*pair) for pair in zip(given, types, strict=False)]
            function[grid](*tensors, *sizes, *given[count:], **constants)

        return interpret
    # Any value beyond 32 bits stands for one of 64; the sizes are never specialised.
    wide = [1 << 40] * (len(function.arg_names) - count - len(sizes) - len(constants))
    with on_device(device):
        compiled = function.warmup(
            *types, *sizes, *wide, grid=grid, num_warps=num_warps, **constants, **COMPILE_OPTIONS
        )
        run, handle, metadata = compiled.run, compiled.function, compiled.packed_metadata
    arguments = tuple(constants.values())

    def start(stream: int, *given: int) -> None:
        run(
            *grid, stream, handle, metadata, None, None, None,
            *given[:count], *sizes, *given[count:], *arguments,
        )  # fmt: skip

    return start


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a CUDA device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def current_stream(device: torch.device) -> int:
    """Return the handle of torch's current stream on a device, 0 where it has none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _tensor_at(address: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor that starts at an address, for the interpreter, which asks for no more."""
    if address == 0:
        return torch.empty(1, dtype=dtype)
    buffer = (ctypes.c_char * dtype.itemsize).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype)
