"""Converting whole models: what changes, what must not, and what is refused."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.layers.convert import is_head


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 32, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(32, 30, 1),
        nn.Conv2d(30, 32, 1),
        nn.Conv2d(32, 32, 3, groups=32),
        nn.Flatten(),
        nn.Linear(32 * 36, 24),
    )


def names(model: nn.Module) -> list[str]:
    return [n for n, mod in model.named_modules() if isinstance(mod, sdgp.nn.SDGPModule)]


def test_the_default_filter_and_its_reasons() -> None:
    model = small_net()
    report = sdgp.convert_(model)
    assert report.converted == names(model) == ["1", "3", "6"]
    assert "reads 3 channels" in report.skipped["0"]
    assert "reduces over 30 outputs, no multiple of m = 4" in report.skipped["2"]
    assert "reduces over 1 outputs" in report.skipped["4"]
    table = str(report)
    for word in ("3 converted, 3 plain", "SDGP mvue 2:4", "Conv2d", "pruned", "reads 3"):
        assert word in table


@pytest.mark.parametrize(
    "name, head",
    [
        ("lm_head", True),
        ("head.fc", True),
        ("classifier.1", True),
        ("classifier.dense", True),
        ("model.score", True),
        ("fc", True),
        ("encoder.fc1", False),
        ("layers.0.mlp.c_fc", False),
        ("overhead", False),
        ("", False),
    ],
)
def test_heads_by_name(name: str, head: bool) -> None:
    assert is_head(name) is head


def test_heads_are_skipped_unless_included() -> None:
    model = nn.ModuleDict({"body": nn.Linear(16, 16), "classifier": nn.Linear(16, 8)})
    report = sdgp.convert_(model, sdgp.SDGPConfig(prune="magnitude"))
    assert report.converted == ["body"]
    assert "include_heads=True" in report.skipped["classifier"]
    sdgp.revert_(model)
    assert sdgp.convert_(model, include_heads=True).converted == ["body", "classifier"]


def test_a_filter_decides_alone() -> None:
    model = small_net()
    report = sdgp.convert_(model, filter_fn=lambda mod, fqn: isinstance(mod, nn.Conv2d))
    assert report.converted == ["0", "1", "2", "3", "4"]
    assert report.skipped == {"6": "left out by filter_fn"}


def test_identity_of_everything_that_others_hold() -> None:
    model = small_net().double().train()
    model[6].weight.requires_grad_(False)
    calls = []
    model[1].register_forward_hook(lambda *a: calls.append("forward"))
    model[1].register_full_backward_hook(lambda *a: calls.append("backward"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = dict(model.named_parameters())
    modules = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())

    sdgp.convert_(model, sdgp.SDGPConfig(prune="magnitude"))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
    assert all(modules[k] is mod for k, mod in model.named_modules())
    assert model.state_dict().keys() == state.keys()
    assert model[6].weight.requires_grad is False and model[1].weight.dtype == torch.float64
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    assert calls == ["forward", "backward"]
    optimizer.step()
    assert not torch.equal(model[1].weight, state["1.weight"])

    assert sdgp.revert_(model) == ["1", "3", "6"]
    assert [type(mod) for mod in model] == [type(mod) for mod in small_net()]
    assert all("sdgp" not in key for mod in model.modules() for key in vars(mod))
    assert all(dict(model.named_parameters())[k] is before[k] for k in before)
    model.load_state_dict(state)


def test_a_root_layer_is_converted_in_place() -> None:
    layer = nn.Linear(8, 8)
    assert sdgp.convert_(layer, sdgp.SDGPConfig(prune="magnitude")).converted == [""]
    assert isinstance(layer, sdgp.nn.SDGPLinear) and isinstance(layer, nn.Linear)


def test_disabled_layers_are_dense_bit_for_bit() -> None:
    model, x = small_net(), torch.randn(2, 3, 8, 8)

    def grads() -> list[torch.Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    dense = grads()
    sdgp.convert_(model, sdgp.SDGPConfig(prune="magnitude"))
    pruned = grads()
    assert not torch.equal(pruned[0], dense[0])
    assert sdgp.set_enabled_(model, False) == ["1", "3", "6"]
    assert all(torch.equal(a, b) for a, b in zip(grads(), dense, strict=True))
    assert "disabled" in repr(model[1])
    sdgp.set_enabled_(model, True)
    assert all(torch.equal(a, b) for a, b in zip(grads(), pruned, strict=True))
    with torch.no_grad():
        assert model(x).grad_fn is None


def test_forward_is_the_dense_one_bit_for_bit() -> None:
    model, x = small_net(), torch.randn(2, 3, 8, 8)
    dense = model(x)
    sdgp.convert_(model, sdgp.SDGPConfig(prune="magnitude"))
    assert torch.equal(model(x), dense)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same"], ids=str)
def test_padding_modes(mode: str, padding: int | tuple[int, int] | str) -> None:
    layer = nn.Conv2d(8, 16, (3, 2), padding=padding, padding_mode=mode)
    twin = copy.deepcopy(layer)
    sdgp.convert_(layer, sdgp.SDGPConfig(prune="magnitude"))
    x, y = (torch.ones(2, 8, 6, 6).requires_grad_() for _ in range(2))
    ours, dense = layer(x), twin(y)
    assert torch.equal(ours, dense)
    grad_output = torch.randn_like(ours)
    ours.backward(grad_output)
    dense.backward(sdgp.prune(grad_output, dim=1))
    torch.testing.assert_close(x.grad, y.grad)


def test_deepcopy_and_pickle() -> None:
    model = small_net()
    sdgp.convert_(model, sdgp.SDGPConfig(prune="magnitude", n=1))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    for twin in copies:
        assert names(twin) == names(model)
        assert twin[1].weight is not model[1].weight
        assert twin[1].sdgp_record is not model[1].sdgp_record
        twin(x).sum().backward()
        assert torch.equal(twin[1].weight.grad, model[1].weight.grad)
        sdgp.revert_(twin)
        assert names(twin) == [] and names(model)


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model[1].weight = model[0].weight
    sdgp.convert_(model, sdgp.SDGPConfig(prune="magnitude"))
    assert model[1].weight is model[0].weight
    model(torch.randn(4, 16)).sum().backward()
    shared = nn.Linear(8, 8)
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    assert sdgp.convert_(twice, sdgp.SDGPConfig(prune="magnitude")).converted == ["0"]
    assert twice[0] is twice[2]


def test_multihead_attention_keeps_its_projection() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32)
    report = sdgp.convert_(model, sdgp.SDGPConfig(prune="magnitude"), preset="all")
    assert report.converted == ["linear1", "linear2"]
    assert "forward is never called" in report.skipped["self_attn.out_proj"]


def test_subclasses_are_left_alone_and_named() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubling(8, 8), nn.Linear(8, 8))
    report = sdgp.convert_(model, sdgp.SDGPConfig(prune="magnitude"))
    assert report.converted == ["1"]
    assert "Doubling is a subclass" in report.skipped["0"]


def test_from_dense_and_back_share_parameters() -> None:
    dense = nn.Linear(8, 16)
    layer = sdgp.nn.SDGPLinear.from_dense(dense, sdgp.SDGPConfig(prune="magnitude"))
    assert type(dense) is nn.Linear and layer.weight is dense.weight
    assert "in_features=8" in repr(layer) and "sdgp=magnitude 2:4" in repr(layer)
    plain = layer.to_dense()
    assert type(plain) is nn.Linear and plain.weight is dense.weight
    assert isinstance(layer, sdgp.nn.SDGPLinear)
    with pytest.raises(TypeError, match="SDGPConv2d.from_dense: module must be"):
        sdgp.nn.SDGPConv2d.from_dense(dense, sdgp.SDGPConfig(prune="magnitude"))
    with pytest.raises(TypeError, match="config must be an SDGPConfig"):
        sdgp.nn.SDGPLinear.from_dense(dense, None)


def unchanged(model: nn.Module) -> bool:
    return not names(model) and all("sdgp" not in k for mod in model.modules() for k in vars(mod))


def test_a_filter_that_matches_nothing_says_what_it_saw() -> None:
    model = small_net()
    with pytest.raises(ValueError, match="convert_: filter_fn must be") as caught:
        sdgp.convert_(model, filter_fn=lambda mod, fqn: False)
    assert "6: left out by filter_fn" in str(caught.value)
    assert unchanged(model)
    with pytest.raises(ValueError, match="a model without such layers"):
        sdgp.convert_(nn.ReLU())


def test_converting_twice_is_refused_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sdgp.convert_(model[1])
    with pytest.raises(ValueError, match="'1' is converted already.*revert_"):
        sdgp.convert_(model, sdgp.SDGPConfig(prune="magnitude"))
    assert names(model) == ["1"] and type(model[0]) is nn.Linear


def test_a_filter_that_raises_leaves_the_model_alone() -> None:
    def bad(mod: nn.Module, fqn: str) -> bool:
        if fqn == "6":
            raise KeyError(fqn)
        return True

    model = small_net()
    with pytest.raises(KeyError):
        sdgp.convert_(model, filter_fn=bad)
    assert unchanged(model)


@pytest.mark.parametrize(
    "args, kwargs, words",
    [
        (("model",), {}, "model must be an nn.Module, got str"),
        ((nn.Linear(8, 8), 2), {}, "config must be an SDGPConfig, got int"),
        ((nn.Linear(8, 8), {"n": 2}), {}, r"config\['n'\] must be an SDGPConfig or None, got int"),
        ((nn.Linear(8, 8), {3: None}), {}, "config must be keyed by strings, got 3"),
        ((nn.Linear(8, 8),), {"filter_fn": "conv"}, "filter_fn must be callable, got str"),
    ],
)
def test_bad_types(args: tuple, kwargs: dict, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        sdgp.convert_(*args, **kwargs)


def test_set_enabled_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="one without SDGP layers"):
        sdgp.set_enabled_(nn.Linear(8, 8), True)
    layer = nn.Linear(8, 8)
    sdgp.convert_(layer, sdgp.SDGPConfig(prune="magnitude"))
    with pytest.raises(TypeError, match="enabled must be a bool"):
        sdgp.set_enabled_(layer, "yes")
    assert sdgp.revert_(nn.ReLU()) == []
