"""Where nothing is pruned a layer is torch's own; where something is, it says what it refuses."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.config.schedule import Schedule
from sdgp_cusparselt.products import routes
from tests.helpers import assert_product

PRUNED = sdgp.SDGPConfig(prune="magnitude")
PLAIN = sdgp.SDGPConfig(prune="none")
DENSE_STAGE = sdgp.SDGPConfig(schedule=Schedule(total_steps=4, warmup=2))


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(8, 4)


#: kind -> (layer, shape of its input)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 8), (3, 5, 4)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 5, 5)),
    "conv1d": (conv1d, (3, 5, 4)),
}


def pair(kind: str, config: sdgp.SDGPConfig) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a converted layer, its plain twin, and an input, in float64."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    plain = make().double()
    ours = copy.deepcopy(plain)
    sdgp.convert_(ours, config, filter_fn=lambda module, name: True)
    return ours, plain, torch.randn(shape, dtype=torch.float64)


def of_parameters(layer: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda parameters: functional_call(layer, parameters, (x,)).square().sum()


def second_derivatives(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    return list(torch.autograd.grad(first.square().sum(), [x, *layer.parameters()][:2]))


def transformed(layer: nn.Module, x: Tensor) -> list[Tensor]:
    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    loss = lambda x: layer(x).square().sum()
    _, tangent = jvp(layer, (x,), (torch.ones_like(x),))
    per_sample = vmap(lambda sample: grad(loss)(sample[None]))(x)
    of_weight = grad(of_parameters(layer, x))(parameters)["weight"]
    return [grad(loss)(x), jacrev(layer)(x[:1]), vmap(layer)(x), tangent, per_sample, of_weight]


def batched(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    seeds = torch.randn(3, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad(y, x, seeds, is_grads_batched=True))


@pytest.mark.parametrize("ask", [second_derivatives, transformed, batched])
@pytest.mark.parametrize("config", [PLAIN, DENSE_STAGE], ids=["none", "dense stage"])
@pytest.mark.parametrize("kind", LAYERS)
def test_without_pruning_autograd_does_what_it_does_for_the_plain_layer(
    kind: str, config: sdgp.SDGPConfig, ask: Callable[[nn.Module, Tensor], list[Tensor]]
) -> None:
    ours, plain, x = pair(kind, config)
    for a, b in zip(ask(ours, x), ask(plain, x), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("kind", LAYERS)
def test_without_pruning_the_graph_is_that_of_the_plain_layer(kind: str) -> None:
    ours, plain, x = pair(kind, PLAIN)
    x.requires_grad_()
    assert type(ours(x).grad_fn) is type(plain(x).grad_fn)
    sdgp.set_enabled_(ours, False)
    assert type(ours(x).grad_fn) is type(plain(x).grad_fn)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_whose_input_needs_no_gradient_is_torchs_own(kind: str) -> None:
    ours, plain, x = pair(kind, PRUNED)
    assert type(ours(x).grad_fn) is type(plain(x).grad_fn)
    assert "Transformed" in type(ours(x.requires_grad_()).grad_fn).__name__


@pytest.mark.parametrize("ask", [second_derivatives, batched])
@pytest.mark.parametrize("kind", LAYERS)
def test_under_pruning_second_and_batched_gradients_are_refused(
    kind: str, ask: Callable[[nn.Module, Tensor], list[Tensor]]
) -> None:
    ours, _, x = pair(kind, PRUNED)
    with pytest.raises(sdgp.SDGPError, match="SDGP: .*set_enabled_"):
        ask(ours, x)


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "jacrev": lambda layer, x: jacrev(layer)(x),
    "jvp": lambda layer, x: jvp(layer, (x,), (torch.ones_like(x),)),
    "hessian": lambda layer, x: hessian(lambda x: layer(x).square().sum())(x),
    "per-sample gradients": lambda layer, x: vmap(grad(lambda x: layer(x).square().sum()))(x),
    "second derivative": lambda layer, x: grad(
        lambda x: grad(lambda x: layer(x).square().sum())(x).sum()
    )(x),
    "vmap over weights": lambda layer, x: vmap(lambda w: functional_call(layer, {"weight": w}, x))(
        torch.stack([layer.weight, layer.weight])
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_under_pruning_transforms_that_have_no_meaning_are_refused(kind: str, name: str) -> None:
    ours, _, x = pair(kind, PRUNED)
    with pytest.raises(sdgp.SDGPError, match="SDGP: .*set_enabled_"):
        TRANSFORMS[name](ours, x)


@pytest.mark.parametrize("kind", LAYERS)
def test_under_pruning_a_first_gradient_by_torch_func_is_the_pruned_one(kind: str) -> None:
    ours, plain, x = pair(kind, PRUNED)
    leaf = x.clone().requires_grad_()
    ours(leaf).square().sum().backward()
    assert torch.equal(grad(lambda x: ours(x).square().sum())(x), leaf.grad)
    of_weight = grad(of_parameters(ours, x))({k: p.detach() for k, p in ours.named_parameters()})
    assert torch.equal(of_weight["weight"], ours.weight.grad)
    assert not torch.equal(leaf.grad, grad(lambda x: plain(x).square().sum())(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_under_pruning_a_batch_that_vmap_maps_over_is_one_batch(kind: str) -> None:
    ours, _, x = pair(kind, PRUNED)
    one, mapped = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours(one).square().sum().backward()
    vmap(lambda sample: ours(sample).square().sum())(mapped).sum().backward()
    torch.testing.assert_close(mapped.grad, one.grad)


def test_tensors_that_outlive_a_transform_are_tensors() -> None:
    ours, _, x = pair("linear", PRUNED)
    leaked: list[Tensor] = []
    grad(lambda x: leaked.append(x) or x.sum())(x)  # type: ignore[func-returns-value]
    grad(lambda w: leaked.append(w) or w.sum())(ours.weight.detach())  # type: ignore[func-returns-value]
    grads = []
    for input, weight in ((leaked[0], leaked[1]), (x, ours.weight.detach())):
        leaf = torch.zeros_like(x, requires_grad=True)
        sdgp.functional.linear(leaf + input, weight, config=PRUNED).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_a_gradient_of_a_gradient_that_is_constant_needs_no_derivative() -> None:
    """Frozen weights and a gradient that is a constant: nothing of ours is differentiated."""
    ours, _, x = pair("linear", PRUNED)
    ours.requires_grad_(False)
    x.requires_grad_()
    y = ours(x)
    grad_output = torch.randn_like(y)
    (first,) = torch.autograd.grad(y, x, grad_output, create_graph=True)
    (first * x).sum().backward()
    assert torch.equal(x.grad, first)
    pruned = sdgp.prune(grad_output).reshape(-1, 8)
    assert_product(first.reshape(-1, 4), pruned, ours.weight)


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with sparse tensor cores and no library for them: every product runs plain."""

    class Bare(Machine):
        def hardware_reasons(self, device: torch.device | None = None) -> list[str]:
            return []

        def software_reasons(self) -> list[str]:
            return ["there is no library"]

    monkeypatch.setattr(routes, "LIBRARY", CusparseLtBackend(Bare("cpu")))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore::sdgp_cusparselt.SDGPFallbackWarning")
@pytest.mark.usefixtures("without_library")
def test_once_a_layer_is_known_to_run_plain_it_is_torchs_own(kind: str, autocast: bool) -> None:
    ours, plain, x = pair(kind, PRUNED)
    ours.float(), plain.float()
    x = x.float().requires_grad_()
    calls = ours.sdgp_record.calls
    for number, node in enumerate(("Transformed", type(plain(x).grad_fn).__name__)):
        grads = []
        for layer in (ours, plain):
            x.grad = None
            layer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = layer(x)
            y.square().sum().backward()
            assert layer is plain or node in type(y.grad_fn).__name__
            grads.append([x.grad, *(p.grad for p in layer.parameters())])
        assert all(map(torch.equal, *grads))
        assert calls["grad_input", "plain"] == number + 1
    assert ours.sdgp_record.fallbacks["grad_input", "there is no library"] == 2
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert all(map(torch.equal, second_derivatives(ours, x), second_derivatives(plain, x)))
