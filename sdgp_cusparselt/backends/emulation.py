"""The pruned gradient with its zeros, as each product prunes it."""

import torch
from torch import Tensor

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.pruning.methods import prune


def prune_features(grad_output: Tensor, config: SDGPConfig) -> Tensor:
    """Prune [..., out_features] along the features, over which grad_input reduces."""
    kept = prune(grad_output, method=config.prune, n=config.n, m=config.m)
    return decayed(kept, grad_output, config.beta)


def decayed(kept: Tensor, grad_output: Tensor, beta: float) -> Tensor:
    """Return kept + beta * (grad_output - kept), where unscaled kept values keep their bits."""
    if not 0 < beta < 1:
        return kept if beta == 0 else grad_output
    # An Inf that is kept would become Inf - Inf.
    return torch.where(kept == grad_output, kept, kept + beta * (grad_output - kept))


def prune_tokens(grad_output: Tensor, config: SDGPConfig) -> Tensor:
    """Prune [tokens, out_features] along the tokens, over which grad_weight reduces."""
    return prune(grad_output, method=config.grad_weight_prune, n=config.n, m=config.m, dim=0)


def prune_pixels(grad_output: Tensor, config: SDGPConfig) -> Tensor:
    """Prune [N, C, H, W] along its pixels in (n, h, w) order."""
    pixels = grad_output.permute(0, 2, 3, 1)
    pruned = prune_tokens(pixels.reshape(-1, pixels.shape[-1]), config)
    return pruned.reshape(pixels.shape).permute(0, 3, 1, 2)


def prune_channels(grad_output: Tensor, groups: int, config: SDGPConfig) -> Tensor:
    """Prune [N, C, H, W] along the channels that one product reduces over: those of a group."""
    pattern = {"method": config.prune, "n": config.n, "m": config.m}
    if groups == 1:
        kept = prune(grad_output, dim=1, scale_dims=(2, 3), **pattern)  # type: ignore[arg-type]
    else:
        grouped = torch.unflatten(grad_output, 1, (groups, -1))
        kept = prune(grouped, dim=2, scale_dims=(3, 4), **pattern)  # type: ignore[arg-type]
        kept = kept.flatten(1, 2)
    return decayed(kept, grad_output, config.beta)
