"""The operators: schemas and fakes checked by torch, and whole models compiled without a break."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.recording.records import COMPILED, LayerRecord, record_of
from tests.products.operator_samples import CONFIG, samples


def registered() -> set[str]:
    """Return the names of the operators in torch.ops.sdgp."""
    schemas = torch._C._jit_get_all_schemas()
    return {s.name.removeprefix("sdgp::") for s in schemas if s.name.startswith("sdgp::")}


def test_every_operator_has_samples() -> None:
    assert registered() == {name.split()[0] for name in samples()}


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.sdgp, name.split()[0]), samples()[name])


def test_an_operator_gives_what_dispatch_gives() -> None:
    record = LayerRecord("here")
    grad_output, weight = torch.randn(2, 3, 8), torch.randn(8, 12)
    result = torch.ops.sdgp.linear_grad_input(grad_output, weight, CONFIG.text, record.token)
    torch.testing.assert_close(result, sdgp.prune(grad_output) @ weight)
    assert record.calls["grad_input", "emulated"] == 1


def test_records_do_not_share_a_token() -> None:
    record = LayerRecord("here")
    twin = copy.deepcopy(record)
    assert twin.name == "here" and twin.token != record.token
    assert record_of(record.token) is record
    token = twin.token
    del twin
    assert record_of(token).name == "sdgp.functional"


class Net(nn.Module):
    """A convolution, a strided grouped one, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding="same")
        self.body = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.stem(x)))
        return self.mlp(x.flatten(2).transpose(1, 2)).square().mean()


def steps(model: nn.Module, run: nn.Module, count: int = 3) -> list[Tensor]:
    """Train run a few steps and return the parameters of model."""
    torch.manual_seed(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(count):
        optimizer.zero_grad()
        run(torch.randn(2, 3, 8, 8, dtype=torch.float64)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("method", ["magnitude", "rescaled_magnitude"])
@pytest.mark.parametrize("grad_weight", ["dense", "sparse"])
def test_a_converted_model_compiles_without_breaks_or_recompiles(
    method: str, grad_weight: str
) -> None:
    torch._dynamo.reset()
    config = CONFIG.replace(prune=method, grad_weight=grad_weight, grad_weight_prune="magnitude")
    before = COMPILED.calls["grad_input", "emulated"]
    model = Net().double()  # in float32 rounding decides which of two near gradients survives
    sdgp.convert_(model, config)
    eager = copy.deepcopy(model)
    expected = steps(eager, eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        result = steps(model, compiled)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert COMPILED.calls["grad_input", "emulated"] == before + 3 * 3
    assert not model.mlp[0].sdgp_record.calls


def test_inductor_runs_a_converted_model() -> None:
    torch._dynamo.reset()
    model = Net().double()  # in float32 rounding decides which of two near gradients survives
    sdgp.convert_(model, sdgp.SDGPConfig(prune="magnitude"))
    eager = copy.deepcopy(model)
    expected = steps(eager, eager, 2)
    result = steps(model, torch.compile(model, fullgraph=True), 2)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b)


class Block(nn.Module):
    """One block of a model that is compiled block by block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


@pytest.mark.parametrize("telemetry_every, compilations", [(0, 1), (1, 4)])
def test_blocks_compiled_one_by_one_share_their_code(
    telemetry_every: int, compilations: int
) -> None:
    torch._dynamo.reset()
    blocks = nn.ModuleList(Block() for _ in range(4))
    sdgp.convert_(blocks, CONFIG.replace(telemetry_every=telemetry_every))
    counter = CompileCounterWithBackend("aot_eager")
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    x = start = torch.randn(4, 16, requires_grad=True)
    for block in blocks:
        x = block(x)
    x.sum().backward()
    assert start.grad is not None
    # The first block's input is a leaf, the others' is not: that much recompiling is torch's own.
    assert counter.frame_count <= compilations + 1
    calls = [block.linear.sdgp_record.calls["grad_input", "emulated"] for block in blocks]
    assert calls == [min(telemetry_every, 1)] * 4


def test_switching_layers_off_is_seen_by_compiled_code() -> None:
    torch._dynamo.reset()
    layer = nn.Linear(16, 16)
    sdgp.convert_(layer, sdgp.SDGPConfig(prune="magnitude"))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 16, requires_grad=True)
    grad_output = torch.randn(8, 16)
    for enabled in (True, False, True):
        sdgp.set_enabled_(layer, enabled)
        x.grad = None
        compiled(x).backward(grad_output)
        g = sdgp.prune(grad_output) if enabled else grad_output
        torch.testing.assert_close(x.grad, g @ layer.weight.detach())


def test_double_backward_raises_through_compiled_layers_too() -> None:
    torch._dynamo.reset()
    layer = nn.Linear(8, 8)
    sdgp.convert_(layer, sdgp.SDGPConfig(prune="magnitude"))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_a_compiled_transform_runs_a_pruned_layer_in_eager_mode() -> None:
    """The compiler's own way gives another gradient there, without a word."""
    torch._dynamo.reset()
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    sdgp.convert_(layer, CONFIG)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: layer(x).square().sum())(x)

    expected = gradient(x)
    assert torch.equal(torch.compile(gradient, backend="aot_eager")(x), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(gradient, backend="aot_eager", fullgraph=True)(x)


def test_differentiating_an_operator_says_why_not() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    y = torch.ops.sdgp.prune(x, "magnitude", 2, 4, -1)
    with pytest.raises(sdgp.SDGPError, match="an operator was differentiated"):
        y.sum().backward()
