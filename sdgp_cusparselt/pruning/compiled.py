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

_compiled: dict[tuple[object, ...], Pruned | str] = {}


def prune_compiled(
    x: Tensor, method: str, n: int, m: int, dim: int, scale_dims: tuple[int, ...] | None = None
) -> tuple[Tensor, str | None]:
    """Prune by compiled code, or in plain torch where that is not to be had.

    Args:
        x: [...] any float dtype. Eager callers only.
        method: see ``prune``, as all that follows.
        n: kept elements per group.
        m: group size.
        dim: dimension along which groups run.
        scale_dims: dimensions that rescaled_magnitude sums over.

    Returns:
        Tensor like x, and why it was plain torch that pruned it; None if it was compiled code.
    """
    key = (method, n, m, x.dtype, x.ndim, dim % x.ndim, scale_dims)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        reason = "a CUDA graph is being captured, where nothing is compiled"
        return _plain(x, method, n, m, dim, scale_dims), reason
    if key not in _compiled:
        _compiled[key] = _function(method, n, m, dim, scale_dims)
    function = _compiled[key]
    if not isinstance(function, str):
        from torch._dynamo.exc import TorchDynamoException  # seconds to import

        try:
            return function(x), None
        except TorchDynamoException as error:
            text = " ".join(str(error).split())[:200]
            function = _compiled[key] = f"torch.compile failed: {text}"
    return _plain(x, method, n, m, dim, scale_dims), function


def _plain(
    x: Tensor, method: str, n: int, m: int, dim: int, scale_dims: tuple[int, ...] | None
) -> Tensor:
    return prune(x, method=method, n=n, m=m, dim=dim, scale_dims=scale_dims)


def _function(method: str, n: int, m: int, dim: int, scale_dims: tuple[int, ...] | None) -> Pruned:
    def pruned(x: Tensor) -> Tensor:
        return _plain(x, method, n, m, dim, scale_dims)

    # Before torch 2.13 torch.compile counts what it compiled per code object, and gives up after
    # some: each function gets one of its own.
    own = types.FunctionType(
        pruned.__code__.replace(), pruned.__globals__, None, None, pruned.__closure__
    )
    compiled: Pruned = torch.compile(own, fullgraph=True, dynamic=True, backend=BACKEND)
    return compiled
