"""fuse_: what it finds, what it leaves alone and why, and that nobody sees the difference."""

from collections.abc import Callable

import pytest
from torch import nn
from torch.nn import functional as F

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.layers.fused_modules import FusedModule
from tests.layers.fuse_cases import (
    MAGNITUDE,
    MODELS,
    MVUE,
    Adapter,
    Gated,
    Moody,
    OwnGELU,
    Twice,
    assert_alike,
    mlp,
    nodes,
    pair,
)


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


def test_layers_whose_weight_is_pruned_stay_apart() -> None:
    model = nn.Sequential(mlp(), mlp())
    sdgp.convert_(model, {"0.0": MAGNITUDE.replace(forward="sparse_weight"), "*": MAGNITUDE})
    report = sdgp.fuse_(model)
    assert report.skipped["0.0"] == "it holds more than a weight and a bias"
    assert list(report.fused) == ["1.0"]


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
