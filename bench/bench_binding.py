"""Host cost of one planned matmul: the binding beside the same C call with arguments made before.

    PYTHONPATH=.:bindings python -m pytest bench/bench_binding.py -s

The emulator's matmul returns at once, so what is timed is the call and nothing else. Both sides
are timed in turns, in many short rounds; the report has their medians, the ratio and the
difference. The goal is a difference of at most 8 microseconds.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pycusparselt as cslt
import pytest

from tests.bindings.problem import Case, Problem
from tests.emulator.build import build
from tests.emulator.control import Emulator

GOAL_US = 8.0
ROUNDS, CALLS = 200, 200


@pytest.fixture
def problem() -> Iterator[Problem]:
    emulator = Emulator(build())
    with cslt.Handle(cslt.load(emulator.path)) as handle:
        made = Problem(handle, Case())
        emulator.noop()
        yield made
        emulator.reset()


def through_the_binding(problem: Problem) -> Callable[[], None]:
    a, b, d = problem.pointers()
    matmul = problem.plan.matmul
    return lambda: matmul(1.0, a, b, 0.0, d, d, 0, 0)


def with_prebuilt_arguments(problem: Problem) -> Callable[[], None]:
    function = problem.plan.library.cdll["cusparseLtMatmul"]
    alpha, beta = ctypes.c_float(1.0), ctypes.c_float(0.0)
    stream = ctypes.c_void_p(0)
    a, b, d = problem.pointers()
    arguments: list[Any] = [
        ctypes.c_void_p(address)
        for address in (
            problem.handle.address,
            problem.plan.address,
            ctypes.addressof(alpha),
            a,
            b,
            ctypes.addressof(beta),
            d,
            d,
            0,
            ctypes.addressof(stream),
        )
    ]
    arguments.append(ctypes.c_int32(1))
    keep = (alpha, beta, stream)
    return lambda keep=keep: function(*arguments)  # type: ignore[misc]


def microseconds(call: Callable[[], None]) -> float:
    start = time.perf_counter_ns()
    for _ in range(CALLS):
        call()
    return (time.perf_counter_ns() - start) / CALLS / 1000


@pytest.mark.parametrize("side", [through_the_binding, with_prebuilt_arguments])
def test_one_call(
    benchmark: Any, problem: Problem, side: Callable[[Problem], Callable[[], None]]
) -> None:
    benchmark.group = "planned matmul, host side"
    benchmark.pedantic(side(problem), rounds=ROUNDS, iterations=CALLS, warmup_rounds=5)


def test_difference(benchmark: Any, problem: Problem) -> None:
    bound, bare = through_the_binding(problem), with_prebuilt_arguments(problem)
    pairs = [(microseconds(bound), microseconds(bare)) for _ in range(ROUNDS)]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    benchmark.extra_info.update(
        binding_us=ours, prebuilt_us=theirs, ratio=ours / theirs, difference_us=ours - theirs
    )
    benchmark.pedantic(bound, rounds=10, iterations=CALLS)
    print(
        f"\nbinding {ours:.2f} us, prebuilt {theirs:.2f} us: "
        f"ratio {ours / theirs:.2f}, difference {ours - theirs:.2f} us (goal {GOAL_US:.0f} us)"
    )
    assert ours - theirs <= GOAL_US
