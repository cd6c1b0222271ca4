"""sparsify_: give a model's layers 2:4 weights by a recipe, in place, with a report."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdgp_cusparselt.config.choices import SDGPConfig, check_config
from sdgp_cusparselt.errors import type_error, value_error
from sdgp_cusparselt.layers.convert import FilterFn, is_head, unwrapped, why_not_convertible
from sdgp_cusparselt.layers.modules import SDGPModule, adopt_, sdgp_class_of
from sdgp_cusparselt.layers.plain import reason_against_weight
from sdgp_cusparselt.layers.report import ConversionReport
from sdgp_cusparselt.layers.schedule_state import RECIPE
from sdgp_cusparselt.layers.unsuitable import adapters, output_layers
from sdgp_cusparselt.layers.weight_masks import groups_along, set_weight_mask_
from sdgp_cusparselt.weights.recipes.base import WeightRecipe
from sdgp_cusparselt.weights.state import RecipeState, _changes, choose_mask, recipe_states


def sparsify_(
    model: nn.Module,
    recipe: WeightRecipe,
    filter_fn: FilterFn | None = None,
    *,
    config: SDGPConfig | None = None,
    include_heads: bool = False,
) -> ConversionReport:
    """Train the weights of suitable layers towards n:m by a recipe, in place.

    output = input @ (weight where weight_mask).T in each of these layers, as the recipe's step says

    ``sdgp.step(model)`` after each optimizer step, or ``sdgp.step_with``, moves the recipe on; it
    needs nothing else: what it does to gradients happens as an optimizer's step begins. Parameters
    stay what they are. Each layer gets a buffer ``weight_mask`` and a child that carries step and
    recipe in state dicts; ``revert_`` removes both.

    Args:
        model: any module, its layers plain or converted by ``convert_``.
        recipe: one of ``sdgp_cusparselt.weights``, such as ``SRSTE()``.
        filter_fn: (module, fully qualified name) -> whether to take it. Given, it alone decides
            among the layers that the recipe fits; without it heads stay dense.
        config: of layers that are not converted yet; ``SDGPConfig(prune="none")`` if None.
        include_heads: take also layers that make the model's outputs.

    Returns:
        What was taken, and why the rest was not.

    Raises:
        TypeError: model is no module, recipe no WeightRecipe, or config no SDGPConfig.
        ValueError: a layer has a recipe already, its configuration does not go with this one, or
            no layer fits. The model is then unchanged.
    """
    config = SDGPConfig(prune="none") if config is None else config
    _check_arguments(model, recipe, config)
    report = ConversionReport(None)
    chosen: list[tuple[str, nn.Module]] = []
    heads, narrow = output_layers(unwrapped(model)), adapters(unwrapped(model))
    for name, module in unwrapped(model).named_modules():
        reason = _reason_against(module, name, recipe)
        if reason == "":
            continue
        if reason is None and filter_fn is not None:
            reason = None if filter_fn(module, name) else "left out by filter_fn"
        elif reason is None and module in narrow:
            reason = "an adapter, as narrow as its rank"
        elif reason is None and not include_heads and (is_head(name) or module in heads):
            reason = "makes the model's outputs; include_heads=True takes it"
        report.kinds[name] = type(module).__name__
        if reason is None:
            chosen.append((name, module))
        else:
            report.skipped[name] = reason
    _check_chosen(chosen, report, recipe, config)
    for name, module in chosen:
        if not isinstance(module, SDGPModule):
            adopt_(module, config, name or type(module).__name__)
        assert isinstance(module, SDGPModule)
        module.add_module(RECIPE, RecipeState(module, recipe))
        report.converted.append(name)
        report.configs[name] = module.sdgp_config
    return report


def finish_(model: nn.Module) -> list[str]:
    """Make the weights what the masked products used: weight = weight where mask, else 0.

    For the end of a training with a straight-through recipe, before ``revert_`` or an export. A
    dense phase, such as FST's tail, leaves the weights dense.

    Args:
        model: any module.

    Returns:
        Names of the layers whose weights now have their zeros.

    Raises:
        ValueError: a mask still decays, so that the products use no zeros. Nothing is changed.
    """
    found = [
        (name.removesuffix(RECIPE).rstrip("."), state)
        for name, state in unwrapped(model).named_modules()
        if isinstance(state, RecipeState) and state.stage is not None and state.stage.masked
    ]
    for name, state in found:
        assert state.stage is not None
        if state.stage.beta:
            got = f"{state.stage.beta:.3g} in {name or '(root)'!r}"
            fix = "Train on until the decay has arrived."
            raise value_error("finish_", "beta", "0", got, fix)
    for _, state in found:
        state.finish_weight()
    return [name for name, _ in found]


def mask_gradients_(model: nn.Module) -> None:
    """Zero the gradients of weights that a fixed mask drops, before their norm is clipped.

    Only needed with ``clip_grad_norm_``: every optimizer step does the same as it begins.

    Args:
        model: any module.
    """
    for state in recipe_states(unwrapped(model)):
        state.mask_gradient()


def set_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put masks of one's own, or masks of one's own scores, in place of those by magnitude.

    mask = masks[name] if that is bool, else chosen from these scores by the recipe's pattern

    Args:
        model: with layers that have a recipe.
        masks: fully qualified layer name -> [the weight's shape] bool mask, True where kept, or
            float scores such as Wanda's, larger is kept. Other layers keep their masks.

    Raises:
        ValueError: there is no such layer with a recipe, or a shape or pattern is wrong. Nothing
            is then changed.

    Note:
        A recipe that chooses its masks anew does so at its next step all the same.
    """
    layers = {
        name: module
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, SDGPModule) and RECIPE in module._modules
    }
    found: list[tuple[SDGPModule, Tensor]] = []
    for name, given in masks.items():
        if name not in layers:
            rule, fix = "a layer with a recipe", "Call sdgp.weights.sparsify_ first."
            raise value_error("set_masks_", "masks", rule, repr(name), fix)
        layer: Any = layers[name]
        if given.shape != layer.weight.shape:
            rule, got = f"of the shape {tuple(layer.weight.shape)} for {name!r}", tuple(given.shape)
            raise value_error("set_masks_", "masks", rule, got, "One entry for each weight.")
        if given.dtype != torch.bool:
            recipe = layer._modules[RECIPE].recipe
            given = choose_mask(layer, given, recipe.arrived())
        found.append((layer, given))
    for layer, mask in found:
        set_weight_mask_(layer, mask)
        state: Any = layer._modules[RECIPE]
        if state.stage.masked and state.stage.gradient == "masked":
            state.finish_weight()


def _check_arguments(model: object, recipe: object, config: object) -> None:
    if not isinstance(model, nn.Module):
        fix = "Pass the model itself."
        raise type_error("sparsify_", "model", "an nn.Module", type(model).__name__, fix)
    if not isinstance(recipe, WeightRecipe):
        fix = "Pass one of sdgp_cusparselt.weights, such as SRSTE()."
        raise type_error("sparsify_", "recipe", "a WeightRecipe", type(recipe).__name__, fix)
    check_config("sparsify_", config)
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, RecipeState):
            got = f"one whose layer {name.rpartition('.')[0] or '(root)'!r} has one"
            fix = "Call sdgp.revert_(model) first."
            raise value_error("sparsify_", "model", "without a recipe", got, fix)


def _reason_against(module: nn.Module, name: str, recipe: WeightRecipe) -> str | None:
    """Return None where the recipe fits, "" for a module of none of our kinds, else why not."""
    if not isinstance(module, SDGPModule) and sdgp_class_of(module) is None:
        return why_not_convertible(module)
    weight: Any = module.weight
    reason = reason_against_weight(weight, None)
    if reason is not None:
        return reason
    sizes = [weight.shape[dim] for dim in groups_along(module)]
    names = ("in_features", "out_features")
    for size, multiple, what in zip(sizes, recipe.multiples, names, strict=True):
        if size % multiple:
            return f"its {size} {what} are no multiple of {multiple}"
    return None


def _check_chosen(
    chosen: list[tuple[str, nn.Module]],
    report: ConversionReport,
    recipe: WeightRecipe,
    config: SDGPConfig,
) -> None:
    """Raise ValueError unless there are layers, whose configurations go with the recipe."""
    if not chosen:
        seen = "; ".join(f"{name}: {reason}" for name, reason in report.skipped.items())
        got = f"one that fits none of: {seen}" if seen else "a model without such layers"
        fix = "Widen filter_fn, or choose another pattern."
        raise value_error("sparsify_", "recipe", "one that fits a layer", got, fix)
    changes = _changes(recipe.arrived())
    for own in {getattr(module, "sdgp_base_config", config) for _, module in chosen}:
        own.replace(**changes)
