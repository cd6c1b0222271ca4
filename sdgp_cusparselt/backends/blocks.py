"""Products of an emulated gradient on a CPU, pruned and multiplied a block at a time.

A pruned gradient of whole size would cost as much in page faults as the pruning itself.
"""

import math

import torch
from torch import Tensor

from sdgp_cusparselt.backends.emulation import decayed, prune_features, prune_tokens
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.pruning.methods import prune
from sdgp_cusparselt.pruning.sums import magnitude_sums, rescale_ratio, scaled

#: Elements that are pruned and multiplied at a time.
ELEMENTS = 1 << 21
#: The fewest rows or columns of a product that still run at full speed.
SIDE = 256


def takes(grad_output: Tensor) -> bool:
    """Whether a gradient is a plain tensor on a CPU, whose blocks can be written in place."""
    return type(grad_output) is Tensor and grad_output.device.type == "cpu"


def linear_grad_input(grad_output: Tensor, weight: Tensor, config: SDGPConfig) -> Tensor:
    """Return prune(grad_output) @ weight: [..., K] @ [K, N] -> [..., N], on a CPU."""
    features, columns = weight.shape
    out = grad_output.new_empty((*grad_output.shape[:-1], columns))
    # What shares a ratio of rescaled_magnitude: a sample of three dimensions or more, else all.
    samples = grad_output.shape[0] if grad_output.ndim > 2 else 1
    tokens = math.prod(grad_output.shape[:-1]) // max(samples, 1)
    gradient = grad_output.reshape(samples, tokens, features)
    into = out.view(samples, tokens, columns)
    if tokens * features <= ELEMENTS:
        for some in _blocks(samples, ELEMENTS // max(tokens * features, 1)):
            pruned = prune_features(gradient[some], config)
            torch.mm(pruned.flatten(0, 1), weight, out=into[some].flatten(0, 1))
        return out
    for rows, result in zip(gradient, into, strict=True):
        _sample_grad_input(rows, weight, config, result)
    return out


def _sample_grad_input(rows: Tensor, weight: Tensor, config: SDGPConfig, out: Tensor) -> None:
    blocks = _blocks(rows.shape[0], max(SIDE, ELEMENTS // rows.shape[1]))
    if config.prune != "rescaled_magnitude":
        for some in blocks:
            torch.mm(prune_features(rows[some], config), weight, out=out[some])
        return
    ratio = _ratio([rows[some] for some in blocks], config, -1)
    for some in blocks:
        kept = scaled(prune(rows[some], n=config.n, m=config.m), ratio)
        torch.mm(decayed(kept, rows[some], config.beta), weight, out=out[some])


def linear_grad_weight(grad_output: Tensor, input: Tensor, config: SDGPConfig) -> Tensor:
    """Return prune(grad_output along tokens).T @ input: [K, M].T @ [K, N] -> [M, N], on a CPU."""
    tokens, features = grad_output.shape
    out = grad_output.new_empty((features, input.shape[1]))
    blocks = _blocks(features, max(SIDE, ELEMENTS // max(tokens, 1)))
    rescales = config.grad_weight_prune == "rescaled_magnitude" and len(blocks) > 1
    ratio = _ratio([grad_output[:, some] for some in blocks], config, 0) if rescales else None
    for some in blocks:
        if ratio is None:
            pruned = prune_tokens(grad_output[:, some], config)
        else:
            pruned = scaled(prune(grad_output[:, some], n=config.n, m=config.m, dim=0), ratio)
        torch.mm(pruned.t(), input, out=out[some])
    return out


def _ratio(parts: list[Tensor], config: SDGPConfig, dim: int) -> Tensor:
    """Return what rescaled_magnitude multiplies [rows, columns] with, cut along the other dim."""
    over = [1 + dim]  # 0 for features, whose sums are over rows; 1 for tokens
    total = kept = torch.zeros((), dtype=torch.float64)
    for part in parts:
        total = total + magnitude_sums(part, over)
        kept = kept + magnitude_sums(prune(part, n=config.n, m=config.m, dim=dim), over)
    return rescale_ratio(total, kept, parts[0].dtype)


def _blocks(size: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, size, step)]
