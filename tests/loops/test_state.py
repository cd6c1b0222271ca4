"""State dicts and optimizer state of converted models; converting compiled ones."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sdgp_cusparselt as sdgp


class Net(nn.Module):
    """A convolution between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 64)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.last = nn.Linear(128, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(self.first(x).view(-1, 4, 4, 4)).flatten(1))


def converted(config: sdgp.SDGPConfig) -> Net:
    torch.manual_seed(0)
    model = Net()
    sdgp.convert_(model, config, filter_fn=lambda module, name: True)
    return model


def test_state_dicts_move_both_ways() -> None:
    torch.manual_seed(1)
    plain = Net()
    config = sdgp.SDGPConfig(prune="rescaled_magnitude", backend="dense")
    model = converted(config.replace(schedule=sdgp.Schedule(warmup=2)))
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
