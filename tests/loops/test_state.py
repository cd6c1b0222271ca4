"""Loss scaling, state dicts and optimizer state of converted models; converting compiled ones."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.patterns import METHODS


class Plant(torch.autograd.Function):
    """Hands the input on; in backward, sets one element of grad_output."""

    @staticmethod
    def forward(ctx, x: Tensor, at: int, value: float) -> Tensor:
        ctx.at, ctx.value = at, value
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        spoilt = grad.clone()
        spoilt.view(-1)[ctx.at] = ctx.value
        return spoilt, None, None


class Net(nn.Module):
    """A convolution between linear layers; ``plant`` spoils the grad_output of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 64)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.last = nn.Linear(128, 8)
        self.plant: dict[str, tuple[int, float]] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self._out("first", self.first(x))
        x = self._out("conv", self.conv(x.view(-1, 4, 4, 4)))
        return self._out("last", self.last(x.flatten(1)))

    def _out(self, name: str, x: Tensor) -> Tensor:
        return Plant.apply(x, *self.plant[name]) if name in self.plant else x


def converted(config: sdgp.SDGPConfig) -> Net:
    torch.manual_seed(0)
    model = Net()
    sdgp.convert_(model, config, filter_fn=lambda module, name: True)
    return model


CONFIGS = [sdgp.SDGPConfig(prune=method, backend="dense") for method in METHODS]
CONFIGS += [CONFIGS[2].replace(beta=0.5), CONFIGS[4].replace(grad_weight="sparse")]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.describe())
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("layer", ["first", "conv", "last"])
def test_the_scaler_sees_what_is_planted_in_any_grad_output(
    config: sdgp.SDGPConfig, value: float, layer: str
) -> None:
    """Planted at every place of a group, among larger and smaller neighbours."""
    model = converted(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    weights = copy.deepcopy(model.state_dict())
    for number, at in enumerate((0, 1, 2, 3, 13), start=1):
        model.plant = {layer: (at, value)}
        with torch.autocast("cpu", torch.float16):
            loss = model(torch.randn(6, 16)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == 2.0 ** (10 - number), "halved once more"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), "every step was skipped"


def reaches_the_first_layer(method: str) -> list[bool]:
    """Plant an Inf above frozen layers, in every place of two groups; return where it came down."""
    model = converted(sdgp.SDGPConfig(prune=method, backend="dense"))
    for name in ("conv", "last"):
        getattr(model, name).requires_grad_(False)
    seen = []
    for at in range(8):
        model.plant = {"last": (at, torch.inf)}
        model.zero_grad()
        model(torch.randn(6, 16)).square().mean().backward()
        seen.append(not model.first.weight.grad.isfinite().all())
    return seen


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"random"}))
def test_an_overflow_goes_through_frozen_layers(method: str) -> None:
    assert all(reaches_the_first_layer(method))


def test_random_alone_may_drop_an_overflow_above_frozen_layers() -> None:
    """It draws without looking; a layer with a trainable weight or bias shows it all the same."""
    seen = reaches_the_first_layer("random")
    assert any(seen) and not all(seen)


def test_without_an_overflow_the_scaler_keeps_its_scale() -> None:
    model = converted(CONFIGS[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(model(torch.randn(6, 16)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10


def test_state_dicts_move_both_ways() -> None:
    torch.manual_seed(1)
    plain = Net()
    model = converted(CONFIGS[3].replace(schedule=sdgp.Schedule(warmup=2)))
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(3, 16)
    assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        model.first.weight.add_(1)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adagrad], ids=str)
def test_optimizer_state_survives_convert_and_revert(make) -> None:
    """A run that converts and reverts with pruning off is the run that never did."""

    def run(convert: bool) -> dict[str, Tensor]:
        torch.manual_seed(2)
        model = Net()
        optimizer = make(model.parameters(), lr=0.01)
        for number in range(6):
            if convert and number == 2:
                sdgp.convert_(model, sdgp.SDGPConfig(prune="none"), lambda *_: True)
            if convert and number == 4:
                assert sdgp.revert_(model) == ["first", "conv", "last"]
            model(torch.randn(6, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        states = [optimizer.state[p] for p in model.parameters()]
        assert all(int(state["step"]) == 6 for state in states)
        return {f"{i} {k}": v for i, state in enumerate(states) for k, v in state.items()} | dict(
            model.named_parameters()
        )

    plain, switched = run(False), run(True)
    for name, tensor in plain.items():
        assert torch.equal(tensor, switched[name]), name


def test_a_compiled_model_is_converted_and_reverted_inside_its_wrapper() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    grad_output = torch.randn(8, 16)

    def grad(module: nn.Module) -> Tensor:
        torch.manual_seed(1)
        x = torch.randn(8, 16, requires_grad=True)
        module(x).backward(grad_output)
        assert x.grad is not None
        return x.grad

    dense = grad(compiled)
    assert sdgp.convert_(
        compiled, sdgp.SDGPConfig(prune="magnitude", backend="dense")
    ).converted == ["0", "2"]
    pruned = grad(compiled)
    assert counter.frame_count == 2
    assert not torch.allclose(pruned, dense)
    torch.testing.assert_close(pruned, grad(model))
    assert sdgp.revert_(compiled) == ["0", "2"]
    torch.testing.assert_close(grad(compiled), dense)
    assert counter.frame_count == 2, "the dense code is still there"
