"""The parts that a GPU run rests on: shapes, bounds, clocks in turns, readings of the driver."""

import sys
from types import SimpleNamespace

import pytest
import torch

import sdgp_cusparselt as sdgp
from bench import machine, rivals, timing
from bench.shapes import LINEARS, QUICK, Selection, convolution_cases, linear_cases
from bench.verify import WrongResultError, check_any, check_pruned, product
from sdgp_cusparselt.planner.gemms import trace_step
from sdgp_cusparselt.planner.models import load


@pytest.mark.parametrize("model", ["llama-3-8b", "gpt2-medium", "vit-l-16"])
def test_shapes_are_those_of_the_models(model: str) -> None:
    problem = load(model, batch=1, sequence=64)
    gemms = trace_step(problem.model, problem.inputs).gemms
    shapes = {(g.n, g.k) for g in gemms if g.kind == "linear" and g.role == "grad_input"}
    assert {(n, k) for name, _, n, k in LINEARS if name == model} <= shapes


def test_selection_keeps_what_is_asked_for() -> None:
    quick = [c for c in linear_cases(Selection()) if c.device_type == "cuda"]
    assert {(c.model, c.layer) for c in quick} == QUICK
    chosen = Selection(full=True, models=("vit-g-14",), tokens=(4096,), dtype=torch.float16)
    some = [c for c in linear_cases(chosen) if c.device_type == "cuda"]
    assert {(c.model, c.tokens, c.dtype) for c in some} == {("vit-g-14", 4096, torch.float16)}
    assert [c.device_type for c in convolution_cases(chosen)] == ["cpu", "cpu"]
    assert all(c.sizes("grad_weight") == (c.out_features, c.in_features, c.tokens) for c in some)


def test_the_bound_lets_a_product_pass_and_catches_a_lost_group() -> None:
    a, b = sdgp.prune(torch.randn(64, 512).bfloat16()), torch.randn(512, 32).bfloat16()
    expected = product(a, b, "it")
    assert 0 < expected.check(a @ b).of_bound <= 1
    lost = a.clone()
    lost[:, -4:] = 0
    with pytest.raises(WrongResultError, match="times its bound from it"):
        expected.check(lost @ b)
    with pytest.raises(WrongResultError):
        expected.check((a @ b).fill_(float("nan")))
    with pytest.raises(WrongResultError, match="the result is"):
        expected.check((a @ b)[:1])
    other = product(a, b + 1, "another")
    assert check_any(a @ b, other, expected).against == "it"
    with pytest.raises(WrongResultError, match="another; wrong"):
        check_any(a @ (b - 1), other, expected)


def test_a_rivals_mask_is_checked() -> None:
    x = torch.randn(8, 16).bfloat16()
    check_pruned(sdgp.prune(x), x)
    with pytest.raises(WrongResultError, match="more than two"):
        check_pruned(x, x)
    with pytest.raises(WrongResultError, match="kept value"):
        check_pruned(sdgp.prune(x) * 2, x)
    assert torch.equal(rivals.pruned_by(sdgp.prune(x), x), sdgp.prune(x))


def test_contenders_are_timed_in_turns() -> None:
    seen: list[str] = []
    times = timing.in_turns(
        [lambda: seen.append("a"), lambda: seen.append("b")], torch.device("cpu")
    )
    assert [len(rounds) for rounds in times] == [timing.CPU_ROUNDS] * 2
    assert "".join(seen) == "ab" + "ab" + "baab" * (timing.CPU_ROUNDS // 2)


class FakeNvml:
    """What nvidia-ml-py offers, of one card that hides its power draw."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __getattr__(self, name: str):
        values = {
            "nvmlSystemGetDriverVersion": b"1.2.3",
            "nvmlDeviceGetPowerManagementLimit": 400_000,
            "nvmlDeviceGetTemperature": 40,
            "nvmlDeviceGetClockInfo": 1410,
            "nvmlDeviceGetMaxClockInfo": 1500,
        }
        return lambda *_: values.get(name)

    def nvmlDeviceGetPowerUsage(self, _: object) -> int:
        raise self.NVMLError("not permitted")


def test_clocks_and_limits_are_read_and_what_is_hidden_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    card = SimpleNamespace(uuid="x")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    found = machine._nvml()
    assert (found["driver"], found["power_limit_w"], found["sm_clock_mhz"]) == (
        "1.2.3",
        400.0,
        1410,
    )
    assert found["power_w"] == "unreadable: not permitted"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "not installed" in machine._nvml()["nvml"]
