"""RecipeState: what a recipe keeps of one layer, and what it does to it at each step."""

import json
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdgp_cusparselt.errors import SDGPScheduleWarning, value_error
from sdgp_cusparselt.layers.modules import SDGPModule, reconfigure_
from sdgp_cusparselt.layers.schedule_state import BLOCK, RECIPE, ScheduleState
from sdgp_cusparselt.layers.shards import is_sharded
from sdgp_cusparselt.layers.weight_masks import groups_along, set_weight_mask_, weight_mask
from sdgp_cusparselt.weights import gradients
from sdgp_cusparselt.weights.masks import (
    magnitude_scores,
    nm_mask,
    transposable_mask,
    unstructured_mask,
)
from sdgp_cusparselt.weights.recipes.base import WeightRecipe, recipe_from
from sdgp_cusparselt.weights.stages import WeightStage


class RecipeState(ScheduleState):
    """The child of a layer with a recipe: step and recipe in its state dict, adapters if any.

    The mask itself is the layer's buffer ``weight_mask``, beside its Parameter; this child adds
    bytes under ``<layer>.sdgp_recipe._extra_state``, as ``ScheduleState`` does for schedules.

    Args:
        layer: the layer, an SDGPModule; not registered as a child of its own child.
        recipe: what it follows.

    Attributes:
        stage: what holds now.
        down: [rank, in_features] of the adapter, or None.
        up: [out_features, rank] of the adapter, zero at the start, or None.
    """

    down: nn.Parameter | None
    up: nn.Parameter | None

    def __init__(self, layer: SDGPModule, recipe: WeightRecipe) -> None:
        super().__init__(layer)
        self.recipe, self.step = recipe, 0
        self.stage: WeightStage | None = None
        rank = getattr(recipe, "rank", 0) if recipe.arrived().adapters else 0
        self.down, self.up = _adapter(layer, rank)
        weight: Any = layer.weight
        set_weight_mask_(layer, torch.ones_like(weight, dtype=torch.bool), check=False)
        self._enter(recipe.stage(0), refresh=True)
        gradients.watch(self)

    def __setstate__(self, state: Any) -> None:
        """Take part in optimizer steps as a copy or what was unpickled, too."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        gradients.watch(self)

    @property
    def schedule(self) -> Any:
        """What messages about a schedule that stands still describe."""
        return self.recipe

    @property
    def weight(self) -> nn.Parameter:
        """The layer's Parameter, as it lies now: FSDP puts another in its place."""
        weight: nn.Parameter = self.layer.weight
        return weight

    @property
    def mask(self) -> Tensor:
        """The layer's mask: bool, of the weight's shape, True where a weight is kept."""
        mask = weight_mask(self.layer)
        assert mask is not None  # from sparsify_ to revert_
        return mask

    def set_step(self, step: int) -> None:
        """Take what holds at a step; one step further also chooses masks and zeroes weights."""
        forward = step == self.step + 1
        self.step = step
        self._enter(self.recipe.stage(step), refresh=forward)

    def add_adapter(self, input: Tensor, output: Tensor) -> Tensor:
        """Return output + (input @ down.T) @ up.T, or output where there is no adapter yet."""
        if self.down is None or self.up is None:
            return output
        if self.stage is not None and self.stage.adapters:
            return output + F.linear(F.linear(input, self.down), self.up)
        if not torch.is_grad_enabled():
            return output
        # A gradient of zero, and not none: DDP waits for every Parameter.
        return output + (self.down.sum() + self.up.sum()) * 0

    @torch.no_grad()
    def mask_gradient(self) -> None:
        """Zero the gradient of weights that are not kept, where the recipe says so; idempotent."""
        grad, stage = self.weight.grad, self.stage
        if grad is not None and stage is not None and stage.masked and stage.gradient == "masked":
            grad.mul_(as_lies(self.mask, grad))

    @torch.no_grad()
    def decay_gradient(self, scale: float | Tensor = 1.0) -> None:
        """Add decay * weight to the gradient of weights that are not kept.

        Args:
            scale: by which the gradient is still multiplied, as under a fused optimizer's scaler.
        """
        weight, stage = self.weight, self.stage
        if weight.grad is None or stage is None or not (stage.masked and stage.decay):
            return
        left_out = torch.where(as_lies(self.mask, weight), torch.zeros_like(weight), weight)
        weight.grad.add_(left_out.detach() * (stage.decay * scale))

    @torch.no_grad()
    def finish_weight(self) -> None:
        """Set the weights that are not kept to zero, for good."""
        self.weight.mul_(as_lies(self.mask, self.weight))

    def get_extra_state(self) -> Tensor:
        """Return step and recipe as JSON in uint8, filled up with spaces."""
        text = json.dumps({"step": self.step, "recipe": self.recipe.as_dict()}).encode()
        return torch.tensor(list(text.ljust(-len(text) // BLOCK * -BLOCK)), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Put the layer where the checkpoint says; warn if that had another recipe.

        Raises:
            ValueError: the state is not what ``get_extra_state`` returned.
        """
        try:
            saved = json.loads(bytes(state.tolist()))
            step, recipe = int(saved["step"]), recipe_from(saved["recipe"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            got, fix = f"{state!r} ({error})", "Load what a sparsified model's state_dict() gave."
            rule = "step and recipe as JSON in uint8"
            raise value_error("load_state_dict", RECIPE, rule, got, fix) from error
        if recipe != self.recipe:
            warnings.warn(
                f"the checkpoint was written under another recipe ({recipe.describe()}); "
                f"training goes on at step {step} of this one ({self.recipe.describe()})",
                SDGPScheduleWarning,
                stacklevel=2,
            )
        self.step = step  # so that the mask that was loaded stays
        self.layer.sdgp_set_step(step)

    def _enter(self, stage: WeightStage, *, refresh: bool) -> None:
        """Configure the layer for a stage; choose the mask if asked for, and zero what it drops."""
        if refresh and stage.refresh:
            set_weight_mask_(self.layer, self._choose(stage), check=False)
        if refresh and stage.masked and stage.gradient == "masked":
            self.finish_weight()
        self.stage = stage
        changes = _changes(stage)
        now = self.layer.sdgp_config
        if any(getattr(now, name) != value for name, value in changes.items()):
            reconfigure_(self.layer, **changes)

    def _choose(self, stage: WeightStage) -> Tensor:
        weight: Any = self.weight
        weight = weight.full_tensor() if is_sharded(weight) else weight.detach()
        return choose_mask(self.layer, weight, stage, magnitude=True)


def choose_mask(
    layer: nn.Module, scores: Tensor, stage: WeightStage, *, magnitude: bool = False
) -> Tensor:
    """Return the mask that a stage chooses for a layer's weight.

    Args:
        layer: says along which dimensions groups run.
        scores: of the weight's shape, whole; larger is kept.
        stage: says how.
        magnitude: whether the scores are the weight, and |scores| counts.
    """
    along_in, along_out = groups_along(layer)
    if stage.pattern == "transposable":
        return transposable_mask(scores, rows=along_out, cols=along_in, absolute=magnitude)
    if magnitude:
        scores = magnitude_scores(scores)
    if stage.pattern == "unstructured":
        return unstructured_mask(scores, stage.sparsity)
    return nm_mask(scores, stage.n, stage.m, dim=along_in)


def as_lies(mask: Tensor, like: Tensor) -> Tensor:
    """Return a whole mask as a DTensor that lies as ``like`` does, where that is one."""
    if not is_sharded(like):
        return mask
    from torch.distributed.tensor import distribute_tensor

    # Every rank holds the whole mask, so none has to send it.
    return distribute_tensor(mask, like.device_mesh, like.placements, src_data_rank=None)


def recipe_states(model: nn.Module) -> list[RecipeState]:
    """Return the recipe's state of every layer that has one, in model order."""
    return [module for module in model.modules() if isinstance(module, RecipeState)]


def _changes(stage: WeightStage) -> dict[str, Any]:
    """Return the fields of the layer's configuration that a stage sets."""
    # An unstructured mask is of a weight that has its zeros already: no product need know.
    masked = stage.masked and stage.pattern != "unstructured"
    changes = {
        "forward": "sparse_weight" if masked else "dense",
        "grad_input": "weight" if masked and stage.both_ways else "grad_output",
        "weight_n": stage.n,
        "weight_m": stage.m,
        "weight_beta": stage.beta if masked else 0.0,
    }
    if stage.sparse_grad_weight is not None:
        changes["grad_weight"] = "sparse" if stage.sparse_grad_weight else "dense"
    return changes


def _adapter(layer: nn.Module, rank: int) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Return down and up of a linear layer's adapter; ``up`` is zero, so it changes nothing yet."""
    weight: Any = layer.weight
    if not rank or weight.ndim != 2:
        return None, None
    along_in, along_out = groups_along(layer)
    inputs, outputs = weight.shape[along_in], weight.shape[along_out]
    down = torch.empty(rank, inputs, dtype=weight.dtype, device=weight.device)
    nn.init.normal_(down, std=inputs**-0.5)
    up = torch.zeros(outputs, rank, dtype=weight.dtype, device=weight.device)
    return nn.Parameter(down), nn.Parameter(up)
