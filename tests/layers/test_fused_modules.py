"""Fused modules that are hooked, changed, copied, compiled, cast, checkpointed and scheduled."""

import argparse
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.diagnostics import GradientDiagnostics
from sdgp_cusparselt.integrations import timm
from sdgp_cusparselt.integrations.driver import Driver
from sdgp_cusparselt.layers.fused_modules import FusedModule
from sdgp_cusparselt.planner.models import load
from tests.layers.fuse_cases import (
    MAGNITUDE,
    MODELS,
    MVUE,
    Gated,
    Named,
    assert_alike,
    mlp,
    nodes,
    pair,
    run,
)


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
