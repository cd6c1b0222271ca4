"""Prune to a dense tensor in one pass: what packing and unpacking would give, and the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from sdgp_cusparselt.config.patterns import STOCHASTIC
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.packing import launch, starting
from sdgp_cusparselt.packing.layout import default_layout, padded_shape
from sdgp_cusparselt.packing.pack import check_matrix, checked_samples, use_kernel
from sdgp_cusparselt.packing.ratios import kernel_ratio, reference_ratio
from sdgp_cusparselt.packing.reference import Draws, pack_operand
from sdgp_cusparselt.packing.seeds import Seeds, draw_seeds, seeds_tensor


def prune_dense(
    x: Tensor,
    *,
    method: str = "magnitude",
    n: int = 2,
    m: int = 4,
    dim: int = -1,
    tokens_per_sample: int | None = None,
    backend: str = "auto",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Prune n of 4 along features or tokens, reading x once and writing it once.

    dim -1: pack_gradient(x, features=method).features.unpack()
    dim 0:  pack_gradient(x, features=None, tokens=method).tokens.unpack().T

    Args:
        x: [M, K] float16|bfloat16, any device, any strides.
        method: none, random, magnitude, rescaled_magnitude or mvue.
        n: values kept of four, 1 or 2.
        m: group size, 4.
        dim: -1 or 1 for groups along features, 0 for groups along tokens.
        tokens_per_sample: rows of x that share a rescale ratio; all of them if None.
        backend: see ``pack``.
        generator: source of random numbers; torch's own if None.

    Returns:
        [M, K] of x's dtype, contiguous; never x itself.

    Raises:
        ValueError, TypeError, NotSupportedError: see ``pack``; another pattern or dimension.

    Note:
        rescaled_magnitude reads x a second time, beforehand, for its ratio.
    """
    if m != 4 or n not in (1, 2):
        raise value_error("prune_dense", "n, m", "1:4 or 2:4", f"{n}:{m}", "Use sdgp.prune.")
    if dim not in (-1, 0, 1):
        raise value_error("prune_dense", "dim", "-1, 0 or 1", dim, "x has two dimensions.")
    along_tokens = dim == 0
    check_matrix(x, None if along_tokens else method, method if along_tokens else None)
    per_sample = checked_samples(x, tokens_per_sample)
    x = x.detach()
    by_kernel = use_kernel(x, backend, [])
    seeds: Seeds = draw_seeds(x.device, generator) if method in STOCHASTIC else (0, 0)
    prune = _by_kernel if by_kernel else _by_reference
    return prune(x, method, n, along_tokens, per_sample, seeds)


def _by_kernel(
    x: Tensor, method: str, n: int, along_tokens: bool, per_sample: int, seeds: Seeds
) -> Tensor:
    read = launch.aligned(x)
    in_memory = isinstance(seeds, Tensor)
    prepared = launch.prepare_prune(
        (read.shape[0], read.shape[1]),
        read.stride(0),
        x.dtype,
        x.device,
        method=method,
        tokens=along_tokens,
        n=n,
        rows_per_ratio=per_sample,
        seeds_in_memory=in_memory,
    )
    ratio = None
    if method == "rescaled_magnitude":
        ratio = kernel_ratio(read, along_tokens, per_sample, n)
    out = torch.empty(read.shape, dtype=x.dtype, device=x.device)
    seed, offset = (0, 0) if isinstance(seeds, Tensor) else seeds
    with starting.on_device(x.device):
        prepared(
            read.data_ptr(),
            out.data_ptr(),
            seed,
            offset,
            starting.current_stream(x.device),
            seeds=seeds.data_ptr() if isinstance(seeds, Tensor) else 0,
            ratio=0 if ratio is None else ratio.data_ptr(),
        )
    return out[:, : x.shape[1]].contiguous()


def _by_reference(
    x: Tensor, method: str, n: int, along_tokens: bool, per_sample: int, seeds: Seeds
) -> Tensor:
    operand = x.t() if along_tokens else x
    ratio = None
    if method == "rescaled_magnitude":
        ratio = reference_ratio(operand, operand.shape[0] if along_tokens else per_sample, n)
    rows, cols = operand.shape
    packed = pack_operand(
        operand,
        default_layout(*padded_shape(rows, cols, x.dtype), x.dtype),
        method=method,
        n=n,
        ratio=ratio,
        draws=Draws(seeds_tensor(seeds, x.device), int(along_tokens)),
    )
    dense = packed.unpack()
    return dense.t().contiguous() if along_tokens else dense
