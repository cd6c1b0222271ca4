"""Which device, which stream, and whether a graph is captured: the same questions, asked once."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a CUDA device is the current one; nothing for a CPU."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def current_stream(device: torch.device) -> int:
    """Return the current CUDA stream as an integer; 0 for a CPU."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def device_calls(device: torch.device) -> tuple[int, Callable[[], int], Callable[[], int]]:
    """Return a device's index, what tells the current one, and what tells its current stream.

    The public functions build objects at every call; these are what they ask.
    """
    if device.type != "cuda":
        return 0, int, int
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch._C._cuda_getDevice, partial(torch._C._cuda_getCurrentRawStream, index)


def is_capturing(device: torch.device) -> bool:
    """Whether work on ``device`` is being recorded into a CUDA graph instead of run."""
    if device.type != "cuda":
        return False
    with on_device(device):
        return bool(torch.cuda.is_current_stream_capturing())
