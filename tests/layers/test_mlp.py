"""mlp and gated_mlp against the separate layers, and their gradients against autograd's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sdgp_cusparselt as sdgp
from sdgp_cusparselt import functional as SF
from sdgp_cusparselt.layers.fused import Part, activated_linear
from sdgp_cusparselt.pruning.producers import ACTIVATIONS
from sdgp_cusparselt.recording.records import LayerRecord
from tests.helpers import assert_product, oracle_magnitude

MAGNITUDE = sdgp.SDGPConfig(prune="magnitude")
BOTH = sdgp.SDGPConfig(prune="magnitude", grad_weight="sparse", grad_weight_prune="magnitude")
NONE = sdgp.SDGPConfig(prune="none")
SHAPES = [(16,), (5, 16), (3, 5, 16), (2, 3, 4, 16)]
GATED = pytest.mark.parametrize("gated", [False, True], ids=["mlp", "gated"])

#: Written out here, not taken from the package.
WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    ),
    "silu": lambda x: x * torch.sigmoid(x),
    "relu": lambda x: x * (x > 0),
    "relu_squared": lambda x: x**2 * (x > 0),
}
TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def operands(
    shape: tuple[int, ...], hidden: int, gated: bool, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return input and weight, bias of each layer: (gate,) up, down."""
    made = [torch.randn(shape, dtype=dtype)]
    for _ in range(2 if gated else 1):
        made += [torch.randn(hidden, shape[-1]).to(dtype) / 4, torch.randn(hidden).to(dtype)]
    return [*made, torch.randn(12, hidden).to(dtype) / 4, torch.randn(12).to(dtype)]


def fused(*tensors: Tensor, activation: str = "gelu", **options: Any) -> Tensor:
    """Apply mlp, or gated_mlp to more tensors."""
    if len(tensors) == 5:
        return SF.mlp(*tensors, activation=activation, **options)
    x, gate, gate_bias, up, up_bias, down, down_bias = tensors
    biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    return SF.gated_mlp(x, gate, up, down, activation=activation, **biases, **options)


def separate(
    *tensors: Tensor,
    activation: str = "gelu",
    config: sdgp.SDGPConfig,
    up_config: sdgp.SDGPConfig | None = None,
    down_config: sdgp.SDGPConfig | None = None,
    dropout: float = 0.0,
    act: dict[str, Callable[[Tensor], Tensor]] = TORCH,
) -> Tensor:
    """Apply the same layers one by one."""
    x, *layers, down, down_bias = tensors
    hidden = act[activation](SF.linear(x, *layers[:2], config=config))
    if len(layers) > 2:
        hidden = hidden * SF.linear(x, *layers[2:], config=up_config or config)
    hidden = F.dropout(hidden, dropout)
    return SF.linear(hidden, down, down_bias, config=down_config or config)


def gradients(layer: Callable[..., Tensor], *tensors: Tensor, seed: int = 1) -> list[Tensor]:
    """Return output and gradients at copies of tensors that keep their strides."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.manual_seed(seed)
    output = layer(*leaves)
    grad_output = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def assert_near(ours: list[Tensor], others: list[Tensor], terms: int) -> None:
    """Assert gradients equal, of sums of ``terms`` products whose factors are rounded otherwise."""
    for one, other in zip(ours, others, strict=True):
        bound = 16 * terms * torch.finfo(one.dtype).eps * max(1.0, float(other.abs().max()))
        assert float((one - other).abs().max()) <= bound


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("hidden", [32, 30])
@GATED
def test_unpruned_gradients_are_autograds(
    activation: str, shape: tuple[int, ...], hidden: int, gated: bool
) -> None:
    tensors = operands(shape, hidden, gated)

    def node(x: Tensor, *rest: Tensor) -> Tensor:
        # What mlp itself never does: fused although nothing is pruned.
        pairs = [rest[i : i + 2] for i in range(0, len(rest) - 2, 2)]
        parts = tuple(Part(*pair, NONE, LayerRecord()) for pair in pairs)
        return F.linear(activated_linear(x, parts, activation), *rest[-2:])

    plain = lambda *t: separate(*t, activation=activation, config=NONE, act=WRITTEN)
    assert_near(gradients(node, *tensors), gradients(plain, *tensors), terms=hidden)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", [MAGNITUDE, BOTH], ids=["grad_input", "both"])
@GATED
def test_pruned_gradients_are_those_of_the_separate_layers(
    activation: str, shape: tuple[int, ...], config: sdgp.SDGPConfig, gated: bool
) -> None:
    tensors = operands(shape, 32, gated)
    ours = gradients(lambda *t: fused(*t, activation=activation, config=config), *tensors)
    apart = gradients(lambda *t: separate(*t, activation=activation, config=config), *tensors)
    plain = gradients(lambda *t: separate(*t, activation=activation, config=NONE), *tensors)
    assert torch.equal(ours[0], apart[0]) and torch.equal(ours[0], plain[0])
    assert_near(ours, apart, terms=32)
    assert not torch.allclose(ours[1], plain[1]), "pruning changed nothing"


def test_the_gradient_of_pre_is_pruned_along_features_and_along_tokens() -> None:
    x, up, up_bias, down, down_bias = operands((6, 16), 32, False)
    leaf = F.linear(x, up, up_bias).requires_grad_()
    grad_output = torch.linspace(-1, 1, 6 * 12).view(6, 12).double()
    upstream = oracle_magnitude(grad_output, 2, 4, 1) @ down
    (grad_pre,) = torch.autograd.grad(F.gelu(leaf), leaf, upstream)
    ours = gradients(lambda *t: fused(*t, config=BOTH), x, up, up_bias, down, down_bias)
    assert_product(ours[1], oracle_magnitude(grad_pre, 2, 4, 1), up)
    assert_product(ours[2], oracle_magnitude(grad_pre, 2, 4, 0).t(), x)
    torch.testing.assert_close(ours[3], grad_pre.sum(0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", ["random", "mvue", "rescaled_magnitude"])
@GATED
def test_the_same_numbers_are_drawn(method: str, gated: bool) -> None:
    config = sdgp.SDGPConfig(prune=method, grad_weight="sparse")
    tensors = operands((3, 8, 16), 32, gated)
    ours = gradients(lambda *t: fused(*t, config=config, dropout=0.25), *tensors)
    apart = gradients(lambda *t: separate(*t, config=config, dropout=0.25), *tensors)
    other = gradients(lambda *t: fused(*t, config=config, dropout=0.25), *tensors, seed=2)
    assert torch.equal(ours[0], apart[0])
    assert_near(ours, apart, terms=32)
    assert not torch.equal(ours[2], other[2])


@GATED
def test_each_layer_obeys_its_own_configuration(gated: bool) -> None:
    tensors = operands((7, 16), 32, gated)
    quarter = sdgp.SDGPConfig(prune="magnitude", n=1)
    options = {"config": MAGNITUDE, "down_config": NONE} | ({"up_config": quarter} if gated else {})
    ours = gradients(lambda *t: fused(*t, **options), *tensors)
    apart = gradients(lambda *t: separate(*t, **options), *tensors)
    same = gradients(lambda *t: fused(*t, config=MAGNITUDE), *tensors)
    assert_near(ours, apart, terms=32)
    assert not torch.allclose(ours[1], same[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@GATED
def test_one_rounding_of_the_gradient_of_pre(
    activation: str, dtype: torch.dtype, gated: bool
) -> None:
    """Layers that multiply by 1 hand their gradient on as it is."""
    eye, zero = torch.eye(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    x = torch.randn(64, 8).to(dtype)
    layer = Part(eye, zero, NONE, LayerRecord())
    parts = (layer, layer._replace(weight=2 * eye)) if gated else (layer,)
    upstream = torch.randn(64, 8).to(dtype)
    biases = [zero.clone().requires_grad_() for _ in parts]
    parts = tuple(p._replace(bias=b) for p, b in zip(parts, biases, strict=True))
    for token in range(64):
        hidden = activated_linear(x[token : token + 1], parts, activation)
        found = torch.autograd.grad(hidden, biases, upstream[token : token + 1])
        exact = [x[token].double().requires_grad_(), (2 * x[token]).double().requires_grad_()]
        value = WRITTEN[activation](exact[0]) * (exact[1] if gated else 1)
        wanted = torch.autograd.grad(value, exact[: len(parts)], upstream[token].double())
        for got, want in zip(found, wanted, strict=True):
            size = (1 + x[token].double().abs()) ** 3 * upstream[token].double().abs()
            inside = 64 * torch.finfo(torch.float32).eps * size
            bound = torch.finfo(dtype).eps / 2 * want.abs() + inside + torch.finfo(dtype).tiny
            assert (got.double() - want).abs().le(bound).all()


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@GATED
def test_dropout_draws_and_rounds_as_torchs(p: float, dtype: torch.dtype, gated: bool) -> None:
    tensors = operands((3, 9, 16), 32, gated, dtype)
    ours = gradients(lambda *t: fused(*t, config=MAGNITUDE, dropout=p), *tensors)
    apart = gradients(lambda *t: separate(*t, config=MAGNITUDE, dropout=p), *tensors)
    assert torch.equal(ours[0], apart[0])
    if dtype == torch.float64:
        assert_near(ours, apart, terms=32)
    still = lambda *t: fused(*t, config=MAGNITUDE, dropout=p, training=False)
    dense = separate(*tensors, config=NONE)
    assert torch.equal(gradients(still, *tensors)[0], dense)


@pytest.mark.parametrize("layout", ["weight.t", "strided", "transposed", "expanded gradient"])
@GATED
def test_odd_strides(layout: str, gated: bool) -> None:
    tensors = operands((3, 6, 16), 32, gated)
    if layout == "weight.t":
        for i in range(1, len(tensors), 2):
            tensors[i] = tensors[i].t().contiguous().t()
    elif layout == "strided":
        tensors[0] = torch.randn(3, 12, 16, dtype=torch.float64)[:, ::2]
    elif layout == "transposed":
        tensors[0] = torch.randn(6, 3, 16, dtype=torch.float64).transpose(0, 1)
    results = []
    for layer in (fused, separate):
        leaves = [t.detach().requires_grad_() for t in tensors]
        output = layer(*leaves, config=BOTH)
        scale = 1 if layout == "expanded gradient" else torch.arange(12.0).double()
        (output * scale).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    assert torch.equal(results[0][0], results[1][0])
    assert_near(*results, terms=32 * 12)


@pytest.mark.parametrize("shape", [(0, 16), (0, 5, 16), (2, 0, 16)], ids=str)
@GATED
def test_empty_batches(shape: tuple[int, ...], gated: bool) -> None:
    _, *grads = gradients(lambda *t: fused(*t, config=MAGNITUDE), *operands(shape, 32, gated))
    assert grads[0].shape == shape
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("wanted", ["input", "weight", "bias", "up weight", "input weight"])
def test_only_what_is_needed_is_returned(wanted: str) -> None:
    names = ["input", "weight", "bias", "up weight", "up bias", "down", "down bias"]
    results = []
    tensors = operands((6, 16), 32, gated=True)
    for layer in (fused, separate):
        picked = [w in wanted.split() or w == wanted for w in names]
        leaves = [t.clone().requires_grad_(p) for t, p in zip(tensors, picked, strict=True)]
        layer(*leaves, config=BOTH).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def saved_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Return the bytes that a graph keeps, parameters and shared memory counted once."""
    kept: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in {p.untyped_storage().data_ptr() for p in parameters}:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = forward()
    del output
    return sum(kept.values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@GATED
def test_no_more_is_kept_than_by_the_separate_layers(
    activation: str, dropout: float, gated: bool
) -> None:
    tensors = [t.requires_grad_() for t in operands((40, 16), 32, gated, torch.float32)]
    options = {"activation": activation, "config": MAGNITUDE, "dropout": dropout}
    ours = saved_bytes(lambda: fused(*tensors, **options), tensors[1:])
    apart = saved_bytes(lambda: separate(*tensors, **options), tensors[1:])
    hidden = 40 * 32 * 4
    assert ours <= apart
    if gated:  # the separate layers keep act(gate) for the gradient of up, too
        spared = hidden * (activation != "relu") + (hidden - hidden // 4) * (dropout > 0)
        assert apart - ours >= spared


def test_a_frozen_layer_keeps_no_input() -> None:
    x, up, up_bias, down, down_bias = operands((40, 16), 32, False)
    x.requires_grad_()
    kept = saved_bytes(
        lambda: SF.mlp(x, up, up_bias, down, down_bias, config=MAGNITUDE), [up, down]
    )
    assert kept == 40 * 32 * 8, "pre alone"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@GATED
def test_autocast(dtype: torch.dtype, gated: bool) -> None:
    tensors, results = operands((6, 16), 32, gated, torch.float32), []
    for layer in (fused, separate):
        leaves = [t.clone().requires_grad_() for t in tensors]
        with torch.autocast("cpu", dtype=dtype):
            output = layer(*leaves, config=sdgp.SDGPConfig(n=3, m=4, prune="magnitude"))
        assert output.dtype == dtype
        output.float().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    assert torch.equal(results[0][0], results[1][0])
    for i, (one, other) in enumerate(zip(*results, strict=True)):
        assert one.dtype == (dtype if i == 0 else torch.float32)
        if i != 1:  # rounding decides which of two nearly equal gradients survives
            bound = 8 * torch.finfo(dtype).eps * other.abs().max()
            assert (one - other).abs().max() <= bound


@GATED
def test_activation_checkpointing_gives_the_same_gradients(gated: bool) -> None:
    config = sdgp.SDGPConfig(prune="mvue")
    tensors = operands((6, 16), 32, gated)
    layer = lambda *t: fused(*t, config=config, dropout=0.4)
    plain = gradients(layer, *tensors)
    for reentrant in (False, True):
        leaves = [t.clone().requires_grad_() for t in tensors]
        torch.manual_seed(1)
        output = checkpoint(layer, *leaves, use_reentrant=reentrant)
        grad_output = torch.linspace(-1, 1, output.numel()).view(output.shape).double()
        output.backward(grad_output)
        assert torch.equal(output, plain[0])
        for leaf, expected in zip(leaves, plain[1:], strict=True):
            assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("wrt", [0, 1])
def test_double_backward_raises(wrt: int) -> None:
    tensors = [t.requires_grad_() for t in operands((4, 16), 32, False)]
    output = fused(*tensors, config=MAGNITUDE, down_config=NONE).square().sum()
    (grad,) = torch.autograd.grad(output, tensors[wrt], create_graph=True)
    with pytest.raises(sdgp.SDGPError, match="second derivative"):
        grad.sum().backward()


def test_forward_mode_and_batched_gradients_raise() -> None:
    tensors = [t.requires_grad_() for t in operands((4, 16), 32, False)]
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(sdgp.SDGPError, match="forward-mode"),
    ):
        dual = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        fused(dual, *tensors[1:], config=MAGNITUDE)
    output = fused(*tensors, config=MAGNITUDE, down_config=NONE)
    with pytest.raises(sdgp.SDGPError, match="one gradient at a time"):
        torch.autograd.grad(output, tensors, torch.ones(3, 4, 12).double(), is_grads_batched=True)


@GATED
def test_transforms_of_torch_func_take_the_separate_layers(gated: bool) -> None:
    tensors = operands((4, 16), 32, gated)
    config = sdgp.SDGPConfig(prune="magnitude")
    results = [
        torch.func.grad(lambda x, layer=layer: layer(x, *tensors[1:], config=config).sum())(
            tensors[0]
        )
        for layer in (fused, separate)
    ]
    assert torch.equal(*results)


@GATED
def test_compiled_whole(gated: bool) -> None:
    tensors = operands((6, 16), 32, gated)
    layer = lambda *t: fused(*t, config=BOTH)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_near(gradients(compiled, *tensors), gradients(layer, *tensors), terms=32)


def test_nothing_pruned_is_torchs_own() -> None:
    tensors = [t.requires_grad_() for t in operands((4, 16), 32, False)]
    output = fused(*tensors, config=NONE)
    assert type(output.grad_fn.next_functions[1][0]).__name__ == "GeluBackward0"
    assert torch.autograd.gradcheck(lambda *t: fused(*t, config=NONE), tensors)


@GATED
def test_weights_that_are_pruned_themselves_run_apart(gated: bool) -> None:
    config = MAGNITUDE.replace(forward="sparse_weight")
    tensors = operands((6, 16), 32, gated)
    ours = gradients(lambda *t: fused(*t, config=config), *tensors)
    assert_near(ours, gradients(lambda *t: separate(*t, config=config), *tensors), terms=32)
    assert not torch.allclose(ours[0], separate(*tensors, config=NONE))


@pytest.mark.parametrize(
    "change, error",
    [
        ({"activation": "tanh"}, "mlp: activation must be one of gelu, gelu_tanh, .* got 'tanh'"),
        ({"dropout": 1.5}, "mlp: dropout must be in 0..1, got 1.5"),
        ({"config": {}}, "mlp: config must be an SDGPConfig, got dict"),
        ({"down_config": "none"}, "mlp: config must be an SDGPConfig, got str"),
        ({"config": sdgp.SDGPConfig(schedule=sdgp.Schedule(total_steps=9))}, "without a schedule"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: str) -> None:
    for gated in (False, True):
        options = {"config": MAGNITUDE} | change
        with pytest.raises((TypeError, ValueError), match=error):
            fused(*operands((4, 16), 32, gated), **options)
