"""convert_, revert_ and set_enabled_: whole models in place, with a report."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sdgp_cusparselt.config.choices import SDGPConfig, check_config
from sdgp_cusparselt.errors import type_error, value_error
from sdgp_cusparselt.layers.fused_modules import FusedModule, check_unfusable, unfuse_module_
from sdgp_cusparselt.layers.modules import (
    SDGPModule,
    adopt_,
    check_releasable,
    release_,
    sdgp_class_of,
)
from sdgp_cusparselt.layers.plain import reason_against_weight
from sdgp_cusparselt.layers.presets import Preset, configs_of, default_preset
from sdgp_cusparselt.layers.report import ConversionReport, grouped
from sdgp_cusparselt.layers.unsuitable import adapters, output_layers, why_other_kind

FilterFn = Callable[[nn.Module, str], bool]
#: One configuration for all layers, or name pattern -> configuration; None leaves layers dense.
Configs = SDGPConfig | Mapping[str, SDGPConfig | None]

#: Last names by which models call the layer that makes their outputs.
HEAD_NAMES = ("head", "fc", "classifier", "lm_head", "score")
#: A convolution that reads this many channels or fewer reads an image: it needs no grad_input.
STEM_CHANNELS = 3


def convert_(
    model: nn.Module,
    config: Configs | None = None,
    filter_fn: FilterFn | None = None,
    *,
    preset: Preset | None = None,
    include_heads: bool = False,
) -> ConversionReport:
    """Give every suitable linear and convolution of a model a pruned backward, in place.

    grad_input = prune(grad_output) @ weight in each converted layer; nothing else changes: module
    objects, Parameters, state_dict keys, hooks and optimizers built before stay valid.

    Args:
        model: any module; itself converted if it is such a layer.
        config: how to prune; ``SDGPConfig()`` if None. Or a dictionary of patterns of fully
            qualified names, such as ``{"*.mlp.*": config}``: the first that matches counts, its
            configuration may be None for dense, and a layer that none matches stays dense.
        filter_fn: (module, fully qualified name) -> whether to convert it. Given, it alone decides
            among the layers that can be converted; without it layers that read images, heads and
            layers whose output is no multiple of m stay dense.
        preset: which layers of a transformer: "readers" of the residual stream (grad_input of qkv,
            up, gate), "balanced" (readers, and grad_weight of every layer by mvue), or "all".
            Layers are known by their names; needs one configuration for all. If None, "readers" of
            a transformer, because pruning every layer loses more steps than it gains time; and
            "all" of other models, and where patterns, filter_fn or include_heads choose layers.
        include_heads: convert also layers named head, fc, classifier, lm_head or score, and what
            ``get_output_embeddings`` returns.

    Returns:
        What was converted, and why the rest was not.

    Raises:
        TypeError: model is no module, config no SDGPConfig, or filter_fn not callable.
        ValueError: a layer is converted already, nothing matched the filter or one of the patterns,
            or the preset finds no layer that reads a residual stream. The model is then unchanged.

    Note:
        A model inside ``torch.compile`` or DistributedDataParallel is converted inside its wrapper,
        by the names of the plain model.
    """
    config = SDGPConfig() if config is None else config
    _check_arguments(model, config, filter_fn)
    report = ConversionReport(config if isinstance(config, SDGPConfig) else None)
    if preset is None:
        chooses = filter_fn is not None or include_heads or isinstance(config, Mapping)
        preset = "all" if chooses or not _prunes(config) else default_preset(unwrapped(model))
    patterns, left_out = _patterns(model, config, preset)
    unused = set(patterns)
    chosen: list[tuple[str, nn.Module, SDGPConfig]] = []
    heads, narrow = output_layers(unwrapped(model)), adapters(unwrapped(model))
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, SDGPModule):
            fix = "Call sdgp.revert_(model) first, or convert only the new part."
            got = f"one whose layer {name or '(root)'!r} is converted already"
            raise value_error("convert_", "model", "unconverted", got, fix)
        matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        own = patterns[matching[0]] if matching else None
        makes_outputs = not include_heads and (is_head(name) or module in heads)
        # What keeps a layer dense anyway is said first, then what the preset says.
        asked = config if own is None and isinstance(config, SDGPConfig) else own
        reason = _reason_against(module, name, asked, filter_fn, makes_outputs, module in narrow)
        if reason is None and own is None:
            reason = left_out.get(name, f"preset {preset!r} prunes linear layers alone")
        if reason != "":
            report.kinds[name] = type(module).__name__
            unused.difference_update(matching)
        if reason:
            report.skipped[name] = reason
        elif reason is None and own is not None:
            chosen.append((name, module, own))
    _check_matches(report, len(chosen), unused)
    for name, module, own in chosen:
        adopt_(module, own, name or type(module).__name__)
        report.converted.append(name)
        report.configs[name] = own
    return report


def _prunes(config: Configs) -> bool:
    """Whether one configuration prunes grad_input, now or later in its schedule."""
    return isinstance(config, SDGPConfig) and config.prune != "none"


def _patterns(
    model: nn.Module, config: Configs, preset: Preset
) -> tuple[Mapping[str, SDGPConfig | None], dict[str, str]]:
    """Return name pattern -> configuration, and what a preset says of the layers it leaves out."""
    if isinstance(config, SDGPConfig):
        return configs_of(unwrapped(model), preset, config)
    if preset != "all":
        fix = "A preset chooses the layers itself."
        raise value_error("convert_", "config", "one SDGPConfig with a preset", "patterns", fix)
    return config, {}


def revert_(model: nn.Module) -> list[str]:
    """Turn every converted layer of a model back into its plain class, in place; unfuse it first.

    Args:
        model: any module, converted or not.

    Returns:
        Names of the layers that were reverted.

    Raises:
        TypeError: something else, such as ``fully_shard``, changed a layer's class since it was
            converted. The model is then unchanged.
    """
    layers = _layers(unwrapped(model))
    fused = [module for module in unwrapped(model).modules() if isinstance(module, FusedModule)]
    for _, module in layers:
        check_releasable("revert_", module)
    for whole in fused:
        check_unfusable("revert_", whole)
    for whole in fused:
        unfuse_module_(whole)
    for _, module in layers:
        release_(module)
    return [name for name, _ in layers]


def set_enabled_(model: nn.Module, enabled: bool) -> list[str]:
    """Switch pruning on or off in every converted layer: dense warm-up, dense tail.

    Args:
        model: any module.
        enabled: False runs the layers exactly as their dense classes do.

    Returns:
        Names of the layers that were switched.

    Raises:
        TypeError: enabled is no bool.
        ValueError: the model has no converted layer.
    """
    if enabled not in (True, False):
        fix = "Pass True or False."
        raise type_error("set_enabled_", "enabled", "a bool", repr(enabled), fix)
    layers = converted_layers("set_enabled_", model)
    for _, module in layers:
        module.sdgp_enabled = bool(enabled)
    return [name for name, _ in layers]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile``'s and DistributedDataParallel's wrappers.

    Both run the very module objects that they wrap: compiled code is guarded by their classes and
    configurations, so it is compiled anew after a change.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)  # of OptimizedModule, slow to import
        if isinstance(model, DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def converted_layers(function: str, model: object) -> list[tuple[str, SDGPModule]]:
    """Return (fully qualified name, layer) of every converted layer.

    Args:
        function: that is named in errors.
        model: any module, wrapped or not.

    Raises:
        TypeError: model is no module.
        ValueError: it has no converted layer.
    """
    if not isinstance(model, nn.Module):
        fix = "Pass the model itself."
        raise type_error(function, "model", "an nn.Module", type(model).__name__, fix)
    layers = _layers(unwrapped(model))
    if not layers:
        fix = "Call sdgp.convert_(model) first."
        raise value_error(function, "model", "converted", "one without SDGP layers", fix)
    return layers


def _layers(model: nn.Module) -> list[tuple[str, SDGPModule]]:
    return [(n, mod) for n, mod in model.named_modules() if isinstance(mod, SDGPModule)]


def _check_arguments(model: object, config: Any, filter_fn: object) -> None:
    if not isinstance(model, nn.Module):
        fix = "Pass the model itself."
        raise type_error("convert_", "model", "an nn.Module", type(model).__name__, fix)
    if not isinstance(config, Mapping):
        check_config("convert_", config)
    else:
        for pattern, own in config.items():
            if not isinstance(pattern, str):
                fix = 'Such as {"*.mlp.*": sdgp.SDGPConfig()}.'
                raise type_error("convert_", "config", "keyed by strings", repr(pattern), fix)
            if own is not None and not isinstance(own, SDGPConfig):
                rule, got = "an SDGPConfig or None", type(own).__name__
                fix = "Pass sdgp.SDGPConfig(...)."
                raise type_error("convert_", f"config[{pattern!r}]", rule, got, fix)
    if filter_fn is not None and not callable(filter_fn):
        fix = "Pass a function of (module, fqn)."
        raise type_error("convert_", "filter_fn", "callable", type(filter_fn).__name__, fix)


def _reason_against(
    module: nn.Module,
    name: str,
    config: SDGPConfig | None,
    filter_fn: FilterFn | None,
    makes_outputs: bool,
    is_adapter: bool,
) -> str | None:
    """Return None to convert, "" for a module that is none of our kinds, else why not."""
    if sdgp_class_of(module) is None:
        return why_not_convertible(module)
    if config is None:
        return "left dense by its name"
    reason = reason_against_weight(_weight(module), None)
    if reason is not None:
        return reason
    if filter_fn is not None:
        return None if filter_fn(module, name) else "left out by filter_fn"
    if is_adapter:
        return "an adapter, as narrow as its rank: nothing to gain"
    if makes_outputs:
        return "makes the model's outputs; include_heads=True converts it"
    reduced = _reduced(module)
    if isinstance(module, nn.Conv2d) and module.in_channels <= STEM_CHANNELS:
        what = f"reads {module.in_channels} channels"
        return f"{what}, so it stands at the input and needs no grad_input"
    if config.prunes and reduced % config.m:
        return f"reduces over {reduced} outputs, no multiple of m = {config.m}"
    return _reason_against_pruning_weight(module, config, reduced)


def _reason_against_pruning_weight(
    module: nn.Module, config: SDGPConfig, outputs: int
) -> str | None:
    if not config.masks_weight:
        return None
    inputs, m = _weight(module).shape[1], config.weight_m
    if inputs % m:
        return f"its weight has {inputs} inputs, no multiple of weight_m = {m}"
    if config.grad_input == "weight" and outputs % m:
        return f"its weight has {outputs} outputs, no multiple of weight_m = {m}"
    return None


def why_not_convertible(module: nn.Module) -> str:
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its forward is never called: nn.MultiheadAttention reads its weight"
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return why_other_kind(module)
    if type(module).__module__.startswith("bitsandbytes."):
        return f"{type(module).__name__} holds its weight quantized"
    if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
        return "fully_shard changed its class: convert first, or shard only the block around it"
    return f"{type(module).__name__} is a subclass and may compute something else"


def is_head(name: str) -> bool:
    """Whether a layer is an output layer by convention: ``lm_head``, ``classifier.1``, ``head.fc``.

    Args:
        name: fully qualified name.
    """
    parts = [part for part in name.split(".") if not part.isdigit()]
    return bool(parts) and (parts[-1] in HEAD_NAMES or parts[0] in HEAD_NAMES)


def _weight(module: nn.Module) -> Tensor:
    """Return the weight as [out_features, in_features], or that of a convolution."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # of one of our kinds
    return weight if isinstance(module, nn.Linear | nn.Conv2d) else weight.t()


def _reduced(module: nn.Module) -> int:
    """Return how many outputs one product of grad_input reduces over."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels // module.groups
    return module.out_features if isinstance(module, nn.Linear) else _weight(module).shape[0]


def _check_matches(report: ConversionReport, chosen: int, unused: set[str]) -> None:
    """Raise unless some layer is converted and every pattern named one."""
    if not chosen:
        groups = grouped(report.skipped, lambda name: ("", report.skipped[name]))
        seen = "; ".join(f"{group.title}: {group.backward}" for group in groups)
        got = f"one that matched none of: {seen}" if seen else "a model without such layers"
        fix = "Widen filter_fn, or pass a model with nn.Linear, nn.Conv2d or Conv1D layers."
        raise value_error("convert_", "filter_fn", "a filter that matches a layer", got, fix)
    if unused:
        got = ", ".join(repr(pattern) for pattern in sorted(unused))
        names = ", ".join(repr(group.pattern) for group in grouped(report.kinds))
        fix = f"The layers are {names}."
        raise value_error("convert_", "config", "patterns that each match a layer", got, fix)
