"""Memory that each thread keeps between calls: a temporary of whole size is fresh pages each time.

What is kept here outlives the call that made it, so it is made with every mode of that call off:
a tensor of inference_mode, of a FakeTensorMode, of a tracer or of a default device would poison
each later call of the thread.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")

#: Things kept per thread before the least recently used one is dropped; a call uses one or two.
LIMIT = 64


class _Local(threading.local):
    def __init__(self) -> None:
        self.kept: OrderedDict[Hashable, Any] = OrderedDict()


_local = _Local()


def kept(key: Hashable, make: Callable[[], T]) -> T:
    """Return this thread's object of that key, made at the first call with every mode off."""
    found: T | None = _local.kept.get(key)
    if found is not None:
        _local.kept.move_to_end(key)
        return found
    with torch.inference_mode(False), _disable_current_modes(), torch.no_grad():
        found = _local.kept[key] = make()
    while len(_local.kept) > LIMIT:
        _local.kept.popitem(last=False)
    return found


def rows(name: str, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return this thread's [count, width] of that name; what it holds is whatever was left in it.

    Each row's bits are the dtype's own, and the rows never move: views of it may be kept.
    """
    key = (name, count, width, dtype)
    return kept(key, lambda: torch.zeros((count, width), dtype=dtype, device="cpu"))
