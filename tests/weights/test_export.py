"""Exported layers against integer and float references, on torch and on the emulator."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.layers.weight_masks import set_weight_mask_
from sdgp_cusparselt.packing.packed import Packed24
from sdgp_cusparselt.products import packed_weights
from sdgp_cusparselt.products.stored_weights import quantized
from sdgp_cusparselt.weights import packed_linear
from sdgp_cusparselt.weights.packed_linear import PackedLinear, from_portable, portable
from tests.emulator.control import Emulator
from tests.helpers import assert_product, product_bound

WIDE = sdgp.SDGPConfig(prune="none", forward="sparse_weight", backend="dense")
KINDS = ["linear", "conv2d", "conv1d"]
STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
STORED["fp8"] = torch.float8_e4m3fn


def layer_of(kind: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    layers = {"linear": nn.Linear(64, 96), "conv2d": nn.Conv2d(64, 96, 1), "conv1d": Conv1D(96, 64)}
    layer = layers[kind]
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer.to(dtype)


def weight_of(kind: str, layer: nn.Module) -> Tensor:
    """Return the weight [O, I], pruned."""
    weight = layer.weight.detach().flatten(1)
    return sdgp.prune(weight.t() if kind == "conv1d" else weight)


def input_of(kind: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (
        torch.randn(2, 64, 5, 3, dtype=dtype)
        if kind == "conv2d"
        else torch.randn(3, 7, 64).to(dtype)
    )


def rows(kind: str, x: Tensor) -> Tensor:
    x = x.movedim(1, -1) if kind == "conv2d" else x
    return x.reshape(-1, x.shape[-1])


@pytest.fixture(params=["torch", "emulator"])
def way(request: pytest.FixtureRequest) -> str:
    """Where products run: torch's own, or in C on the emulator of an Ada card."""
    if request.param == "emulator":
        request.getfixturevalue("emulated").machine.cpu_capability = (8, 9)
        request.getfixturevalue("emulator").arch(89)
    # Time nothing: which algorithm is fastest here says nothing.
    patch = request.getfixturevalue("monkeypatch")
    patch.setattr(packed_linear, "CONFIG", packed_linear.NARROW)
    return "sparse" if request.param == "emulator" else "plain"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_layers(way: str, kind: str, dtype: torch.dtype) -> None:
    layer = layer_of(kind, dtype)
    weight, x = weight_of(kind, layer), input_of(kind, dtype)
    report = sdgp.export_(layer, prune=True)
    assert list(report.exported) == [""] and isinstance(layer, PackedLinear)
    with torch.no_grad():
        y = layer(x)
    assert layer.sdgp_record.calls == {("output", way): 1}
    exact = rows(kind, x).double() @ weight.double().t()
    bias = layer.bias.detach().double()
    bound = product_bound(rows(kind, x), weight.t(), dtype)
    bound += torch.finfo(dtype).eps * (exact + bias).abs()
    assert ((rows(kind, y).double() - exact - bias).abs() <= bound).all()
    if kind == "linear" and way == "plain":  # torch's own function of the same numbers
        assert torch.equal(y, F.linear(x, weight, layer.bias))
    assert torch.equal(layer.dense(), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_layers_are_exact_integers(way: str, kind: str) -> None:
    layer = layer_of(kind)
    weight, x = weight_of(kind, layer), input_of(kind)
    sdgp.export_(layer, dtype="int8", prune=True)
    with torch.no_grad():
        y = rows(kind, layer(x))
    assert layer.sdgp_record.calls == {("output", way): 1}
    step = weight.float().abs().amax(1, keepdim=True) / 127
    whole = (weight.float() / step).round().long()
    tokens = rows(kind, x).float()
    token_step = tokens.abs().amax(1, keepdim=True) / 127
    sums = (tokens / token_step).round().long() @ whole.t()
    expected = sums.float() * token_step * step.t() + layer.bias.detach().float()
    assert torch.equal(y, expected.to(x.dtype))
    error = (y.float() - tokens @ weight.float().t() - layer.bias.float()).detach().norm()
    assert error < 0.02 * y.float().norm()


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_layers(way: str, kind: str) -> None:
    layer = layer_of(kind)
    weight, x = weight_of(kind, layer), input_of(kind)
    sdgp.export_(layer, dtype="fp8", prune=True)
    with torch.no_grad():
        y = rows(kind, layer(x))
    assert layer.sdgp_record.calls == {("output", way): 1}
    numbers, step = quantized(weight, torch.float8_e4m3fn)
    tokens, token_step = quantized(rows(kind, x), torch.float8_e4m3fn)
    left, right = tokens.double(), numbers.double().t()
    scale = token_step.double() * step.double().t()
    bias = layer.bias.detach().double()
    exact = (left @ right) * scale + bias
    # The sum in float32, two scalings and an addition in float32, and the result's own rounding.
    bound = product_bound(left, right, torch.float32) * scale
    bound += 4 * torch.finfo(torch.float32).eps * ((left @ right).abs() * scale + bias.abs())
    bound += torch.finfo(x.dtype).eps * exact.abs()
    assert ((y.double() - exact).abs() <= bound).all()


def test_quantized_rows() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    whole, scale = quantized(x, torch.int8)
    assert whole.tolist() == [[64, -127, 32, 0], [0, 0, 0, 0]]
    assert torch.equal(scale, torch.tensor([[2 / 127], [1.0]]))
    small, scale = quantized(x, torch.float8_e4m3fn)
    assert small.float().tolist() == [[224.0, -448.0, 112.0, 0.0], [0.0] * 4]


@pytest.mark.parametrize("dtype, share", [("bf16", 9 / 16), ("int8", 5 / 16), ("fp8", 5 / 16)])
def test_memory_is_counted(dtype: str, share: float) -> None:
    layer = nn.Linear(256, 128, bias=False).bfloat16()
    dense = layer.weight.numel() * 2
    report = sdgp.export_(layer, dtype=dtype, prune=True)
    scales = 4 * 128 if share < 0.5 else 0
    held = {*layer.parameters(), *layer.buffers()}
    assert sum(t.numel() * t.element_size() for t in held) == dense * share + scales
    assert report.packed_nbytes == dense * share + scales and report.dense_nbytes == dense
    saved = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert saved == dense * share + scales


def test_the_librarys_order_takes_the_place_of_ours(
    emulated: CusparseLtBackend, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no second copy is left: still 9 of 16."""
    monkeypatch.setattr(packed_linear, "CONFIG", packed_linear.NARROW)
    emulator.layout("random", 5)
    layer = nn.Linear(256, 128, bias=False).bfloat16()
    weight = sdgp.prune(layer.weight.detach())
    sdgp.export_(layer, prune=True)
    before = layer.state_dict()
    x = torch.randn(16, 256).bfloat16()
    with torch.no_grad():
        assert_product(layer(x), x, weight.t())
        assert layer.layout.name != "stored"
        packed_weights.forget()
        assert_product(layer(x), x, weight.t())
    assert packed_weights.kept_nbytes() == 0
    assert layer.weight_packed.numel() == 9 * weight.numel() // 8
    after = layer.state_dict()
    assert all(
        torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
        for name in before
    )
    assert torch.equal(layer.dense(), weight)


@pytest.mark.parametrize("shape", [(32, 32), (32, 48), (48, 80)], ids=str)
@pytest.mark.parametrize("name", STORED)
def test_what_is_saved_is_plain(name: str, shape: tuple[int, int]) -> None:
    weight = sdgp.prune(torch.randn(shape))
    stored, _ = packed_linear.packed_of(weight, STORED[name])
    values, indices = portable(stored)
    assert values.shape == (shape[0], shape[1] // 2) and indices.dtype == torch.uint8
    again = from_portable(values, indices)
    assert isinstance(again, Packed24) and torch.equal(again.buffer, stored.buffer)
    # By hand: what the two nibbles of each byte say.
    pairs = torch.stack((indices & 15, indices >> 4), -1).flatten(1)[:, : shape[1] // 4].long()
    dense = torch.zeros(shape)
    for row in range(shape[0]):
        for group in range(shape[1] // 4):
            nibble = int(pairs[row, group])
            for slot, place in enumerate((nibble & 3, nibble >> 2)):
                dense[row, 4 * group + place] += values[row, 2 * group + slot].float()
    assert torch.equal(dense, stored.unpack().float())


def model_of(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Two layers that are pruned, one that is none of ours, a head, and a convolution of 3x3."""
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(32, 32, 3),
            "up": nn.Linear(32, 64),
            "norm": nn.LayerNorm(64),
            "down": Conv1D(32, 64),
            "head": nn.Linear(32, 10),
        }
    )
    return model.to(dtype)


def test_converted_models_export_what_their_products_use() -> None:
    model = model_of()
    sdgp.convert_(model, WIDE)
    masks = {}
    for name in ("up", "down"):
        weight = model[name].weight
        dim = 1 if name == "up" else 0
        groups = torch.unflatten(torch.rand(weight.shape), dim, (-1, 4))
        masks[name] = (groups.argsort(dim + 1) < 2).flatten(dim, dim + 1)
        set_weight_mask_(model[name], masks[name])
    kept = {n: torch.where(masks[n], model[n].weight.detach(), 0) for n in masks}
    conv = sdgp.prune(model["conv"].weight.detach(), dim=1)
    report = sdgp.export_(model)
    assert list(report.exported) == ["up", "down"]
    assert torch.equal(model["up"].dense(), kept["up"])
    assert torch.equal(model["down"].weight, kept["down"])
    assert type(model["conv"]) is nn.Conv2d and torch.equal(model["conv"].weight, conv)
    assert report.left == {
        "conv": "only an unpadded 1x1 convolution of stride 1 is one product",
        "head": "its weight is not pruned",
    }
    assert "2 layers exported, 2 left" in str(report)
    assert not any("weight_mask" in name for name in model.state_dict())


def test_what_is_not_24_is_refused_in_one_sentence() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError,
        match="model must be one with a layer whose weight is 2:4, got 0: its weight is not 2:4",
    ):
        sdgp.export_(model)
    sdgp.convert_(model, WIDE.replace(weight_n=3))
    with pytest.raises(ValueError, match="export_: model must be 2:4 in 0, got another weight"):
        sdgp.export_(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for changes, error in (({"dtype": "int4"}, ValueError), ({"prune": 1}, TypeError)):
        with pytest.raises(error, match="export_: "):
            sdgp.export_(model, **changes)
    assert isinstance(model[0], sdgp.nn.SDGPLinear)
    sdgp.export_(model, prune=True)
    assert isinstance(model[0], PackedLinear) and model[0].weight_dtype == torch.bfloat16


def test_a_layer_that_is_24_by_itself_is_exported_and_the_others_stay() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).bfloat16()
    model[1].weight.data = sdgp.prune(model[1].weight.data)
    report = sdgp.export_(model)
    assert list(report.exported) == ["1"] and type(model[0]) is nn.Linear
    wide = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 32))
    with pytest.raises(ValueError, match="its 24 x 32 weight has a side that is no multiple of 16"):
        sdgp.export_(wide, prune=True)


@pytest.mark.parametrize("dtype", ["same", "int8", "fp8"])
def test_files_are_loaded_without_the_weights(tmp_path: Path, dtype: str) -> None:
    model = model_of()
    sdgp.convert_(model, WIDE)
    sdgp.export_(model, dtype=dtype)
    x = torch.randn(5, 32).bfloat16()
    with torch.no_grad():
        expected = model["down"](model["norm"](model["up"](x)))
    sdgp.save_exported(model, tmp_path / "model.safetensors")
    fresh = model_of()
    names = sdgp.load_exported_(fresh, tmp_path / "model.safetensors")
    assert names == ["up", "down"]
    with torch.no_grad():
        assert torch.equal(fresh["down"](fresh["norm"](fresh["up"](x))), expected)
    twin = copy.deepcopy(fresh)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin["up"](x), fresh["up"](x))
    wrong = model_of()
    wrong["up"] = nn.Linear(32, 32)
    kinds = [type(module) for module in wrong.modules()]
    with pytest.raises(ValueError, match="load_exported_: model must be one whose 'up' is 64 x 32"):
        sdgp.load_exported_(wrong, tmp_path / "model.safetensors")
    assert kinds == [type(module) for module in wrong.modules()]
    with pytest.raises(ValueError, match="save_exported: model must be exported"):
        sdgp.save_exported(wrong, tmp_path / "other.safetensors")
    broken = {**model.state_dict(), "up.weight_values": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError, match=r"up.weight_values: must be \(64, 16\)"):
        twin.load_state_dict(broken)
    del broken["up.weight_values"]
    with pytest.raises(RuntimeError, match="Missing key.*up.weight_values"):
        twin.load_state_dict(broken)


def test_gradients_reach_what_comes_before() -> None:
    layer = layer_of("linear", torch.bfloat16)
    weight = weight_of("linear", layer)
    sdgp.export_(layer, prune=True)
    x = input_of("linear").requires_grad_()
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    assert_product(x.grad.reshape(-1, 64), g.reshape(-1, 96), weight)
    assert torch.equal(layer.bias.grad, g.reshape(-1, 96).sum(0))


def test_compiled_layers_and_other_dtypes() -> None:
    layer = layer_of("linear", torch.bfloat16)
    sdgp.export_(layer, prune=True)
    x = input_of("linear")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x.float()), layer(x))
        with pytest.raises(ValueError, match="input must be of torch.bfloat16"):
            layer(x.float())
    assert "weight=2:4 bfloat16" in repr(layer)
