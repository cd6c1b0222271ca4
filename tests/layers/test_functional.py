"""Gradients of linear and conv2d against plain autograd and the products written out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sdgp_cusparselt as sdgp
from sdgp_cusparselt import functional as SF
from tests.helpers import assert_product, oracle_magnitude

CONFIG = sdgp.SDGPConfig(prune="magnitude")
Layer = Callable[..., Tensor]


def gradients(layer: Layer, grad_output: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Return output and gradients of layer at copies of tensors that keep their strides."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    output = layer(*leaves)
    present = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(output, present, grad_output))
    return [output.detach()] + [None if t is None else next(grads) for t in leaves]


def tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@pytest.mark.parametrize("shape", [(64,), (33, 64), (4, 33, 64), (2, 3, 5, 64)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_linear(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    input, weight = torch.randn(shape).to(dtype), torch.randn(48, 64).to(dtype)
    b = torch.randn(48).to(dtype) if bias else None
    grad_output = torch.randn(*shape[:-1], 48).to(dtype)
    dense = gradients(F.linear, grad_output, input, weight, b)
    ours = gradients(lambda *t: SF.linear(*t, config=CONFIG), grad_output, input, weight, b)
    assert torch.equal(ours[0], dense[0])
    assert torch.equal(ours[2], dense[2])
    assert b is None or torch.equal(ours[3], dense[3])
    pruned = oracle_magnitude(tokens(grad_output), 2, 4, 1)
    assert_product(tokens(ours[1]), pruned, weight)
    assert not torch.equal(ours[1], dense[1])


@pytest.mark.parametrize("layout", ["weight.t", "input strided", "input transposed"])
def test_linear_with_odd_strides_equals_autograd_bit_for_bit(layout: str) -> None:
    input, weight, b = torch.randn(3, 40, 64), torch.randn(48, 64), torch.randn(48)
    if layout == "weight.t":
        weight = torch.randn(64, 48).t()
    elif layout == "input strided":
        input = torch.randn(3, 80, 64)[:, ::2]
    else:
        input = torch.randn(40, 3, 64).transpose(0, 1)
    grad_output = torch.randn(3, 40, 48)
    dense = gradients(F.linear, grad_output, input, weight, b)
    ours = gradients(lambda *t: SF.linear(*t, config=CONFIG), grad_output, input, weight, b)
    for i in (0, 2, 3):
        assert torch.equal(ours[i], dense[i])
    assert_product(tokens(ours[1]), oracle_magnitude(tokens(grad_output), 2, 4, 1), weight)


@pytest.mark.parametrize("method", ["rescaled_magnitude", "random", "mvue"])
@pytest.mark.parametrize("n, m", [(2, 4), (2, 8)])
def test_linear_uses_the_configured_method(method: str, n: int, m: int) -> None:
    input, weight, grad_output = torch.randn(2, 9, 24), torch.randn(32, 24), torch.randn(2, 9, 32)
    config = sdgp.SDGPConfig(prune=method, n=n, m=m)
    torch.manual_seed(7)
    ours = gradients(lambda *t: SF.linear(*t, config=config), grad_output, input, weight)[1]
    torch.manual_seed(7)
    pruned = sdgp.prune(grad_output, method=method, n=n, m=m)
    assert_product(tokens(ours), tokens(pruned), weight)


def test_rescaled_linear_sums_over_the_sequence_of_each_sample() -> None:
    grad_output = torch.randn(3, 17, 8)
    grad_output[1] *= 100
    kept = oracle_magnitude(grad_output, 2, 4, 2)
    scaled = kept * grad_output.abs().sum(1, keepdim=True) / kept.abs().sum(1, keepdim=True)
    weight, config = torch.eye(8), sdgp.SDGPConfig(prune="rescaled_magnitude")
    layer = lambda *t: SF.linear(*t, config=config)
    ours = gradients(layer, grad_output, torch.randn(3, 17, 8), weight)[1]
    torch.testing.assert_close(ours, scaled)


CONVS = {
    "3x3": {},
    "strided": {"stride": 2, "padding": 1},
    "oblong": {"stride": (1, 2), "padding": (0, 2), "dilation": (2, 1)},
    "same": {"padding": "same"},
    "same dilated": {"padding": "same", "dilation": 3},
    "valid": {"padding": "valid"},
    "groups": {"groups": 4, "padding": 1},
    "depthwise": {"groups": 16},
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (3, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_conv2d(
    name: str, memory_format: torch.memory_format, kernel: tuple[int, int], bias: bool
) -> None:
    kwargs = CONVS[name]
    groups = kwargs.get("groups", 1)
    input = torch.randn(3, 16, 9, 11).to(memory_format=memory_format)
    weight = torch.randn(32, 16 // groups, *kernel)
    b = torch.randn(32) if bias else None
    grad_output = torch.randn_like(F.conv2d(input, weight, b, **kwargs))
    dense = gradients(lambda *t: F.conv2d(*t, **kwargs), grad_output, input, weight, b)
    layer = lambda *t: SF.conv2d(*t, **kwargs, config=CONFIG)
    ours = gradients(layer, grad_output, input, weight, b)
    assert torch.equal(ours[0], dense[0])
    assert torch.equal(ours[2], dense[2])
    assert b is None or torch.equal(ours[3], dense[3])

    channels = grad_output.unflatten(1, (groups, -1))
    pruned = oracle_magnitude(channels, 2, 4, 2).flatten(1, 2)
    exact = gradients(
        lambda i: F.conv2d(i, weight.double(), **kwargs), pruned.double(), input.double()
    )[1]
    size = gradients(
        lambda i: F.conv2d(i, weight.double().abs(), **kwargs),
        pruned.double().abs(),
        input.double(),
    )[1]
    reduced = weight[:, 0].numel() // groups
    bound = 2 * reduced * torch.finfo(torch.float32).eps * size + 1e-30
    assert ((ours[1] - exact).abs() <= bound).all()
    assert torch.equal(ours[1], dense[1]) == (name == "depthwise")


def test_conv2d_is_the_transposed_convolution_of_the_pruned_gradient() -> None:
    input, weight = torch.randn(2, 8, 10, 10), torch.randn(16, 8, 3, 3)
    grad_output = torch.randn(2, 16, 5, 5)
    layer = lambda *t: SF.conv2d(*t, stride=2, padding=1, config=CONFIG)
    ours = gradients(layer, grad_output, input, weight)[1]
    pruned = oracle_magnitude(grad_output, 2, 4, 1)
    expected = F.conv_transpose2d(pruned, weight, stride=2, padding=1, output_padding=1)
    torch.testing.assert_close(ours, expected)


def test_unbatched_conv2d() -> None:
    input, weight, bias = torch.randn(8, 6, 6), torch.randn(16, 8, 3, 3), torch.randn(16)
    grad_output = torch.randn(16, 4, 4)
    dense = gradients(F.conv2d, grad_output, input, weight, bias)
    ours = gradients(lambda *t: SF.conv2d(*t, config=CONFIG), grad_output, input, weight, bias)
    assert all(torch.equal(ours[i], dense[i]) for i in (0, 2, 3))
    assert ours[1].shape == input.shape


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_gradcheck_without_pruning(kind: str) -> None:
    # Only without pruning: a pruned backward is not the derivative of the forward.
    config = sdgp.SDGPConfig(prune="none")
    if kind == "linear":
        shapes, layer = [(2, 3, 5), (4, 5), (4,)], SF.linear
    else:
        shapes, layer = [(2, 4, 5, 5), (8, 4, 3, 3), (8,)], SF.conv2d
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *t: layer(*t, config=config), leaves)


def test_sparse_grad_weight_prunes_along_tokens() -> None:
    input, weight, grad_output = torch.randn(30, 24), torch.randn(16, 24), torch.randn(30, 16)
    config = sdgp.SDGPConfig(prune="magnitude", grad_weight="sparse", grad_weight_prune="magnitude")
    layer = lambda *t: SF.linear(*t, config=config)
    _, _, grad_weight, grad_bias = gradients(layer, grad_output, input, weight, torch.randn(16))
    assert_product(grad_weight, oracle_magnitude(grad_output, 2, 4, 0).t(), input)
    torch.testing.assert_close(grad_bias, grad_output.sum(0))


def test_sparse_conv_grad_weight_prunes_along_pixels() -> None:
    input, weight, bias = torch.randn(2, 8, 7, 7), torch.randn(16, 8, 3, 3), torch.randn(16)
    grad_output = torch.randn(2, 16, 5, 5)
    config = sdgp.SDGPConfig(prune="magnitude", grad_weight="sparse", grad_weight_prune="magnitude")
    layer = lambda *t: SF.conv2d(*t, config=config)
    ours = gradients(layer, grad_output, input, weight, bias)
    pixels = grad_output.permute(0, 2, 3, 1)
    pruned = oracle_magnitude(pixels.reshape(-1, 16), 2, 4, 0).view(pixels.shape)
    dense = gradients(F.conv2d, pruned.permute(0, 3, 1, 2).contiguous(), input, weight, bias)
    torch.testing.assert_close(ours[2], dense[2])
    assert torch.equal(ours[3], gradients(F.conv2d, grad_output, input, weight, bias)[3])


@pytest.mark.parametrize("shape", [(8, 32), (2, 4, 32)], ids=str)
def test_expanded_grad_output(shape: tuple[int, ...]) -> None:
    input, weight = torch.randn(shape, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    SF.linear(input, weight, config=CONFIG).sum().backward()
    pruned = torch.ones(16).view(4, 4) * torch.tensor([1.0, 1.0, 0.0, 0.0])
    expected = (pruned.view(16) @ weight.detach()).expand(shape)
    torch.testing.assert_close(input.grad, expected)
    torch.testing.assert_close(weight.grad, tokens(input.detach()).sum(0).expand(16, 32))


def test_expanded_grad_output_of_a_convolution() -> None:
    input = torch.randn(2, 8, 6, 6, requires_grad=True)
    weight = torch.randn(16, 8, 3, 3, requires_grad=True)
    SF.conv2d(input, weight, config=CONFIG).sum().backward()
    ones = oracle_magnitude(torch.ones(2, 16, 4, 4), 2, 4, 1)
    torch.testing.assert_close(input.grad, F.conv_transpose2d(ones, weight.detach()))


@pytest.mark.parametrize("shape", [(0, 32), (0, 5, 32), (2, 0, 32)], ids=str)
def test_empty_batches(shape: tuple[int, ...]) -> None:
    input, weight = torch.randn(shape, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    SF.linear(input, weight, config=CONFIG).sum().backward()
    assert input.grad.shape == input.shape
    assert (weight.grad == 0).all()


def test_empty_batch_of_a_convolution() -> None:
    input = torch.randn(0, 8, 6, 6, requires_grad=True)
    weight = torch.randn(16, 8, 3, 3, requires_grad=True)
    SF.conv2d(input, weight, config=CONFIG).sum().backward()
    assert input.grad.shape == input.shape
    assert (weight.grad == 0).all()


class Counting:
    """Counts the calls of prune inside the dense backend."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        real = sdgp.prune

        def counting(*args: object, **kwargs: object) -> Tensor:
            self.calls += 1
            return real(*args, **kwargs)

        monkeypatch.setattr("sdgp_cusparselt.backends.emulation.prune", counting)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("wanted", ["input", "weight", "bias", "input weight"])
def test_only_what_is_needed_is_computed(
    kind: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(monkeypatch)
    if kind == "linear":
        shapes, layer, dense = [(6, 16), (8, 16), (8,)], SF.linear, F.linear
    else:
        shapes, layer, dense = [(2, 8, 6, 6), (16, 8, 3, 3), (16,)], SF.conv2d, F.conv2d
    names = ("input", "weight", "bias")
    tensors = [torch.randn(s) for s in shapes]
    ours, plain = (
        [t.clone().requires_grad_(n in wanted) for n, t in zip(names, tensors, strict=True)]
        for _ in range(2)
    )
    output = layer(*ours, config=CONFIG)
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    dense(*plain).backward(grad_output)
    assert counting.calls == int("input" in wanted)
    for name, a, b in zip(names, ours, plain, strict=True):
        assert (a.grad is None) == (b.grad is None) == (name not in wanted)
        if a.grad is not None and name != "input":
            assert torch.equal(a.grad, b.grad)


def test_a_frozen_weight_does_not_keep_the_input_alive() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        SF.linear(torch.randn(4, 16, requires_grad=True), torch.randn(8, 16), config=CONFIG)
    assert [t.shape for t in saved] == [(8, 16)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_autocast(dtype: torch.dtype, kind: str) -> None:
    if kind == "linear":
        shapes, layer, dense = [(6, 16), (8, 16), (8,)], SF.linear, F.linear
    else:
        shapes, layer, dense = [(2, 8, 6, 6), (16, 8, 3, 3), (16,)], SF.conv2d, F.conv2d
    tensors = [torch.randn(s) for s in shapes]
    results = []
    for function in (lambda *t: layer(*t, config=CONFIG), dense):
        leaves = [t.clone().requires_grad_() for t in tensors]
        with torch.autocast("cpu", dtype=dtype):
            output = function(*leaves)
        assert output.dtype == dtype
        torch.manual_seed(1)
        output.backward(torch.randn_like(output))
        results.append((output, leaves))
    (ours, a), (plain, b) = results
    assert torch.equal(ours, plain)
    assert a[0].grad.dtype == torch.float32
    assert torch.equal(a[1].grad, b[1].grad)
    assert torch.equal(a[2].grad, b[2].grad)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    input, weight = torch.randn(6, 16), torch.randn(8, 16)
    layer = lambda i, w: SF.linear(i, w, config=CONFIG)
    grad_output = torch.randn(6, 8)
    plain = gradients(layer, grad_output, input, weight)
    for reentrant in (False, True):
        wrapped = lambda i, w, r=reentrant: checkpoint(layer, i, w, use_reentrant=r)
        leaves = [t.clone().requires_grad_() for t in (input, weight)]
        wrapped(*leaves).backward(grad_output)
        assert torch.equal(leaves[0].grad, plain[1]) and torch.equal(leaves[1].grad, plain[2])


@pytest.mark.parametrize("wrt", ["input", "weight"])
def test_double_backward_raises(wrt: str) -> None:
    input, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    output = SF.linear(input, weight, config=CONFIG).square().sum()
    (grad,) = torch.autograd.grad(output, input if wrt == "input" else weight, create_graph=True)
    with pytest.raises(sdgp.SDGPError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("layer", [SF.linear, SF.conv2d])
def test_bad_config(layer: Layer) -> None:
    with pytest.raises(TypeError, match="config must be an SDGPConfig, got dict"):
        layer(torch.randn(2, 8), torch.randn(8, 8), config={"prune": "magnitude"})


def test_bad_padding() -> None:
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    with pytest.raises(ValueError, match="conv2d: padding must be"):
        SF.conv2d(x, w, padding="full", config=CONFIG)
    with pytest.raises(ValueError, match="conv2d: stride must be one"):
        SF.conv2d(x, w, stride=2, padding="same", config=CONFIG)


def test_deterministic_algorithms_are_honoured() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for method in ("magnitude", "rescaled_magnitude", "random", "mvue"):
            for n, m in ((2, 4), (2, 8)):
                sdgp.prune(torch.randn(8, 16), method=method, n=n, m=m)
    finally:
        torch.use_deterministic_algorithms(False)
