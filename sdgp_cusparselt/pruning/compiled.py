"""Patterns that no kernel of this package prunes, on a GPU: torch.compile's few passes.

A function is compiled once per method, pattern, dtype and place of the groups, for every shape. A
generator of its own is what compiled code cannot take; it draws from torch's.
"""

import types
from collections.abc import Callable

import torch
from torch import Tensor

from sdgp_cusparselt.pruning.methods import prune

Pruned = Callable[[Tensor], Tensor]

#: What torch.compile generates code with.
BACKEND = "inductor"

_compiled: dict[tuple[object, ...], Pruned] = {}
_failure: list[str] = []


def obstacle(x: Tensor) -> str | None:
    """Return why x is not pruned by compiled code now, or None if it is."""
    if _failure:
        return _failure[0]
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, where nothing is compiled"
    return None


def prune_compiled(
    x: Tensor, method: str, n: int, m: int, dim: int, scale_dims: tuple[int, ...] | None = None
) -> Tensor:
    """Return ``prune`` of x by compiled code, or by plain torch where there is an ``obstacle``.

    Args:
        x: [...] any float dtype. Eager callers only.
        method: see ``prune``, as all that follows.
        n: kept elements per group.
        m: group size.
        dim: dimension along which groups run.
        scale_dims: dimensions that rescaled_magnitude sums over.

    Returns:
        Tensor like x. After a failure to compile, ``obstacle`` names it, and so it does for every
        later call.
    """
    if obstacle(x) is None:
        from torch._dynamo.exc import TorchDynamoException  # seconds to import

        key = (method, n, m, x.dtype, x.ndim, dim % x.ndim, scale_dims)
        if key not in _compiled:
            _compiled[key] = _function(method, n, m, dim, scale_dims)
        try:
            return _compiled[key](x)
        except TorchDynamoException as error:
            _failure.append(f"torch.compile failed: {str(error).strip().splitlines()[0]}")
    return prune(x, method=method, n=n, m=m, dim=dim, scale_dims=scale_dims)


def _function(method: str, n: int, m: int, dim: int, scale_dims: tuple[int, ...] | None) -> Pruned:
    def pruned(x: Tensor) -> Tensor:
        return prune(x, method=method, n=n, m=m, dim=dim, scale_dims=scale_dims)

    # torch.compile counts what it compiled per code object, and gives up after some: each function
    # gets one of its own.
    own = types.FunctionType(
        pruned.__code__.replace(), pruned.__globals__, None, None, pruned.__closure__
    )
    compiled: Pruned = torch.compile(own, fullgraph=True, dynamic=True, backend=BACKEND)
    return compiled
