"""What telemetry reports, against numbers computed here; nothing is sampled unless asked."""

import json
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.recording import spans
from sdgp_cusparselt.recording.spans import (
    KEPT,
    Samples,
    gradient_sums,
    sample_gradient,
    sampling,
    span,
)
from tests.helpers import oracle_magnitude

CPU = torch.device("cpu")


def network(**kwargs: object) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    sdgp.convert_(model, sdgp.SDGPConfig(backend="dense", **kwargs))
    return model


def step(model: nn.Module, grad: torch.Tensor | None = None) -> None:
    output = model(torch.randn(8, 16, requires_grad=True))
    output.backward(torch.randn_like(output) if grad is None else grad)


def test_calls_times_and_errors_of_every_layer() -> None:
    model = network(telemetry_every=2, grad_weight="sparse")
    for _ in range(5):
        step(model)
    layers = sdgp.telemetry(model).as_dict()["layers"]
    assert [(e["layer"], e["product"]) for e in layers] == [
        ("0", "grad_input"),
        ("0", "grad_weight"),
        ("2", "grad_input"),
        ("2", "grad_weight"),
    ]
    for entry in layers:
        assert entry["calls"] == {"emulated": 5} and entry["fallbacks"] == []
        assert set(entry["median_us"]) == {"prune", "dense", "total"}
        assert 0 < entry["median_us"]["prune"] < entry["median_us"]["total"]
        assert entry["gradient_error"]["samples"] == 3, "calls 0, 2 and 4"
    json.dumps(layers)


def test_gradient_error_against_a_computation_in_float64() -> None:
    model = nn.Linear(16, 32)
    sdgp.convert_(model, sdgp.SDGPConfig(prune="magnitude", telemetry_every=1, backend="dense"))
    grad = torch.randn(8, 32)
    step(model, grad)
    error = sdgp.telemetry(model).layers[0]["gradient_error"]
    g, p = grad.double(), oracle_magnitude(grad, 2, 4, 1).double()
    assert error["relative_l2"] == pytest.approx(((g - p).norm() / g.norm()).item(), rel=1e-5)
    assert error["cosine"] == pytest.approx(((g * p).sum() / g.norm() / p.norm()).item(), rel=1e-5)
    assert error["kept_l1"] == pytest.approx((p.abs().sum() / g.abs().sum()).item(), rel=1e-5)


def test_nothing_is_sampled_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr("sdgp_cusparselt.products.dispatch.sample_gradient", never)
    monkeypatch.setattr(spans, "_started", never)
    model = network()
    step(model)
    entry = sdgp.telemetry(model).layers[0]
    assert entry["calls"] == {"emulated": 1}
    assert entry["median_us"] == {} and entry["gradient_error"] is None


def test_sampling_does_not_change_the_run() -> None:
    results = []
    for every in (0, 1):
        torch.manual_seed(7)
        model = network(prune="mvue", grad_weight="sparse", telemetry_every=every)
        step(model)
        results.append((model[0].weight.grad.clone(), torch.rand(1)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_tiny_zero_and_overflowed_gradients() -> None:
    def error(grad: torch.Tensor) -> dict[str, float] | None:
        samples = Samples()
        pruned = sdgp.prune(grad)
        sample_gradient(samples, "grad_input", grad, lambda: pruned)
        return samples.gradient_error("grad_input")

    grad = torch.randn(8, 16)
    small, normal = error((grad * 2.0**-100).bfloat16()), error(grad.bfloat16())
    assert small == normal
    assert error(torch.zeros(4, 8)) == {
        "relative_l2": 0.0, "cosine": 1.0, "kept_l1": 1.0, "samples": 1, "not_finite": 0,
    }  # fmt: skip
    assert error(torch.full((4, 8), torch.inf)) is None
    assert error(torch.full((4, 8), torch.nan)) is None
    assert gradient_sums(torch.empty(0), torch.empty(0)).tolist() == [0.0] * 6


def test_samples_are_bounded() -> None:
    samples = Samples()
    for number in range(KEPT + 44):
        samples.add_time("grad_input", "pack", lambda number=number: float(number))
        sample_gradient(samples, "grad_input", torch.ones(4), lambda: torch.ones(4))
    assert len(samples.times["grad_input", "pack"]) == len(samples.errors["grad_input"]) == KEPT
    assert samples.median_us("grad_input")["pack"] == 44 + (KEPT - 1) / 2, "the latest ones"


def test_spans_are_timed_only_inside_sampling_and_per_thread() -> None:
    samples = Samples()
    with span("pack", CPU):
        pass
    with sampling(samples, "grad_input"):
        other = threading.Thread(target=lambda: span("matmul", CPU).__enter__())
        other.start()
        other.join()
        with pytest.raises(KeyError), span("dense", CPU):
            raise KeyError
        with span("pack", CPU):
            pass
    with span("pack", CPU):
        pass
    assert {key: len(times) for key, times in samples.times.items()} == {("grad_input", "pack"): 1}


def test_the_table_names_layers_numbers_and_fallbacks() -> None:
    model = network(telemetry_every=1)
    step(model)
    record = model[0].sdgp_record
    record.fallbacks["grad_input", "K (outputs) is 20, no multiple of 16"] += 3
    text = str(sdgp.telemetry(model))
    for words in ("layer", "kept L1", "emulated x1", "0 grad_input: not sparse (3 calls)"):
        assert words in text
    error = sdgp.telemetry(model).layers[0]["gradient_error"]["relative_l2"]
    assert f"{error:.4f}" in text


def test_the_table_is_plain_text_in_a_notebook_and_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    model = nn.Sequential(nn.Linear(16, 16))
    sdgp.convert_(model)
    model(torch.randn(4, 16, requires_grad=True)).sum().backward()
    text = str(sdgp.telemetry(model))
    assert "emulated x1" in text and "\x1b" not in text
    assert capsys.readouterr().out == ""


def test_a_copied_layer_starts_without_samples() -> None:
    import copy

    model = network(telemetry_every=1)
    step(model)
    twin = copy.deepcopy(model)
    step(twin)
    assert sdgp.telemetry(model).layers[0]["gradient_error"]["samples"] == 1
    assert sdgp.telemetry(twin).layers[0]["gradient_error"]["samples"] == 1


def test_errors() -> None:
    with pytest.raises(TypeError, match="telemetry: model must be an nn.Module, got int"):
        sdgp.telemetry(3)
    with pytest.raises(ValueError, match="telemetry: model must be converted"):
        sdgp.telemetry(nn.Linear(4, 4))


def test_nvtx_is_off_unless_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("1", True), ("0", False)):
        monkeypatch.setattr(spans, "_nvtx", None)
        monkeypatch.setenv("SDGP_NVTX", value)
        assert spans.nvtx_enabled() is expected
    spans.set_nvtx(True)
    with span("pack", CPU):
        pass


def test_importing_the_module_directly_leaves_the_function() -> None:
    code = (
        "from sdgp_cusparselt.telemetry import counts\nimport sdgp_cusparselt as sdgp\n"
        "assert sdgp.telemetry is counts.telemetry"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_times_and_errors_on_a_gpu_without_waiting() -> None:
    model = network(telemetry_every=1).cuda()
    input = torch.randn(8, 16, device="cuda", requires_grad=True)
    grad = torch.randn(8, 16, device="cuda")
    model(input).backward(grad)  # loading a kernel for the first time may wait for the device
    output = model(input)
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)
    output.backward(grad)
    assert not torch.cuda.current_stream().query(), "backward waited for the device"
    entry = sdgp.telemetry(model).layers[0]
    assert set(entry["median_us"]) == {"prune", "dense", "total"}
    assert entry["gradient_error"]["samples"] == 2
