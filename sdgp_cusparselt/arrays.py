"""Arrays of other libraries in and out through DLPack, without a copy."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.dlpack import from_dlpack

from sdgp_cusparselt.errors import type_error


def to_tensor(x: object, function: str, argument: str) -> Tensor:
    """Return a tensor that shares memory with an array.

    Args:
        x: a tensor, or anything with ``__dlpack__``: a NumPy or CuPy array, for instance.
        function: the public function that was called, for the error.
        argument: its argument, for the error.

    Returns:
        Tensor: x itself, or a view of its memory on its device.

    Raises:
        TypeError: x has no ``__dlpack__``, or its library cannot share it (a dtype that
            torch lacks, for instance).

    Source: the DLPack protocol of the Python array API standard.
    """
    if isinstance(x, Tensor):
        return x
    rule = "a torch.Tensor or an array with __dlpack__"
    if not hasattr(x, "__dlpack__"):
        raise type_error(function, argument, rule, type(x).__name__, "Convert it first.")
    try:
        shared: Tensor = from_dlpack(x)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        fix = "Give it a dtype that torch knows, on a device that torch sees."
        got = f"a {type(x).__name__} that cannot be shared ({error})"
        raise type_error(function, argument, rule, got, fix) from error
    return shared


def like(original: object, result: Tensor) -> Any:
    """Return result as the kind of array that original is, sharing memory.

    Args:
        original: what the caller passed.
        result: what was computed from it.

    Returns:
        result itself for a tensor, else an array of original's library.
    """
    if isinstance(original, Tensor):
        return result
    library = sys.modules[type(original).__module__.partition(".")[0]]
    if library.__name__ == "numpy":
        # numpy.from_dlpack would give a read-only array.
        return result.numpy()
    return library.from_dlpack(result)


def same_kind(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Let a function of one tensor take any DLPack array first, and return the same kind."""

    @functools.wraps(function)
    def wrapper(x: object, *args: Any, **options: Any) -> Any:
        return like(x, function(to_tensor(x, function.__name__, "x"), *args, **options))

    return wrapper
