"""The way of a product: reasons, one good error, announcements that are counted and forbidden."""

import warnings

import pytest
import torch
from torch import nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.products import routes
from sdgp_cusparselt.products.operands import Conv2dGradInput, LinearGradWeight


class Bare(Machine):
    """A CPU with sparse tensor cores and without a library; or without the cores, if told so."""

    def __init__(self, hardware: list[str], software: list[str]) -> None:
        super().__init__("cpu")
        self.hardware, self.software = hardware, software

    def hardware_reasons(self, device: torch.device | None = None) -> list[str]:
        return self.hardware

    def software_reasons(self) -> list[str]:
        return self.software


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Bare:
    machine = Bare([], ["the moon is full"])
    monkeypatch.setattr(routes, "LIBRARY", CusparseLtBackend(machine))
    return machine


def step(layer: nn.Module, width: int = 16) -> None:
    layer(torch.randn(4, width, requires_grad=True)).sum().backward()


def converted(out_features: int, **kwargs: object) -> nn.Linear:
    layer = nn.Linear(16, out_features)
    sdgp.convert_(layer, sdgp.SDGPConfig(**kwargs))
    return layer


def test_a_reason_is_announced_once_and_counted_for_every_layer(machine: Bare) -> None:
    first, second = converted(20), converted(20)
    with pytest.warns(sdgp.SDGPFallbackWarning) as caught:
        step(first)
        step(second)
        step(converted(36))  # the same reasons but for a number
    (warning,) = caught
    words = "Linear: grad_input runs plain, as without this package, because the moon is full; "
    assert str(warning.message).startswith(words)
    assert "sdgp.telemetry" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(first)
    assert first.sdgp_record.calls == {("grad_input", "plain"): 2}
    assert first.sdgp_record.fallbacks["grad_input", "the moon is full"] == 2
    assert second.sdgp_record.fallbacks["grad_input", "the moon is full"] == 1
    assert "not sparse (2 calls) because the moon is full" in str(sdgp.telemetry(first))


def test_another_way_can_be_forbidden(machine: Bare) -> None:
    with pytest.raises(sdgp.NotSupportedError) as caught:
        step(converted(20, on_unsupported="raise"))
    text = str(caught.value)
    for word in ("[M=4, K=20] @ [K=20, N=16]", "torch.float32", "because:", "moon"):
        assert word in text
    assert isinstance(caught.value, NotImplementedError)


@pytest.mark.parametrize("on_unsupported, way", [("plain", "plain"), ("emulate", "emulated")])
def test_what_cannot_run_sparse_runs_as_asked(machine: Bare, on_unsupported: str, way: str) -> None:
    layer = converted(32, prune="magnitude", on_unsupported=on_unsupported)
    x, grad_output = torch.randn(4, 16, requires_grad=True), torch.randn(4, 32)
    with pytest.warns(sdgp.SDGPFallbackWarning, match=f"runs {way}"):
        layer(x).backward(grad_output)
    assert layer.sdgp_record.calls == {("grad_input", way): 1}
    gradient = grad_output if way == "plain" else sdgp.prune(grad_output)
    assert torch.equal(x.grad, gradient @ layer.weight.detach())


def test_backend_dense_is_emulated_and_no_fallback(machine: Bare) -> None:
    layer = converted(20, backend="dense", on_unsupported="raise")
    step(layer)
    assert layer.sdgp_record.calls == {("grad_input", "emulated"): 1}
    assert not layer.sdgp_record.fallbacks


@pytest.mark.parametrize("choice", [{"n": 2, "m": 8}, {"beta": 0.5}])
def test_patterns_without_hardware_were_asked_for(machine: Bare, choice: dict) -> None:
    layer = converted(32, **choice)
    with pytest.warns(sdgp.SDGPFallbackWarning, match="runs emulated") as caught:
        step(layer)
        step(layer)
    assert len(caught) == 1
    assert layer.sdgp_record.calls == {("grad_input", "emulated"): 2}


def test_one_warning_stands_for_a_machine_without_the_hardware(machine: Bare) -> None:
    machine.hardware = ["compute capability is 7.0, sparse tensor cores need 8.0"]
    with pytest.warns(sdgp.SDGPFallbackWarning, match="every layer is emulated") as caught:
        step(converted(16))
        step(converted(32, grad_weight="sparse"))
    assert len(caught) == 1
    forced = converted(16, backend="cusparselt", prune="magnitude")
    step(forced)
    assert forced.sdgp_record.calls == {("grad_input", "plain"): 1}


def test_both_products_are_counted(machine: Bare) -> None:
    machine.hardware = ["no GPU"]
    layer = converted(32, grad_weight="sparse")
    with pytest.warns(sdgp.SDGPFallbackWarning):
        layer(torch.randn(48, 16, requires_grad=True)).sum().backward()
    assert layer.sdgp_record.calls == {
        ("grad_input", "emulated"): 1,
        ("grad_weight", "emulated"): 1,
    }


def test_problem_sizes_of_a_grouped_convolution() -> None:
    layer = nn.Conv2d(8, 32, 3, groups=2, stride=2)
    input = torch.randn(5, 8, 9, 9)
    output = layer(input)
    conv = ConvGeometry((2, 2), (0, 0), (1, 1), 2)
    problem = Conv2dGradInput(output, layer.weight, input, conv).problem(sdgp.SDGPConfig())
    assert (problem.m, problem.k, problem.n) == (5 * 4 * 4, 16, 4 * 9)
    assert problem.kernel_size == (3, 3) and problem.conv.stride == (2, 2)
    assert "convolution" in problem.describe()


def test_backend_status(machine: Bare) -> None:
    machine.software = []
    assert sdgp.backend_status()[0] == ("cusparselt", True, "available")
    machine.hardware = ["no GPU"]
    assert sdgp.backend_status() == [
        ("cusparselt", False, "no GPU"),
        ("dense", True, "available"),
    ]


@pytest.mark.parametrize("row_major", [True, False])
def test_a_plain_grad_weight_is_autograds_own_to_bits_and_strides(row_major: bool) -> None:
    x, grad_output = torch.randn(300, 33), torch.randn(300, 17)
    weight = torch.randn(17, 33) if row_major else torch.randn(33, 17).t()
    weight.requires_grad_()
    torch.nn.functional.linear(x, weight).backward(grad_output)
    ours = LinearGradWeight(grad_output, x, row_major).plain()
    assert torch.equal(ours, weight.grad)
    assert (ours.stride() == (33, 1)) == row_major
