"""Backend choice: reasons, one good error, announcements that can be counted and forbidden."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.base import Problem
from sdgp_cusparselt.backends.dense import DenseBackend
from sdgp_cusparselt.products import dispatch


class Picky(DenseBackend):
    """Calls itself cusparselt and refuses what it is told to refuse."""

    name = "cusparselt"

    def __init__(self, machine: list[str], odd: list[str]) -> None:
        self.machine, self.odd = machine, odd

    def machine_reasons(self) -> list[str]:
        return self.machine

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        return self.machine or (self.odd if problem.k % 16 else [])


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Picky]:
    backend = Picky([], ["K is no multiple of 16", "the moon is full"])
    monkeypatch.setattr(dispatch, "BACKENDS", [backend, DenseBackend()])
    monkeypatch.setattr(dispatch, "_machine_announced", set())
    yield backend


def step(layer: nn.Module, width: int = 16) -> None:
    layer(torch.randn(4, width, requires_grad=True)).sum().backward()


def converted(out_features: int, **kwargs: object) -> nn.Linear:
    layer = nn.Linear(16, out_features)
    sdgp.convert_(layer, sdgp.SDGPConfig(**kwargs))
    return layer


def test_the_preferred_backend_runs_what_it_can(picky: Picky) -> None:
    layer = converted(32)
    step(layer)
    assert dict(layer.sdgp_record.calls) == {("grad_input", "cusparselt"): 1}
    assert not layer.sdgp_record.fallbacks


def test_a_fallback_is_announced_once_per_layer_and_reason_and_counted(picky: Picky) -> None:
    layer = converted(20)
    with pytest.warns(sdgp.SDGPFallbackWarning) as caught:
        step(layer)
    assert len(caught) == 2
    assert "Linear: grad_input runs on the dense backend instead of cusparselt: K is no" in str(
        caught[0].message
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(layer)
    record = layer.sdgp_record
    assert record.calls["grad_input", "dense"] == 2
    assert record.fallbacks["grad_input", "cusparselt", "the moon is full"] == 2
    with pytest.warns(sdgp.SDGPFallbackWarning):
        step(converted(20))


def test_a_fallback_can_be_forbidden(picky: Picky) -> None:
    with pytest.raises(sdgp.NotSupportedError) as caught:
        step(converted(20, on_unsupported="raise"))
    text = str(caught.value)
    for word in (
        "[M=4, K=20] @ [K=20, N=16]",
        "torch.float32",
        "cusparselt is out because",
        "moon",
    ):
        assert word in text
    assert isinstance(caught.value, NotImplementedError)


def test_forced_dense_is_no_fallback(picky: Picky) -> None:
    layer = converted(20, backend="dense", on_unsupported="raise")
    step(layer)
    assert dict(layer.sdgp_record.calls) == {("grad_input", "dense"): 1}
    assert not layer.sdgp_record.fallbacks


def test_one_warning_stands_for_a_machine_without_the_hardware(picky: Picky) -> None:
    picky.machine = ["no GPU of compute capability 8.0 or more"]
    with pytest.warns(sdgp.SDGPFallbackWarning, match="every layer runs on the dense") as caught:
        step(converted(16))
        step(converted(32))
    assert len(caught) == 1
    with pytest.warns(sdgp.SDGPFallbackWarning, match="Linear: grad_input"):
        step(converted(16, backend="cusparselt"))


def test_both_products_are_counted(picky: Picky) -> None:
    layer = converted(32, grad_weight="sparse")
    layer(torch.randn(48, 16, requires_grad=True)).sum().backward()
    assert set(layer.sdgp_record.calls) == {
        ("grad_input", "cusparselt"),
        ("grad_weight", "cusparselt"),
    }


def test_problem_sizes_of_a_grouped_convolution(picky: Picky, monkeypatch) -> None:
    seen: list[Problem] = []
    monkeypatch.setattr(picky, "not_supported_reasons", lambda p: seen.append(p) or [])
    layer = nn.Conv2d(8, 32, 3, groups=2, stride=2)
    sdgp.convert_(layer)
    layer(torch.randn(5, 8, 9, 9, requires_grad=True)).sum().backward()
    (problem,) = seen
    assert (problem.m, problem.k, problem.n) == (5 * 4 * 4, 16, 4 * 9)
    assert problem.kernel_size == (3, 3) and problem.conv.stride == (2, 2)
    assert "convolution" in problem.describe()


def test_backend_status(picky: Picky) -> None:
    assert sdgp.backend_status()[0] == ("cusparselt", True, "available")
    picky.machine = ["no GPU"]
    assert sdgp.backend_status() == [
        ("cusparselt", False, "no GPU"),
        ("dense", True, "available"),
    ]
