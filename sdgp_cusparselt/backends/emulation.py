"""The pruned gradient with its zeros, as each product prunes it.

On a GPU 1:4 and 2:4 of 16-bit numbers are one pass of a kernel, with the draws and the bits of
packing; every other pattern is compiled. What can be neither runs in plain torch, and says why.
"""

import math
import warnings

import torch
from torch import Tensor

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import SDGPFallbackWarning
from sdgp_cusparselt.packing.heavy import heaviest, heavy_capacity, row_energies
from sdgp_cusparselt.packing.pack import MAX_SIDE, kernel_obstacle
from sdgp_cusparselt.packing.prune import prune_dense
from sdgp_cusparselt.pruning.compiled import prune_compiled
from sdgp_cusparselt.pruning.eager import is_plain
from sdgp_cusparselt.pruning.methods import prune

#: What prunes 1:4 and 2:4 on a GPU; see ``prune_dense``.
KERNEL = "auto"

_launched: set[tuple[object, ...]] = set()
_announced: set[str] = set()


def prune_features(grad_output: Tensor, config: SDGPConfig) -> Tensor:
    """Prune [..., out_features] along the features, over which grad_input reduces."""
    matrix = grad_output.reshape(-1, grad_output.shape[-1]) if grad_output.numel() else grad_output
    if _kernel_takes(matrix, config.prune, config, -1):
        tokens = math.prod(grad_output.shape[1:-1]) if grad_output.ndim > 2 else matrix.shape[0]
        kept = _by_kernel(matrix, config.prune, config, -1, tokens).view(grad_output.shape)
    else:
        kept = _prune(grad_output, config.prune, config, -1)
    if config.heavy_tokens and matrix.ndim == 2:
        return _with_heavy_rows(kept, matrix, config.heavy_tokens)
    return decayed(kept, grad_output, config.beta)


def _with_heavy_rows(kept: Tensor, matrix: Tensor, share: float) -> Tensor:
    """Return kept with the heaviest rows of [tokens, features] as they were."""
    heavy = heaviest(row_energies(matrix), heavy_capacity(len(matrix), share))
    rows = kept.reshape(matrix.shape).index_copy(0, heavy, matrix.index_select(0, heavy))
    return rows.view(kept.shape)


def decayed(kept: Tensor, grad_output: Tensor, beta: float) -> Tensor:
    """Return kept + beta * (grad_output - kept), where unscaled kept values keep their bits."""
    if not 0 < beta < 1:
        return kept if beta == 0 else grad_output
    # An Inf that is kept would become Inf - Inf.
    return torch.where(kept == grad_output, kept, kept + beta * (grad_output - kept))


def prune_tokens(grad_output: Tensor, config: SDGPConfig) -> Tensor:
    """Prune [tokens, out_features] along the tokens, over which grad_weight reduces."""
    if _kernel_takes(grad_output, config.grad_weight_prune, config, 0):
        return _by_kernel(grad_output, config.grad_weight_prune, config, 0)
    return _prune(grad_output, config.grad_weight_prune, config, 0)


def prune_pixels(grad_output: Tensor, config: SDGPConfig) -> Tensor:
    """Prune [N, C, H, W] along its pixels in (n, h, w) order."""
    pixels = grad_output.permute(0, 2, 3, 1)
    pruned = prune_tokens(pixels.reshape(-1, pixels.shape[-1]), config)
    return pruned.reshape(pixels.shape).permute(0, 3, 1, 2)


def prune_channels(grad_output: Tensor, groups: int, config: SDGPConfig) -> Tensor:
    """Prune [N, C, H, W] along the channels that one product reduces over: those of a group."""
    channels, pixels = grad_output.shape[1] // groups, grad_output.permute(0, 2, 3, 1)
    # Groups of four that no border of a convolution group cuts are those of the whole pixel.
    whole = groups == 1 or channels % 4 == 0
    matrix = pixels.reshape(-1, grad_output.shape[1]) if whole and _on_gpu(grad_output) else None
    if matrix is not None and _kernel_takes(matrix, config.prune, config, -1):
        per_sample = grad_output.shape[2] * grad_output.shape[3]
        kept = _by_kernel(matrix, config.prune, config, -1, per_sample)
        kept = kept.view(pixels.shape).permute(0, 3, 1, 2)
    elif groups == 1:
        kept = _prune(grad_output, config.prune, config, 1, (2, 3))
    else:
        grouped = torch.unflatten(grad_output, 1, (groups, -1))
        kept = _prune(grouped, config.prune, config, 2, (3, 4)).flatten(1, 2)
    return decayed(kept, grad_output, config.beta)


def _on_gpu(x: Tensor) -> bool:
    """Whether x is a plain tensor on a GPU, whose address a kernel may be given."""
    return x.is_cuda and is_plain(x)


def _prune(
    x: Tensor,
    method: str,
    config: SDGPConfig,
    dim: int,
    scale_dims: tuple[int, ...] | None = None,
) -> Tensor:
    n, m = config.n, config.m
    if not _on_gpu(x) or method == "none" or n == m or x.numel() == 0:
        return prune(x, method=method, n=n, m=m, dim=dim, scale_dims=scale_dims)
    pruned, reason = prune_compiled(x, method, n, m, dim, scale_dims)
    if reason is not None and reason not in _announced:
        _announced.add(reason)
        text = f"SDGP: a gradient on {x.device} is pruned in plain torch, many passes: {reason}"
        warnings.warn(text, SDGPFallbackWarning, stacklevel=2)
    return pruned


def _kernel_takes(matrix: Tensor, method: str, config: SDGPConfig, dim: int) -> bool:
    return (
        _on_gpu(matrix)
        and method != "none"
        and config.m == 4
        and config.n in (1, 2)
        and matrix.numel() > 0
        and max(matrix.shape) <= MAX_SIDE
        and (dim == 0 or matrix.shape[1] % 4 == 0)
        and kernel_obstacle(matrix) is None
        and (_key(matrix, method, config, dim) in _launched or not _capturing(matrix))
    )


def _by_kernel(
    matrix: Tensor, method: str, config: SDGPConfig, dim: int, per_sample: int | None = None
) -> Tensor:
    pruned = prune_dense(
        matrix, method=method, n=config.n, dim=dim, tokens_per_sample=per_sample, backend=KERNEL
    )
    _launched.add(_key(matrix, method, config, dim))
    return pruned


def _key(matrix: Tensor, method: str, config: SDGPConfig, dim: int) -> tuple[object, ...]:
    """Return what a kernel that ran before has in common with one that is compiled already."""
    return (method, config.n, dim, matrix.dtype, matrix.device, *matrix.shape, *matrix.stride())


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
