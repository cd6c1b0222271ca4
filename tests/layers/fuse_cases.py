"""What the tests of fuse_ share: modules that have something to fuse, and how twins compare."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sdgp_cusparselt as sdgp

MAGNITUDE = sdgp.SDGPConfig(prune="magnitude")
MVUE = sdgp.SDGPConfig(prune="mvue", grad_weight="sparse")


class Gated(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 32), nn.Linear(16, 32, bias=False)
        self.act = nn.SiLU() if act is None else act
        self.drop, self.down = nn.Dropout(0.2), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.gate(x)) * self.up(x)))


class Named(nn.Module):
    """Named as Llama's, and multiplied the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 32), nn.Linear(16, 32)
        self.down_proj, self.act_fn = nn.Linear(32, 16), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))


class Own(nn.Module):
    """Layers in a list, and an activation that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 16)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](x))
        x = F.gelu(self.layers[1](x), approximate="tanh")
        return self.layers[2](x)


class Twice(nn.Module):
    """Uses what comes before the activation once more."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        pre = self.up(x)
        return self.down(self.act(pre)) + pre


class Moody(nn.Module):
    """Is a plain chain in evaluation only."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.up(x))
        return self.down(hidden * 2 if self.training else hidden)


class Adapter(nn.Module):
    """Stands around a layer as PEFT's do."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.low = base_layer, nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.low(x).sum()


class OwnGELU(nn.GELU):
    """Computes something else, for all that one knows."""


def mlp(act: nn.Module | None = None) -> nn.Sequential:
    act = nn.GELU() if act is None else act
    return nn.Sequential(nn.Linear(16, 32), act, nn.Dropout(0.2), nn.Linear(32, 16))


def pair(model: nn.Module, config: sdgp.SDGPConfig = MAGNITUDE) -> tuple[nn.Module, nn.Module]:
    """Return a fused model, and the same unfused."""
    model = model.double()
    sdgp.convert_(model, config)
    fused = copy.deepcopy(model)
    sdgp.fuse_(fused)
    return fused, model


def run(model: Callable[[Tensor], Tensor], parameters: nn.Module) -> list[Tensor]:
    """Return output and gradients of a step that always draws the same."""
    torch.manual_seed(3)
    x = torch.randn(4, 6, 16, dtype=torch.float64, requires_grad=True)
    parameters.zero_grad()
    output = model(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad.clone() for p in parameters.parameters())]


def assert_alike(fused: nn.Module, other: nn.Module) -> None:
    ours, others = run(fused, fused), run(other, other)
    assert torch.equal(ours[0], others[0])
    for one, two in zip(ours, others, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-11)


def nodes(model: nn.Module, x: Tensor | None = None) -> int:
    """Return how many fused nodes the graph of a model's output has."""
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True) if x is None else x
    output = model(x)  # kept: some versions of torch ask nothing of a node whose graph is gone
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return sum("Activated" in type(node).__name__ for node in seen)


MODELS = {
    "mlp": (mlp, {"0": "gelu and dropout"}),
    "relu": (lambda: mlp(nn.ReLU()), {"0": "relu and dropout"}),
    "tanh": (lambda: mlp(nn.GELU("tanh")), {"0": "gelu_tanh and dropout"}),
    "gated": (Gated, {"gate": "silu gate and dropout", "up": "silu gate and dropout"}),
    "turned": (Named, {"gate_proj": "silu gate", "up_proj": "silu gate"}),
    "functions": (Own, {"layers.0": "relu", "layers.1": "gelu_tanh"}),
    "nested": (lambda: nn.Sequential(mlp(), Gated()), None),
    "deep": (
        lambda: nn.Sequential(nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 16), nn.ReLU()),
        {"0": "silu", "2": "relu"},
    ),
}
