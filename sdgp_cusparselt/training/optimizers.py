"""The optimizer of a recipe, and which parameters it decays."""

from typing import Any

import torch
from torch import nn

from sdgp_cusparselt.training.recipe import Decay, Recipe

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer, in two groups: what is decayed, and the rest."""
    decayed = decayed_parameters(model, recipe.decay)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in parameters if id(p) in decayed],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def decayed_parameters(model: nn.Module, decay: Decay) -> set[int]:
    """Return the ids of the parameters that weight decay applies to.

    Args:
        model: with all its parameters.
        decay: as in ``Recipe``.
    """
    if decay == "matrices":
        return {id(p) for p in model.parameters() if p.dim() > 1}
    spared: set[int] = set()
    if decay == "not_norms":
        norms = (module for module in model.modules() if isinstance(module, NORMS))
        spared = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    return {id(p) for p in model.parameters()} - spared
