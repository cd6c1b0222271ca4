"""A loss scaler sees every overflow of a converted model, whatever prunes its gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.config.patterns import METHODS

LAYERS = ("linear", "conv", "conv1d")
#: Every place of a group, twice, so that what is drawn differs.
PLACES = (0, 1, 2, 3, 4, 5, 6, 7)
INIT_SCALE = 2.0**10


class Plant(torch.autograd.Function):
    """Hands the input on; in backward, sets one element of grad_output."""

    @staticmethod
    def forward(ctx, x: Tensor, place: int, value: float) -> Tensor:
        ctx.place, ctx.value = place, value
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        spoilt, at = grad.clone(), ctx.place
        # The same place of its group along features or channels as along tokens or pixels.
        spoilt[(at, at) if grad.ndim == 2 else (0, at, at // 4, at % 4)] = ctx.value
        return spoilt, None, None


class Net(nn.Module):
    """Each kind of layer that converts, with one below it that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Linear(16, 32)
        self.linear = nn.Linear(32, 64)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.conv1d = Conv1D(12, 128)
        self.plant: dict[str, tuple[int, float]] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self._out("linear", self.linear(self.below(x)))
        x = self._out("conv", self.conv(x.view(-1, 4, 4, 4)))
        return self._out("conv1d", self.conv1d(x.flatten(1)))

    def _out(self, name: str, x: Tensor) -> Tensor:
        return Plant.apply(x, *self.plant[name]) if name in self.plant else x


def converted(config: sdgp.SDGPConfig, layer: str, trainable: str) -> Net:
    """Return a model of which all is trained, or what lies below a layer, or its weight."""
    torch.manual_seed(0)
    model = Net()
    report = sdgp.convert_(model, config, filter_fn=lambda module, name: name in LAYERS)
    assert report.converted == list(LAYERS)
    names = list(dict(model.named_children()))
    below = tuple(f"{name}." for name in names[: names.index(layer)])
    for name, parameter in model.named_parameters():
        wanted = {"below": name.startswith(below), "weight": name == f"{layer}.weight"}
        parameter.requires_grad_(wanted.get(trainable, True))
    return model


def config_of(method: str, grad_weight: str) -> sdgp.SDGPConfig:
    config = sdgp.SDGPConfig(prune=method, backend="dense", grad_weight=grad_weight)
    return config.replace(grad_weight_prune=method)


CONFIGS = [config_of(method, kind) for method in METHODS for kind in ("dense", "sparse")]
CONFIGS.append(sdgp.SDGPConfig(beta=0.5, backend="dense"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.describe())
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("trainable", ["all", "below", "weight"])
def test_the_scaler_sees_what_is_planted_in_any_grad_output(
    config: sdgp.SDGPConfig, value: float, layer: str, trainable: str
) -> None:
    """Planted at every place of a group; each time the step is skipped and the scale halved."""
    model = converted(config, layer, trainable)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE)
    weights = copy.deepcopy(model.state_dict())
    for number, place in enumerate(PLACES, start=1):
        model.plant = {layer: (place, value)}
        with torch.autocast("cpu", torch.float16):
            loss = model(torch.randn(8, 16)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == INIT_SCALE / 2**number, "halved once more"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), f"{name}: a step was taken"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.describe())
def test_without_an_overflow_the_scaler_keeps_its_scale(config: sdgp.SDGPConfig) -> None:
    model = converted(config, "conv", "all")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE)
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.float16):
        loss = model(torch.randn(8, 16)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == INIT_SCALE
    assert not any(torch.equal(t, before[n]) for n, t in model.state_dict().items())
