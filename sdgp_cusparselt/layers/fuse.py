"""fuse_: the layers of a converted model whose gradient an activation makes, in place."""

from collections.abc import Iterator

from torch import Tensor, nn

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.layers.activations import is_activation, spelling_of_module
from sdgp_cusparselt.layers.chains import Child, Gated, Link, chain_of
from sdgp_cusparselt.layers.convert import converted_layers, unwrapped
from sdgp_cusparselt.layers.fused_modules import (
    Fused,
    FusedModule,
    Fusion,
    Step,
    check_unfusable,
    fuse_module_,
    is_watched,
    obstacle,
    unfuse_module_,
)
from sdgp_cusparselt.layers.modules import SDGPModule
from sdgp_cusparselt.layers.plain import ORDINARY
from sdgp_cusparselt.layers.report import FusionReport, grouped
from sdgp_cusparselt.layers.shards import is_sharded

_ALONE = "no activation follows it in its module"
_MODULE = "its module cannot be fused"
#: Names of functions that a forward which applies an activation itself uses.
_FUNCTIONS = frozenset(("gelu", "relu", "silu"))


def fuse_(model: nn.Module) -> FusionReport:
    """Let the activations of a converted model make gradients that are packed at once, in place.

    grad_output = upstream * mask * act'(pre)   is made and packed by one kernel, so a linear layer
    that an activation follows is pruned without a pass of its own over its gradient.

    Found are the layers of every module whose forward is a chain of its children: a linear layer,
    an activation (GELU, its tanh form, SiLU, ReLU, ReLU squared) and perhaps a dropout, or the
    activation of one linear layer times another one. Such are nn.Sequential and the MLPs of GPT-2,
    BERT, ViT, Llama and Qwen. The forward's results stay the same to the bit, dropout's draws too.

    Args:
        model: converted, wrapped or not, and perhaps fused already: then it is read anew.

    Returns:
        What was fused, and why the other converted layers were not.

    Raises:
        TypeError: model is no module, or something else changed a fused module's class since.
        ValueError: it has no converted layer, or none of them can be fused. It is then not fused.

    Note:
        Parameters, names and the module tree stay; ``revert_`` undoes it together with the
        conversion. Hooks on a layer or activation in the chain, also later ones, let a module run
        its own forward. Wherever no gradient is packed, on a CPU or where a layer stays plain, the
        gradients are those of the separate layers within one rounding of their dtype.
    """
    layers = dict(converted_layers("fuse_", model))
    root = unwrapped(model)
    for module in root.modules():
        if isinstance(module, FusedModule):
            check_unfusable("fuse_", module)
    report, plans = _planned(root)
    for name, layer in layers.items():
        report.kinds[name] = layer.sdgp_dense_class.__name__
        if name not in report.fused:
            report.skipped.setdefault(name, _ALONE)
    report.skipped = {name: report.skipped[name] for name in layers if name in report.skipped}
    if not plans:
        groups = grouped(report.skipped, lambda name: ("", report.skipped[name]))
        got = "; ".join(f"{group.title}: {group.backward}" for group in groups)
        fix = "Only a linear layer that an activation follows has something to fuse."
        raise value_error("fuse_", "model", "one with a layer to fuse", got, fix)
    for name, module in list(root.named_modules()):
        if isinstance(module, FusedModule):
            unfuse_module_(module)
        if name in plans:
            fuse_module_(module, plans[name])
            report.modules.append(name)
    return report


def _planned(root: nn.Module) -> tuple[FusionReport, dict[str, Fusion]]:
    """Return what of a model can be fused, and how each of its modules then runs."""
    report, plans = FusionReport(), dict[str, Fusion]()
    # At rest the weights of both are shards; FSDP gathers its own before the forward.
    parallel = not any(kind.__name__ == "FSDPModule" for m in root.modules() for kind in _kinds(m))
    for name, module in root.named_modules():
        if isinstance(module, SDGPModule) or not _may_activate(module):
            continue
        prefix = f"{name}." if name else ""
        steps, apart = _steps(module, parallel)
        report.skipped.update((prefix + layer, reason) for layer, reason in apart.items())
        fusion = Fusion(tuple(steps), tuple(module._modules))
        if fusion.fused:
            plans[name] = fusion
        for step in fusion.fused:
            report.fused.update((prefix + layer, step.producer) for layer in step.layers)
    return report, plans


def _kinds(module: nn.Module) -> tuple[type, ...]:
    return type(module).__mro__


def _may_activate(module: nn.Module) -> bool:
    """Whether a module may apply an activation itself; only then its forward is traced."""
    forward = getattr(_kind(module).forward, "__code__", None)
    if forward is not None and _FUNCTIONS & set(forward.co_names):
        return True
    return any(is_activation(child) for _, child in _near(module))


def _near(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what a module's own forward may call: its children, and those of its containers."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from ((f"{name}.{inner}", part) for inner, part in _near(child))
        else:
            yield name, child


def _kind(module: nn.Module) -> type[nn.Module]:
    """Return the class whose forward says what a module does."""
    return module.sdgp_unfused_class if isinstance(module, FusedModule) else type(module)


def _steps(module: nn.Module, parallel: bool) -> tuple[list[Step], dict[str, str]]:
    """Return what a module runs once it is fused, and why which of its layers stays apart."""
    chain, apart = chain_of(module, _kind(module)), dict[str, str]()
    if isinstance(chain, str):
        own = (name for name, child in _near(module) if isinstance(child, SDGPModule))
        return [], {name: f"{_MODULE}: {chain}" for name in own}
    steps: list[Step] = []
    rest = list(chain)
    while rest:
        link = rest.pop(0)
        names = _layers_of(link)
        if not any(_holds_converted(module, name) for name in names):
            steps.append(link)
            continue
        found = _fused(module, link, rest, parallel)
        if isinstance(found, Fused):
            del rest[: (isinstance(link, Child)) + (found.dropout is not None)]
        else:
            apart.update((name, found) for n in names for name in _converted(module, n))
        steps.append(found if isinstance(found, Fused) else link)
    return steps, apart


def _fused(module: nn.Module, link: Link, rest: list[Link], parallel: bool) -> Fused | str:
    """Return a linear link fused with the activation that follows it, or why it is not."""
    names = _layers_of(link)
    activation = link.activation if isinstance(link, Gated) else (rest[0] if rest else None)
    after = rest if isinstance(link, Gated) else rest[1:]
    if activation is None:
        return "nothing follows it in its module"
    if isinstance(activation, Gated):
        return "no activation follows it"
    name: str | None = None
    kind: type[nn.Module] | None = None
    if isinstance(activation, Child):
        name, child = activation.name, module.get_submodule(activation.name)
        kind, spelling = type(child), spelling_of_module(child)
        if spelling is None:
            return f"a {kind.__name__} follows it, which is no activation that is fused"
    else:
        spelling = activation.spelling
    step = Fused(names, spelling, name, kind, _dropout(module, after))
    return _reason_against(module, step, parallel) or step


def _dropout(module: nn.Module, after: list[Link]) -> str | None:
    """Return the name of a dropout that comes next, or None."""
    if not after or not isinstance(after[0], Child):
        return None
    child = module.get_submodule(after[0].name)
    return after[0].name if type(child) is nn.Dropout and not is_watched(child) else None


def _reason_against(module: nn.Module, step: Fused, parallel: bool) -> str | None:
    reason = obstacle(module, step)
    if reason is not None:
        return reason
    for name in step.layers:
        layer = module.get_submodule(name)
        assert isinstance(layer, SDGPModule)  # or there were an obstacle
        config, weight = layer.sdgp_base_config, layer.weight
        if not config.prunes and config.grad_weight == "dense" and config.schedule is None:
            return "it prunes nothing"
        if isinstance(weight, Tensor) and type(weight) not in ORDINARY:
            if not is_sharded(weight):
                return f"its weight is a {type(weight).__name__}"
            if parallel:
                return "its weight is sharded, and tensor-parallel layers are not fused"
    return None


def _layers_of(link: Link) -> tuple[str, ...]:
    if isinstance(link, Gated):
        return link.gate, link.up
    return (link.name,) if isinstance(link, Child) else ()


def _converted(module: nn.Module, name: str) -> list[str]:
    """Return the converted layers that a child is or holds, which adapters do."""
    inner = module.get_submodule(name).named_modules(prefix=name)
    return [path for path, part in inner if isinstance(part, SDGPModule)]


def _holds_converted(module: nn.Module, name: str) -> bool:
    return bool(_converted(module, name))
