"""fuse_: what it finds, what it leaves alone and why, and that nobody sees the difference."""

import argparse
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.diagnostics import GradientDiagnostics
from sdgp_cusparselt.integrations import timm
from sdgp_cusparselt.integrations.driver import Driver
from sdgp_cusparselt.layers.fused_modules import FusedModule
from sdgp_cusparselt.planner.models import load

MAGNITUDE = sdgp.SDGPConfig(prune="magnitude")
MVUE = sdgp.SDGPConfig(prune="mvue", grad_weight="sparse")


class Gated(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 32), nn.Linear(16, 32, bias=False)
        self.act = nn.SiLU() if act is None else act
        self.drop, self.down = nn.Dropout(0.2), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.gate(x)) * self.up(x)))


class Named(nn.Module):
    """Named as Llama's, and multiplied the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 32), nn.Linear(16, 32)
        self.down_proj, self.act_fn = nn.Linear(32, 16), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))


class Own(nn.Module):
    """Layers in a list, and an activation that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 16)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](x))
        x = F.gelu(self.layers[1](x), approximate="tanh")
        return self.layers[2](x)


class Twice(nn.Module):
    """Uses what comes before the activation once more."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        pre = self.up(x)
        return self.down(self.act(pre)) + pre


class Moody(nn.Module):
    """Is a plain chain in evaluation only."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.up(x))
        return self.down(hidden * 2 if self.training else hidden)


class Adapter(nn.Module):
    """Stands around a layer as PEFT's do."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.low = base_layer, nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.low(x).sum()


class OwnGELU(nn.GELU):
    """Computes something else, for all that one knows."""


def mlp(act: nn.Module | None = None) -> nn.Sequential:
    act = nn.GELU() if act is None else act
    return nn.Sequential(nn.Linear(16, 32), act, nn.Dropout(0.2), nn.Linear(32, 16))


def pair(model: nn.Module, config: sdgp.SDGPConfig = MAGNITUDE) -> tuple[nn.Module, nn.Module]:
    """Return a fused model, and the same unfused."""
    model = model.double()
    sdgp.convert_(model, config)
    fused = copy.deepcopy(model)
    sdgp.fuse_(fused)
    return fused, model


def run(model: Callable[[Tensor], Tensor], parameters: nn.Module) -> list[Tensor]:
    """Return output and gradients of a step that always draws the same."""
    torch.manual_seed(3)
    x = torch.randn(4, 6, 16, dtype=torch.float64, requires_grad=True)
    parameters.zero_grad()
    output = model(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad.clone() for p in parameters.parameters())]


def assert_alike(fused: nn.Module, other: nn.Module) -> None:
    ours, others = run(fused, fused), run(other, other)
    assert torch.equal(ours[0], others[0])
    for one, two in zip(ours, others, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-11)


def nodes(model: nn.Module, x: Tensor | None = None) -> int:
    """Return how many fused nodes the graph of a model's output has."""
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True) if x is None else x
    seen, todo = set(), [model(x).grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return sum("Activated" in type(node).__name__ for node in seen)


MODELS = {
    "mlp": (mlp, {"0": "gelu and dropout"}),
    "relu": (lambda: mlp(nn.ReLU()), {"0": "relu and dropout"}),
    "tanh": (lambda: mlp(nn.GELU("tanh")), {"0": "gelu_tanh and dropout"}),
    "gated": (Gated, {"gate": "silu gate and dropout", "up": "silu gate and dropout"}),
    "turned": (Named, {"gate_proj": "silu gate", "up_proj": "silu gate"}),
    "functions": (Own, {"layers.0": "relu", "layers.1": "gelu_tanh"}),
    "nested": (lambda: nn.Sequential(mlp(), Gated()), None),
    "deep": (
        lambda: nn.Sequential(nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 16), nn.ReLU()),
        {"0": "silu", "2": "relu"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", [MAGNITUDE, MVUE], ids=["magnitude", "mvue"])
def test_what_is_found_computes_the_same(name: str, config: sdgp.SDGPConfig) -> None:
    if name == "turned":  # autograd reaches the gate first there, so it draws first
        config = MAGNITUDE
    make, expected = MODELS[name]
    model = make()
    fused, other = pair(model, config)
    report = sdgp.fuse_(fused)
    assert expected is None or report.fused == expected
    assert set(report.fused) | set(report.skipped) == set(report.kinds)
    assert not set(report.fused) & set(report.skipped)
    for training in (True, False):
        fused.train(training), other.train(training)
        assert_alike(fused, other)
    assert nodes(fused) == len(
        set(report.fused) - {n for n in report.fused if n.endswith(("up", "up_proj"))}
    )
    assert nodes(other) == 0


def test_an_activation_in_place() -> None:
    fused, other = pair(mlp(nn.ReLU()))
    fused[1].inplace = fused[2].inplace = True
    assert nodes(fused) == 1
    assert_alike(fused, other)


def test_module_tree_parameters_and_keys_stay() -> None:
    model = nn.Sequential(mlp(), Gated())
    names = [name for name, _ in model.named_modules()]
    parameters, state = dict(model.named_parameters()), list(model.state_dict())
    children = list(model.modules())
    sdgp.convert_(model, MAGNITUDE)
    sdgp.fuse_(model)
    assert [name for name, _ in model.named_modules()] == names
    assert all(one is two for one, two in zip(model.modules(), children, strict=True))
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert list(model.state_dict()) == state
    assert isinstance(model[0], nn.Sequential) and isinstance(model[1], Gated)
    assert type(model[1]).__name__ == "Gated" and "sdgp=fused gate, up" in repr(model)


def test_it_is_undone_and_done_again() -> None:
    model = nn.Sequential(mlp(), Gated())
    kinds = [type(m) for m in model.modules()]
    sdgp.convert_(model, MAGNITUDE)
    first = sdgp.fuse_(model)
    second = sdgp.fuse_(model)
    assert first == second and first.modules == ["0", "1"]
    fused = [type(m) for m in model.modules()]
    sdgp.revert_(model)
    assert [type(m) for m in model.modules()] == kinds
    assert not any("sdgp" in key for m in model.modules() for key in vars(m))
    sdgp.convert_(model, MAGNITUDE)
    sdgp.fuse_(model)
    assert [type(m) for m in model.modules()] == fused


def test_a_part_that_is_reverted_leaves_the_rest_fused() -> None:
    fused, other = pair(nn.Sequential(mlp(), Gated()))
    for model in (fused, other):
        sdgp.revert_(model[0])
        sdgp.revert_(model[1].gate)
    assert type(fused[0]) is nn.Sequential and type(fused[1].gate) is nn.Linear
    assert nodes(fused) == 0
    assert_alike(fused, other)


def hooked(act: nn.Module) -> nn.Module:
    act.register_forward_hook(lambda *_: None)
    return act


def replaced() -> nn.Module:
    model = mlp()
    model.forward = lambda x: x  # type: ignore[method-assign]
    return model


def with_hook_on_layer() -> nn.Module:
    model = mlp()
    model[0].register_forward_pre_hook(lambda *_: None)
    return model


def with_frozen_forward() -> nn.Module:
    model = mlp()
    model[1].forward = F.gelu  # type: ignore[method-assign]
    return model


REASONS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "hook on the activation": (lambda: mlp(hooked(nn.GELU())), "0", "hooks into its 1"),
    "hook on the layer": (with_hook_on_layer, "0", "something hooks into it"),
    "another forward of a child": (with_frozen_forward, "0", "hooks into its 1"),
    "another forward": (replaced, "0", "its forward was replaced"),
    "activation": (lambda: mlp(nn.Tanh()), "0", "a Tanh follows it"),
    "subclass": (lambda: mlp(OwnGELU()), "0", "a OwnGELU follows it"),
    "gate": (lambda: Gated(nn.Sigmoid()), "up", "a Sigmoid follows it"),
    "last": (mlp, "3", "nothing follows it"),
    "used twice": (Twice, "up", "more than a chain of its layers"),
    "in training": (Moody, "up", "another in training than in evaluation"),
    "dropout first": (
        lambda: nn.Sequential(nn.Linear(16, 32), nn.Dropout(), nn.ReLU(), nn.Linear(32, 16)),
        "0",
        "a Dropout follows it",
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU()),
        "0",
        "SDGPConv2d is no converted linear layer",
    ),
    "adapter": (
        lambda: nn.Sequential(Adapter(nn.Linear(16, 32)), nn.ReLU()),
        "0.base_layer",
        "a Adapter is no converted linear layer",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_left_alone_says_why(name: str) -> None:
    make, layer, reason = REASONS[name]
    model = nn.ModuleDict({"it": make(), "other": mlp()})
    sdgp.convert_(model, MAGNITUDE)
    report = sdgp.fuse_(model)
    assert reason in report.skipped[f"it.{layer}"]
    assert "other.0" in report.fused and f"it.{layer}" not in report.fused


def test_layers_that_prune_nothing_stay_apart() -> None:
    model = nn.ModuleDict({"a": Gated(), "b": mlp(), "c": mlp()})
    off = sdgp.SDGPConfig(prune="none")
    later = sdgp.SDGPConfig(schedule=sdgp.Schedule(total_steps=4, warmup=1))
    sdgp.convert_(model, {"a.up": off, "c.*": later, "*": MAGNITUDE, "b.0": off})
    report = sdgp.fuse_(model)
    assert report.skipped["a.gate"] == report.skipped["a.up"] == "it prunes nothing"
    assert set(report.fused) == {"b.0", "c.0"}, "the first pattern counts, and a schedule may prune"


def test_a_gate_of_which_one_layer_is_plain_stays_apart() -> None:
    model = nn.Sequential(Gated(), mlp())
    sdgp.convert_(model, {"0.up": None, "*": MAGNITUDE})
    report = sdgp.fuse_(model)
    assert "a Linear is no converted linear layer" in report.skipped["0.gate"]


def test_it_fails_loudly() -> None:
    with pytest.raises(ValueError, match="fuse_: model must be converted"):
        sdgp.fuse_(mlp())
    with pytest.raises(TypeError, match="fuse_: model must be an nn.Module, got str"):
        sdgp.fuse_("model")  # type: ignore[arg-type]
    alone = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    sdgp.convert_(alone, MAGNITUDE)
    with pytest.raises(ValueError, match="fuse_: model must be one with a layer to fuse, got 0: a"):
        sdgp.fuse_(alone)
    assert type(alone) is nn.Sequential
    fused, _ = pair(mlp())
    fused.__class__ = type("Changed", (type(fused),), {})
    for function in (sdgp.fuse_, sdgp.revert_):
        with pytest.raises(TypeError, match=f"{function.__name__}: module must be a fused module"):
            function(fused)
    assert isinstance(fused[0], sdgp.nn.SDGPLinear) and isinstance(fused, FusedModule)


def test_later_hooks_see_what_they_would_unfused() -> None:
    fused, other = pair(mlp())
    fused.eval(), other.eval()
    for target in ("0", "1"):
        seen: list[list[Tensor]] = []
        for model in (fused, other):
            part, own = model.get_submodule(target), list[Tensor]()
            handle = part.register_forward_hook(lambda m, args, out, own=own: own.append(out))
            if model is fused:
                assert nodes(fused) == 0
                own.clear()
            run(model, model)
            handle.remove()
            seen.append(own)
        assert len(seen[0]) == 1 and torch.equal(seen[0][0], seen[1][0])
    assert nodes(fused) == 1


def test_hooks_for_all_modules_see_every_call() -> None:
    fused, _ = pair(mlp())
    kinds: list[str] = []
    hook = lambda module, args, output: kinds.append(type(module).__name__)
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        fused(torch.randn(4, 16, dtype=torch.float64))
    finally:
        handle.remove()
    assert kinds == ["SDGPLinear", "GELU", "Dropout", "SDGPLinear", "Sequential"]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "another activation": lambda m: m.__setitem__(1, nn.Tanh()),
    "another layer": lambda m: m.__setitem__(0, nn.Linear(16, 32).double()),
    "another child": lambda m: m.append(nn.Tanh()),
    "switched off": lambda m: sdgp.set_enabled_(m, False),
    "a mask on the weight": lambda m: m[0].register_buffer("mask", torch.ones(32, 16)),
    "no dropout": lambda m: m.__delitem__(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_changes_runs_its_own_forward(change: str) -> None:
    fused, other = pair(mlp())
    for model in (fused, other):
        torch.manual_seed(0)
        CHANGES[change](model)
    assert nodes(fused) == 0
    assert_alike(fused, other)


def test_slices_of_a_sequential_are_not_fused() -> None:
    fused, other = pair(mlp())
    assert isinstance(fused[:2], nn.Sequential) and len(fused[:2]) == 2
    x = torch.randn(4, 16, dtype=torch.float64)
    assert torch.equal(fused[:2](x), other[:2](x))
    assert torch.equal(copy.deepcopy(fused[:2])(x), other[:2](x))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_are_fused(way: str) -> None:
    fused, other = pair(nn.Sequential(mlp(), Gated()))
    if way == "deepcopy":
        twin = copy.deepcopy(fused)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    else:
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
    assert nodes(twin) == 2
    assert_alike(twin, other)
    sdgp.revert_(twin)
    assert type(twin[1]) is Gated and nodes(fused) == 2


def test_a_keyword_is_taken_as_the_module_takes_it() -> None:
    fused, other = pair(Gated())
    x = torch.randn(4, 16, dtype=torch.float64)
    fused.eval(), other.eval()
    assert torch.equal(fused(x=x), other(x=x))
    for wrong in ((), (x, x)):
        with pytest.raises(TypeError, match="forward"):
            fused(*wrong)


@pytest.mark.parametrize("name", ["mlp", "gated", "functions"])
def test_compiled_whole(name: str) -> None:
    fused, _ = pair(MODELS[name][0](), MAGNITUDE.replace(grad_weight="dense"))
    fused.eval()
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for one, two in zip(run(compiled, fused), run(fused, fused), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-11)


def test_compiled_code_is_fused() -> None:
    fused, _ = pair(mlp())
    texts: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        texts.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    compiled(torch.randn(4, 16, dtype=torch.float64, requires_grad=True))
    (text,) = texts
    assert "aten.gelu_backward" in text, "the activation's backward is in that of the node"
    assert text.count("sdgp.linear_grad_input") and "native_dropout" in text


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    fused, other = pair(nn.Sequential(mlp(), Gated()), MVUE)
    wrapped = lambda x: checkpoint(fused, x, use_reentrant=reentrant)
    for one, two in zip(run(wrapped, fused), run(other, other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype: torch.dtype) -> None:
    fused, other = pair(nn.Sequential(mlp(), Gated()))
    fused.float().eval(), other.float().eval()
    x, found = torch.randn(4, 6, 16), []
    for model in (fused, other):
        with torch.autocast("cpu", dtype=dtype):
            output = model(x.requires_grad_())
        output.float().square().sum().backward()
        found.append((output, [p.grad for p in model.parameters()]))
    (ours, grads), (theirs, others) = found
    assert ours.dtype == dtype and torch.equal(ours, theirs)
    assert all(one.dtype == torch.float32 for one in grads)
    # What no pruned gradient goes into: the last layer, and what reads the gate's own gradient.
    for one, two in list(zip(grads, others, strict=True))[4:]:
        assert (one - two).abs().max() <= 8 * torch.finfo(dtype).eps * two.abs().max()


def test_phases_of_a_schedule() -> None:
    schedule = sdgp.Schedule(total_steps=4, warmup=1, tail=1)
    fused, other = pair(mlp(), sdgp.SDGPConfig(schedule=schedule))
    keys, found = list(other.state_dict()), []
    assert list(fused.state_dict()) == keys
    for _ in range(4):
        found.append(nodes(fused))
        assert_alike(fused, other)
        for model in (fused, other):
            sdgp.step(model)
    assert found == [0, 1, 1, 0]


def test_records_bear_the_names_of_the_layers() -> None:
    config = sdgp.SDGPConfig(prune="mvue", telemetry_every=1)
    fused, other = pair(nn.ModuleDict({"a": mlp(), "b": Gated()}), config)
    tables, rows = [], []
    for model in (fused, other):
        diagnostics = GradientDiagnostics(model, draws=2)
        for part in ("a", "b"):
            run(model[part], model[part])
        rows.append([(r.layer, r.product, round(r.relative_l2, 6)) for r in diagnostics.collect(0)])
        layers = sdgp.telemetry(model).as_dict()["layers"]
        tables.append([(layer["layer"], layer["product"], layer["calls"]) for layer in layers])
    assert tables[0] == tables[1] and rows[0] == rows[1]
    assert [name for name, *_ in tables[0]] == ["a.0", "a.3", "b.gate", "b.up", "b.down"]


@pytest.mark.parametrize("preset", ["readers", "balanced"])
def test_presets(preset: Any) -> None:
    whole = nn.Sequential(Named())
    sdgp.convert_(whole, sdgp.SDGPConfig(prune="mvue"), preset=preset)
    report = sdgp.fuse_(whole)
    assert list(report.fused) == ["0.gate_proj", "0.up_proj"]
    assert ("0.down_proj" in report.skipped) == (preset == "balanced")


def test_trainers_fuse_where_they_convert() -> None:
    model, driver = mlp(), Driver(MAGNITUDE, fuse=True, preset="all")
    driver.convert(model)
    driver.convert(model)
    assert driver.fusion is not None and list(driver.fusion.fused) == ["0"]
    alone = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match="one with a layer to fuse"):
        Driver(MAGNITUDE, fuse=True).convert(alone)
    assert type(alone[0]) is nn.Linear
    parser = argparse.ArgumentParser()
    timm.add_arguments(parser)
    for flags, fused in ((["--sdgp", "mvue", "--sdgp-fuse"], True), (["--sdgp", "mvue"], False)):
        model = mlp()
        timm.convert_from(parser.parse_args(flags), model)
        assert isinstance(model, FusedModule) is fused


def test_traced_by_fx_the_children_stay_nodes() -> None:
    fused, other = pair(nn.Sequential(mlp(), Gated()))
    fused.eval(), other.eval()
    graph = torch.fx.symbolic_trace(fused)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert {"0.0", "0.1", "1.gate", "1.up", "1.act", "1.down"} <= set(targets)
    x = torch.randn(4, 16, dtype=torch.float64)
    assert torch.equal(graph(x), other(x))


LLAMA = """\
SDGP fused: 64 layers, 96 apart
fused with silu gate
  model.layers.*.mlp.gate_proj x 32     Linear
  model.layers.*.mlp.up_proj x 32       Linear
apart: no activation follows it in its module
  model.layers.*.self_attn.q_proj x 32  Linear
  model.layers.*.self_attn.k_proj x 32  Linear
  model.layers.*.self_attn.v_proj x 32  Linear
every layer: print(report.details())"""


def test_llama_fits_a_screen() -> None:
    model = load("llama-3-8b").model
    sdgp.convert_(model)
    report = sdgp.fuse_(model)
    assert str(report) == LLAMA
    assert repr(report) == "<FusionReport SDGP fused: 64 layers, 96 apart>"
    html = report._repr_html_()
    assert "model.layers.*.mlp.up_proj x 32" in html and "64 fused layers" in html
    assert len(report.details().splitlines()) == 1 + 2 + 160
