"""Operands, devices and tracers at the edge of what a layer meets."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

import sdgp_cusparselt as sdgp
from sdgp_cusparselt import functional as SF

CONFIG = sdgp.SDGPConfig(prune="magnitude")
MASKED = sdgp.SDGPConfig(prune="none", forward="sparse_weight")
BOTH = CONFIG.replace(grad_weight="sparse", grad_weight_prune="magnitude")


def everything(module: nn.Module, name: str) -> bool:
    return True


def converted(layer: nn.Module, config: sdgp.SDGPConfig = CONFIG) -> nn.Module:
    twin = copy.deepcopy(layer)
    sdgp.convert_(twin, config, filter_fn=everything)
    return twin


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", [(16,), (6, 16), (2, 3, 16), (2, 1, 3, 16)], ids=str)
@pytest.mark.parametrize("config", [CONFIG, MASKED], ids=["gradient", "weight"])
def test_an_output_may_be_changed_in_place(
    config: sdgp.SDGPConfig, shape: tuple[int, ...], compiled: bool
) -> None:
    """As an activation with inplace=True does."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 16)).double()
    twin = copy.deepcopy(model)
    twin[1].inplace = False
    grads = []
    for one in (model, twin):
        sdgp.convert_(one, config, filter_fn=everything)
        run = torch.compile(one, backend="aot_eager") if compiled and one is model else one
        x = torch.arange(math.prod(shape), dtype=torch.float64).cos().view(shape)
        run(x.requires_grad_()).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in one.parameters())])
    for ours, apart in zip(*grads, strict=True):
        torch.testing.assert_close(ours, apart)


@contextmanager
def left_unpruned(reason: str) -> Iterator[None]:
    with pytest.warns(sdgp.SDGPFallbackWarning, match=f"grad_input runs plain.* because {reason}"):
        yield


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(16, 16)


#: kind -> (layer, shape of its input)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 16), (33, 16)),
    "conv2d": (lambda: nn.Conv2d(16, 16, 3, padding=1), (2, 16, 5, 5)),
    "conv1d": (conv1d, (33, 16)),
}


class Casts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts copies of [16, 16, ...] float32 to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.count += args[0].shape[:2] == (16, 16)
        return func(*args, **kwargs)


def thrice(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) + layer(2 * x) + layer(x * x)


@pytest.mark.parametrize("config", [CONFIG, BOTH], ids=["dense grad_weight", "sparse grad_weight"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_used_three_times_under_autocast_casts_its_weight_once(
    kind: str, config: sdgp.SDGPConfig
) -> None:
    make, shape = LAYERS[kind]
    plain = make()
    ours, x = converted(plain, config), torch.randn(shape, requires_grad=True)
    for layer in (ours, plain):
        with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
            y = thrice(layer, x)
        assert casts.count == 1
        torch.manual_seed(3)
        y.backward(torch.randn_like(y))
    if config is CONFIG:
        assert torch.equal(ours.weight.grad, plain.weight.grad)
    assert torch.equal(ours.bias.grad, plain.bias.grad)


def test_a_cast_is_made_anew_when_the_weight_or_the_switch_changes() -> None:
    layer, x = converted(nn.Linear(16, 16)), torch.randn(4, 16, requires_grad=True)
    outputs: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16):
        outputs.append(layer(x))
        with torch.no_grad():
            layer.weight.mul_(2)
            layer.bias.mul_(2)
        outputs.append(layer(x))
        layer.weight.data = layer.weight.data.clone()
        outputs.append(layer(x))
        with torch.autocast("cpu", torch.float16):
            assert layer(x).dtype == torch.float16
    assert torch.equal(outputs[1], 2 * outputs[0]) and torch.equal(outputs[2], outputs[1])
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Casts() as casts:
        layer(x), layer(x)
    assert casts.count == 2


@pytest.mark.parametrize("method", ["magnitude", "rescaled_magnitude", "random", "mvue"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_meta_device(kind: str, method: str) -> None:
    make, shape = LAYERS[kind]
    config = sdgp.SDGPConfig(prune=method, grad_weight="sparse")  # type: ignore[arg-type]
    layer = converted(make(), config).to("meta")
    x = torch.empty(shape, device="meta", requires_grad=True)
    y = layer(x)
    y.backward(torch.empty_like(y))
    assert x.grad.shape == x.shape and layer.weight.grad.shape == layer.weight.shape


def test_fx_keeps_a_layer_as_one_node() -> None:
    model = converted(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
    graph = torch.fx.symbolic_trace(model)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == ["0", "1", "2"]
    x = torch.randn(4, 16)
    grads = []
    for run in (model, graph):
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    with pytest.raises(sdgp.SDGPError, match="torch.fx cannot trace a pruned layer by itself"):
        torch.fx.symbolic_trace(model[0])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_jit_trace_records_the_plain_layer_and_says_so(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = converted(make()), torch.randn(shape)
    with left_unpruned("torch.jit.trace records no pruning"):
        traced = torch.jit.trace(layer, x)
    assert torch.equal(traced(x), layer(x))
    with pytest.raises(sdgp.NotSupportedError, match="torch.jit.trace"):
        torch.jit.trace(converted(make(), CONFIG.replace(on_unsupported="raise")), x)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", sdgp.SDGPFallbackWarning)
        torch.jit.trace(converted(make()), x)


@pytest.mark.parametrize("features", [(0, 8), (8, 0), (0, 0)], ids=str)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_no_features(features: tuple[int, int]) -> None:
    plain = nn.Linear(*features)
    ours, x = converted(plain), torch.randn(2, 3, features[0], requires_grad=True)
    results = []
    for layer in (ours, plain):
        y = layer(x)
        grads = torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
        results.append([y, *grads])
    assert all(map(torch.equal, *results))


def operand(layout: str) -> tuple[Tensor, Tensor]:
    input, weight = torch.randn(4, 16), torch.randn(8, 16)
    if layout == "1-D weight":
        return input, weight[0]
    if layout == "CSR weight":
        return input, weight.to_sparse_csr()
    if layout == "COO weight":
        return input, weight.to_sparse()
    if layout == "COO input":
        return input.to_sparse(), weight
    return torch.nested.nested_tensor([input, input[:2]], layout=torch.jagged), weight


@pytest.mark.parametrize(
    "layout, reason",
    [
        ("1-D weight", "its weight is 1-D"),
        ("CSR weight", "its weight is sparse_csr"),
        ("COO weight", "its weight is sparse_coo"),
        ("COO input", "its input is sparse_coo"),
        ("nested input", "its input is nested"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_layouts_that_are_not_pruned_are_torchs_own(layout: str, reason: str) -> None:
    grads = []
    record = sdgp.nn.SDGPLinear.from_dense(nn.Linear(8, 8), CONFIG).sdgp_record
    for function in (lambda *t: SF.linear(*t, config=CONFIG, record=record), F.linear):
        torch.manual_seed(0)
        leaves = [t.detach().requires_grad_() for t in operand(layout)]
        if function is F.linear:
            y = function(*leaves)
        else:
            with left_unpruned(reason):
                y = function(*leaves)
        (y.values() if y.is_nested else y).square().sum().backward()
        dense = [t.grad.to_dense() if t.grad.is_sparse else t.grad for t in leaves]
        grads.append([g.values() if g.is_nested else g for g in dense])
    assert all(map(torch.equal, *grads))
    forbidden = CONFIG.replace(on_unsupported="raise")
    with pytest.raises(sdgp.NotSupportedError, match=reason):
        SF.linear(*(t.detach().requires_grad_() for t in operand(layout)), config=forbidden)


def test_one_number_in_a_tuple_stands_for_both_directions() -> None:
    plain = nn.Conv2d(8, 8, 3, stride=(2,), padding=(1,), dilation=(1,))
    ours, x = converted(plain), torch.randn(2, 8, 9, 9, requires_grad=True)
    assert torch.equal(ours(x), plain(x))
    weight, bias = plain.weight, plain.bias
    y = SF.conv2d(x, weight, bias, (2,), [1], config=CONFIG)
    y.backward(torch.ones_like(y))
    assert torch.equal(y, plain(x)) and x.grad.shape == x.shape
    same = SF.conv2d(x, weight, bias, (1,), "same", (2,), config=CONFIG)
    assert torch.equal(same, F.conv2d(x, weight, bias, 1, "same", 2))


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("argument", ["stride", "padding", "dilation"])
def test_three_numbers_are_refused(argument: str, requires_grad: bool) -> None:
    x = torch.randn(1, 4, 5, 5, requires_grad=requires_grad)
    with pytest.raises(ValueError, match=rf"conv2d: {argument} must be a number or a pair, got"):
        SF.conv2d(x, torch.randn(4, 4, 3, 3), **{argument: (1, 1, 1)}, config=CONFIG)


@pytest.mark.parametrize("shapes", [((9, 9), (4, 4, 3, 3)), ((1, 4, 9, 9), (4, 4, 3))], ids=str)
def test_what_is_no_image_is_torchs_to_refuse(shapes: tuple[tuple[int, ...], ...]) -> None:
    x, weight = (torch.randn(shape, requires_grad=True) for shape in shapes)
    with pytest.raises(RuntimeError, match=r"xpected"):
        SF.conv2d(x, weight, padding="same", config=CONFIG)


@pytest.mark.parametrize("of_output", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("of_input", [torch.contiguous_format, torch.channels_last], ids=str)
def test_strides_above_a_frozen_convolution_of_one_channel(
    of_input: torch.memory_format, of_output: torch.memory_format
) -> None:
    plain = nn.Conv2d(1, 8, 3).requires_grad_(False)
    x = torch.randn(2, 1, 6, 6).to(memory_format=of_input).requires_grad_()
    strides = []
    for layer in (converted(plain), plain):
        y = layer(x)
        grad_output = torch.ones_like(y).contiguous(memory_format=of_output)
        strides.append(torch.autograd.grad(y, x, grad_output)[0].stride())
    assert strides[0] == strides[1]


@pytest.mark.parametrize("function", [SF.linear, SF.conv2d])
def test_complex_operands_are_refused(function: Callable[..., Tensor]) -> None:
    real, other = torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 4, dtype=torch.complex64)
    for input, weight, name in ((other, real, "input"), (real, other, "weight")):
        with pytest.raises(TypeError, match=f"{name} must be real, got torch.complex64"):
            function(input, weight, config=CONFIG)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_layers_stay_plain() -> None:
    model = nn.Sequential(
        nn.Linear(8, 8, dtype=torch.complex64),
        nn.Linear(8, 8),
        nn.Conv2d(8, 8, 1).to(torch.complex64),
    )
    report = sdgp.convert_(model, CONFIG, filter_fn=everything)
    assert report.converted == ["1"]
    assert all("complex" in report.skipped[name] for name in ("0", "2"))
    plain, later = nn.Linear(8, 8).to(torch.complex64), nn.Linear(8, 8)
    sdgp.convert_(later, CONFIG)
    later.to(torch.complex64).load_state_dict(plain.state_dict())
    ours = torch.randn(2, 4, 8, dtype=torch.complex64, requires_grad=True)
    with left_unpruned("its weight is complex"):
        later(ours).abs().square().sum().backward()
    x = ours.detach().requires_grad_()
    plain(x).abs().square().sum().backward()
    assert torch.equal(ours.grad, x.grad) and torch.equal(later.weight.grad, plain.weight.grad)


def test_weights_that_only_their_own_class_multiplies_stay_plain() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight = nn.Parameter(TwoTensor(torch.randn(8, 8), torch.randn(8, 8)))
    report = sdgp.convert_(model, CONFIG)
    assert report.converted == ["1"]
    assert "its weight is a TwoTensor, which only its own class" in report.skipped["0"]
    model[1].weight = nn.Parameter(TwoTensor(torch.randn(8, 8), torch.randn(8, 8)))
    x = torch.randn(4, 8, requires_grad=True)
    with left_unpruned("its weight is a TwoTensor"):
        model[1](x)


def test_only_layers_that_read_images_read_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(3, 8), nn.Linear(8, 8))
    report = sdgp.convert_(model)
    assert report.converted == ["1", "2"]
    assert "reads 3 channels" in report.skipped["0"]
