"""Products of pruned weights that run plain, other layers, masks and what is refused."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.masking import masked
from sdgp_cusparselt.layers.weight_masks import (
    set_weight_mask_,
)
from sdgp_cusparselt.tuning import store, timing
from tests.backends.weight_cases import (
    BOTH,
    INPUTS,
    OUTPUTS,
    WEIGHTS,
    check_layer,
    close,
    input_of,
    layer_of,
    reference,
    smallest,
)
from tests.emulator.control import Bad, Emulator


def timed_by(monkeypatch: pytest.MonkeyPatch, dense_us: float) -> None:
    """Let every sparse path take 10 us and torch's own product dense_us."""
    monkeypatch.setattr(
        timing,
        "HostTimer",
        lambda: lambda run, label: (run(), dense_us if "dense" in label else 10.0)[1],
    )


def test_where_it_is_slower_the_product_is_torchs_with_the_same_weight(
    emulated: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_by(monkeypatch, dense_us=5.0)
    layer = layer_of("linear", BOTH.replace(tune="first_use"), torch.bfloat16)
    x = input_of("linear", torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = layer(x)
        y.backward(torch.ones_like(y))
    w = sdgp.prune(layer.weight.detach())
    assert torch.equal(y, F.linear(x, w, layer.bias))
    assert torch.equal(x.grad, torch.ones_like(y) @ sdgp.prune(w, dim=0))
    assert dict(layer.sdgp_record.calls) == {("output", "plain"): 1, ("grad_input", "plain"): 1}


def test_a_decision_is_stored_and_holds_for_its_bucket(
    emulated: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_by(monkeypatch, dense_us=100.0)
    layer = layer_of("linear", WEIGHTS.replace(tune="first_use"), torch.bfloat16)
    for tokens in (128, 104, 97):
        x = torch.randn(tokens, INPUTS, dtype=torch.bfloat16)
        w = sdgp.prune(layer.weight.detach()).double()
        close(layer(x), x.double(), w.t(), x.dtype, layer.bias.detach().double())
    cache = store.default_cache()
    (decision,) = cache.decisions(emulated, torch.device("cpu"))
    assert decision.gemm.describe() == f"M={OUTPUTS} N=128 K={INPUTS} bfloat16 col to col"
    assert decision.rival == "linear" and "takes 10.0 us, linear 100.0 us" in decision.reason
    again = store.TuningCache(cache.folder).read(decision.key, emulated)
    assert again == decision
    assert layer.sdgp_record.calls == {("output", "sparse"): 3}


def test_a_wrong_algorithm_is_never_used(emulated: CusparseLtBackend, emulator: Emulator) -> None:
    emulator.bad_algorithm(0, Bad.ALWAYS_WRONG)
    layer = layer_of("linear", WEIGHTS.replace(on_unsupported="plain"), torch.bfloat16)
    x = torch.randn(64, INPUTS, dtype=torch.bfloat16)
    with pytest.warns(sdgp.SDGPFallbackWarning, match="output runs plain"):
        y = layer(x)
    assert torch.equal(y, F.linear(x, sdgp.prune(layer.weight.detach()), layer.bias))


def test_any_metadata_order_is_learned(
    emulated: CusparseLtBackend, emulator: Emulator, packs: list[bool]
) -> None:
    emulator.layout("random", 7)
    layer = nn.Linear(128, 256).bfloat16()
    sdgp.convert_(layer, BOTH)
    x = torch.randn(32, 128, dtype=torch.bfloat16, requires_grad=True)
    check_layer("linear", layer, x, *reference(layer))
    assert {way for _, way in layer.sdgp_record.calls} == {"sparse"}


@pytest.mark.parametrize(
    "conv, words",
    [
        (nn.Conv2d(INPUTS, OUTPUTS, 3, padding=1), "only an unpadded 1x1"),
        (nn.Conv2d(INPUTS, OUTPUTS, 1, stride=2), "a strided convolution would copy"),
        (nn.Conv2d(INPUTS, OUTPUTS, 1, groups=2), "the convolution has 2 groups"),
    ],
)
@pytest.mark.parametrize("config", [WEIGHTS, BOTH], ids=["once", "twice"])
def test_other_convolutions_use_the_masked_weight(
    emulated: CusparseLtBackend, conv: nn.Conv2d, words: str, config: sdgp.SDGPConfig
) -> None:
    conv = copy.deepcopy(conv).double()
    sdgp.convert_(conv, config.replace(on_unsupported="plain"))
    x = torch.randn(2, INPUTS, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    x.requires_grad_()
    with pytest.warns(sdgp.SDGPFallbackWarning, match=words):
        y = conv(x)
        y.square().sum().backward()
    w = sdgp.prune(conv.weight.detach(), dim=1).requires_grad_()
    twice = sdgp.prune(w.detach(), dim=0) if config is BOTH else w.detach()
    steps = conv.stride, conv.padding, conv.dilation, conv.groups
    assert torch.allclose(y, F.conv2d(x, w, conv.bias, *steps))
    other = x.detach().requires_grad_()
    F.conv2d(other, twice, None, *steps).backward(2 * y.detach())
    assert torch.allclose(x.grad, other.grad)
    F.conv2d(x.detach(), w, conv.bias, *steps).square().sum().backward()
    assert torch.allclose(conv.weight.grad, w.grad)


def test_masks_are_checked_and_leave_with_revert() -> None:
    layer = layer_of("linear", WEIGHTS.replace(backend="dense"), torch.float32)
    good = smallest(layer.weight, 1)
    set_weight_mask_(layer, good)
    held = layer.weight_mask
    wrong = [
        (TypeError, "weight_mask must be a bool tensor", good.float()),
        (ValueError, "weight_mask must be of the weight's shape", good.t()),
        (ValueError, "weight_mask must be 2:4 along dimension 1, got 4 of 4", good | True),
    ]
    for error, words, mask in wrong:
        with pytest.raises(error, match=words):
            set_weight_mask_(layer, mask)
    assert layer.weight_mask is held and torch.equal(held, good)
    assert set(layer.state_dict()) == {"weight", "bias", "weight_mask"}
    set_weight_mask_(layer, ~good)
    assert layer.weight_mask is held and torch.equal(held, ~good)
    twin = layer_of("linear", WEIGHTS.replace(backend="dense"), torch.float32)
    set_weight_mask_(twin, good)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(8, INPUTS)
    assert torch.equal(twin(x), layer(x))
    sdgp.revert_(layer)
    assert type(layer) is nn.Linear and set(layer.state_dict()) == {"weight", "bias"}
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_second_derivative_is_refused_and_func_transforms_compose() -> None:
    layer = layer_of("linear", WEIGHTS.replace(backend="dense"), torch.float32)
    x = torch.randn(4, INPUTS, requires_grad=True)
    grad = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(sdgp.SDGPError, match="second derivative"):
        grad.sum().backward()
    jacobian = torch.func.jacrev(layer)(x[0].detach())
    assert torch.allclose(jacobian, sdgp.prune(layer.weight.detach()))
    per_sample = torch.func.vmap(layer)(x.detach())
    assert torch.allclose(per_sample, layer(x.detach()))


def test_functional_masks_too() -> None:
    w, x = torch.randn(OUTPUTS, INPUTS), torch.randn(5, INPUTS)
    config = WEIGHTS.replace(backend="dense")
    mask = smallest(w, 1)
    kept = masked(w, mask, config)
    got = sdgp.functional.linear(x, w, config=config, masks=(mask, None))
    assert torch.equal(got, F.linear(x, kept))
    image = torch.randn(1, INPUTS, 3, 3)
    taps = w.view(OUTPUTS, INPUTS, 1, 1)
    found = sdgp.functional.conv2d(image, taps, config=config)
    assert torch.allclose(found, F.conv2d(image, sdgp.prune(taps, dim=1)))


def test_odd_widths_stay_dense_and_disabled_layers_are_torchs() -> None:
    model = nn.ModuleDict(
        {"odd": nn.Linear(30, 32), "narrow": nn.Linear(32, 30), "x": nn.Linear(32, 32)}
    )
    report = sdgp.convert_(model, BOTH.replace(backend="dense"))
    assert report.converted == ["x"]
    assert report.skipped["odd"] == "its weight has 30 inputs, no multiple of weight_m = 4"
    assert report.skipped["narrow"] == "its weight has 30 outputs, no multiple of weight_m = 4"
    sdgp.set_enabled_(model, False)
    x = torch.randn(3, 32)
    assert torch.equal(model["x"](x), F.linear(x, model["x"].weight, model["x"].bias))
