"""convert_, revert_ and set_enabled_: whole models in place, with a report."""

from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sdgp_cusparselt.config import SDGPConfig, check_config
from sdgp_cusparselt.errors import type_error, value_error
from sdgp_cusparselt.nn import SDGPModule, adopt_, check_releasable, release_, sdgp_class_of

FilterFn = Callable[[nn.Module, str], bool]

#: Last names by which models call the layer that makes their outputs.
HEAD_NAMES = ("head", "fc", "classifier", "lm_head", "score")
#: A layer that reads this many channels or fewer reads an image: it needs no grad_input.
STEM_CHANNELS = 3


@dataclass
class ConversionReport:
    """What ``convert_`` did; printing it gives a table.

    Attributes:
        converted: fully qualified names of the converted layers, in model order.
        skipped: name -> reason, for every linear or convolution that stayed dense.
        config: the configuration that the converted layers share.
    """

    config: SDGPConfig
    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    _kinds: dict[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """Return the table, 100 columns wide."""
        count = f"{len(self.converted)} converted, {len(self.skipped)} dense"
        title = f"SDGP {self.config.describe()}: {count}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("layer", "kind", "backward"):
            table.add_column(column, overflow="fold")
        for name, kind in self._kinds.items():
            what = self.skipped.get(name)
            table.add_row(name or "(root)", kind, f"dense: {what}" if what else "pruned")
        console = Console(width=100, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip()


def convert_(
    model: nn.Module,
    config: SDGPConfig | None = None,
    filter_fn: FilterFn | None = None,
    *,
    include_heads: bool = False,
) -> ConversionReport:
    """Give every suitable linear and convolution of a model a pruned backward, in place.

    grad_input = prune(grad_output) @ weight in each converted layer; nothing else changes: module
    objects, Parameters, state_dict keys, hooks and optimizers built before stay valid.

    Args:
        model: any module; itself converted if it is such a layer.
        config: how to prune; ``SDGPConfig()`` if None.
        filter_fn: (module, fully qualified name) -> whether to convert it. Given, it alone decides
            among the layers that can be converted; without it layers that read images, heads and
            layers whose output is no multiple of m stay dense.
        include_heads: convert also layers named head, fc, classifier, lm_head or score.

    Returns:
        What was converted, and why the rest was not.

    Raises:
        TypeError: model is no module, config no SDGPConfig, or filter_fn not callable.
        ValueError: a layer is converted already, or nothing matched. The model is then unchanged.
    """
    config = SDGPConfig() if config is None else config
    _check_arguments(model, config, filter_fn)
    report = ConversionReport(config)
    chosen: list[tuple[str, nn.Module]] = []
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, SDGPModule):
            fix = "Call sdgp.revert_(model) first, or convert only the new part."
            got = f"one whose layer {name or '(root)'!r} is converted already"
            raise value_error("convert_", "model", "unconverted", got, fix)
        reason = _reason_against(module, name, config, filter_fn, include_heads)
        if reason is None:
            chosen.append((name, module))
        elif reason:
            report.skipped[name] = reason
        if reason != "":
            report._kinds[name] = type(module).__name__
    if not chosen:
        _raise_nothing_matched(report)
    for name, module in chosen:
        adopt_(module, config, name or type(module).__name__)
        report.converted.append(name)
    return report


def revert_(model: nn.Module) -> list[str]:
    """Turn every converted layer of a model back into its plain class, in place.

    Args:
        model: any module, converted or not.

    Returns:
        Names of the layers that were reverted.

    Raises:
        TypeError: something else, such as ``fully_shard``, changed a layer's class since it was
            converted. The model is then unchanged.
    """
    layers = _layers(unwrapped(model))
    for _, module in layers:
        check_releasable("revert_", module)
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
    layers = _layers(unwrapped(model))
    if not layers:
        fix = "Call sdgp.convert_(model) first."
        raise value_error("set_enabled_", "model", "converted", "one without SDGP layers", fix)
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


def _layers(model: nn.Module) -> list[tuple[str, SDGPModule]]:
    return [(n, mod) for n, mod in model.named_modules() if isinstance(mod, SDGPModule)]


def _check_arguments(model: object, config: object, filter_fn: object) -> None:
    if not isinstance(model, nn.Module):
        fix = "Pass the model itself."
        raise type_error("convert_", "model", "an nn.Module", type(model).__name__, fix)
    check_config("convert_", config)
    if filter_fn is not None and not callable(filter_fn):
        fix = "Pass a function of (module, fqn)."
        raise type_error("convert_", "filter_fn", "callable", type(filter_fn).__name__, fix)


def _reason_against(
    module: nn.Module,
    name: str,
    config: SDGPConfig,
    filter_fn: FilterFn | None,
    include_heads: bool,
) -> str | None:
    """Return None to convert, "" for a module that is none of our kinds, else why not."""
    if sdgp_class_of(module) is None:
        return _why_not_convertible(module)
    if filter_fn is not None:
        return None if filter_fn(module, name) else "left out by filter_fn"
    if not include_heads and is_head(name):
        return "makes the model's outputs by its name; include_heads=True converts it"
    reads, reduced = _channels(module)
    if reads <= STEM_CHANNELS:
        return f"reads {reads} channels, so it stands at the input and needs no grad_input"
    if config.prunes and reduced % config.m:
        return f"reduces over {reduced} outputs, no multiple of m = {config.m}"
    return None


def _why_not_convertible(module: nn.Module) -> str:
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its forward is never called: nn.MultiheadAttention reads its weight"
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return ""
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


def _channels(module: nn.Module) -> tuple[int, int]:
    """Return (channels read, outputs that one product of grad_input reduces over)."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels // module.groups
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, nn.Parameter)  # Conv1D is the only other kind
    return weight.shape[0], weight.shape[1]


def _raise_nothing_matched(report: ConversionReport) -> None:
    seen = "; ".join(f"{name or '(root)'}: {why}" for name, why in report.skipped.items())
    got = f"one that matched none of: {seen}" if seen else "a model without such layers"
    fix = "Widen filter_fn, or pass a model with nn.Linear, nn.Conv2d or Conv1D layers."
    raise value_error("convert_", "filter_fn", "a filter that matches a layer", got, fix)
