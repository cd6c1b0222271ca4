"""What a product costs the host: CPU time of one thread where launch and library do nothing.

    PYTHONPATH=.:bindings python -m pytest bench/bench_host.py -s

The pack kernel's launch is a function that returns at once, the library is the emulator whose
matmul does; what is left is this package, torch's allocations and the calls into C. Seeds come as
from the generator of a CUDA device. Each number is the best of many short rounds. No GPU is needed
and none is measured: a driver's launch and the caching allocator come on top.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.products import dispatch
from sdgp_cusparselt.products.operands import LinearGradInput, LinearGradWeight
from sdgp_cusparselt.recording.records import LayerRecord
from tests.products.null_launch import null_launches

#: Microseconds of the host; each figure is printed beside its goal.
GOALS = {
    "grad_input": 15.0,
    "both products": 20.0,
    "forward of a plain layer over F.linear": 10.0,
    "backward of a plain layer over F.linear's": 5.0,
}
ROUNDS, CALLS = 60, 50
TOKENS, OUTPUTS, INPUTS = (8, 16), 256, 512
#: A layer so small that its products cost little, and no multiple of 16, so that they run plain.
FEW, NARROW = 8, (16, 24)
CONFIG = sdgp.SDGPConfig(grad_weight="sparse", tune="never")
GRADIENT = torch.randn(*TOKENS, OUTPUTS).bfloat16()
FLAT = GRADIENT.view(-1, OUTPUTS)
WEIGHT = torch.randn(OUTPUTS, INPUTS).bfloat16()
INPUT = torch.randn(FLAT.shape[0], INPUTS).bfloat16()


def run_grad_input(record: LayerRecord) -> Tensor:
    """Compute grad_input as a layer's backward asks for it."""
    return dispatch.run(LinearGradInput(GRADIENT, WEIGHT), CONFIG, record)


def run_both(record: LayerRecord) -> tuple[Tensor, Tensor]:
    """Compute both products as a layer's backward asks for them."""
    first, second = LinearGradInput(GRADIENT, WEIGHT), LinearGradWeight(FLAT, INPUT)
    return dispatch.run_both(first, second, CONFIG, record)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[LayerRecord]:
    """Count on a machine whose launches and products cost nothing."""
    record = LayerRecord("bench")
    with null_launches(monkeypatch) as arm:
        run_both(record)  # proven on an emulator that computes
        arm()
        yield record


def microseconds(call: Callable[[], object]) -> float:
    """Return the CPU time of one call: the best of many rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time_ns()
        for _ in range(CALLS):
            call()
        best = min(best, (time.thread_time_ns() - start) / CALLS / 1000)
    return best


def report(benchmark: Any, name: str, call: Callable[[], object], found: float) -> None:
    """Write a figure beside its goal."""
    benchmark.extra_info.update(host_us=found, goal_us=GOALS[name])
    benchmark.pedantic(call, rounds=10, iterations=CALLS)
    print(f"\n{name}: {found:.2f} us of the host (goal {GOALS[name]:.0f} us)")


@pytest.mark.parametrize("name, run", [("grad_input", run_grad_input), ("both products", run_both)])
def test_products(
    benchmark: Any, record: LayerRecord, name: str, run: Callable[[LayerRecord], object]
) -> None:
    """Time what a backward pass does from its call to its return."""

    def call() -> object:
        return run(record)

    for _ in range(3):
        call()
    before = record.calls["grad_input", "sparse"]
    report(benchmark, name, call, microseconds(call))
    assert record.calls["grad_input", "sparse"] - before >= ROUNDS * CALLS


def test_a_plain_layer(benchmark: Any, record: LayerRecord) -> None:
    """Time forward and backward of a layer whose products run plain, over torch's own."""
    layer, twin = (torch.nn.Linear(*NARROW).bfloat16() for _ in range(2))
    sdgp.convert_(layer, CONFIG)
    x = torch.randn(FEW, NARROW[0], dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.randn(FEW, NARROW[1], dtype=torch.bfloat16)

    def torchs() -> Tensor:
        return F.linear(x, twin.weight, twin.bias)

    with pytest.warns(sdgp.SDGPFallbackWarning):
        layer(x).backward(grad_output)
    forward, backward = [], []
    for _ in range(3):
        pair = microseconds(lambda: layer(x)), microseconds(torchs)
        forward.append(pair[0] - pair[1])
        both = (
            microseconds(lambda: layer(x).backward(grad_output)),
            microseconds(lambda: torchs().backward(grad_output)),
        )
        backward.append(both[0] - both[1] - forward[-1])
    report(benchmark, "forward of a plain layer over F.linear", torchs, min(forward))
    print(f"backward of a plain layer over F.linear's: {min(backward):.2f} us (goal 5 us)")
    assert layer.sdgp_record.calls["grad_input", "plain"] >= ROUNDS * CALLS
