"""Where the draws of one pack come from: two 64-bit numbers, as ints or in device memory."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

#: (seed, offset), or an int64 tensor [2] of both on the device.
Seeds = tuple[int, int] | Tensor

# What one pack takes of a CUDA generator's offset: torch's own unit, four words.
_STEP = 4
_lock = threading.Lock()


def draw_seeds(device: torch.device, generator: torch.Generator | None = None) -> Seeds:
    """Return the seed and the offset that one pack's random numbers follow from.

    No kernel, no synchronisation: on a GPU they are the generator's own Philox state, which moves
    on as after any other use, and elsewhere two draws. ``torch.manual_seed`` rules both. While a
    CUDA graph is captured they are drawn into device memory instead, so that each replay draws
    anew.

    Args:
        device: where x lies.
        generator: the source; torch's own for the device if None.
    """
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _random_words(device, generator)
        index = torch.cuda.current_device() if device.index is None else device.index
        source = torch.cuda.default_generators[index] if generator is None else generator
        if source.device.type == "cuda":
            with _lock:
                offset = source.get_offset()
                source.set_offset(offset + _STEP)
            return _signed(source.initial_seed()), offset
        device = source.device
    seed, offset = _random_words(device, generator).tolist()
    return seed, offset


def seeds_tensor(seeds: Seeds, device: torch.device) -> Tensor:
    """Return seeds as int64 [2] on a device."""
    if isinstance(seeds, Tensor):
        return seeds
    return torch.tensor(seeds, dtype=torch.int64, device=device)


def _random_words(device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randint(
        -(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator
    )


def _signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed
