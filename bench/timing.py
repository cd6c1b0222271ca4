"""Two clocks: wall time that waits for the device, and device time with a cold L2 cache.

Contenders are timed in turns with what they are compared with, so that clock changes and
neighbours hit both, and a speedup is a ratio inside one run.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Run = Callable[[], object]

#: Cycles that the GPU waits before a timed call, so that the host is done issuing it.
HEAD_START = 400_000
#: Seconds that a comparison may take, and how many rounds that buys at least and at most.
BUDGET_S, FEWEST_ROUNDS, MOST_ROUNDS = 0.25, 10, 60
CPU_ROUNDS = 5
WARM_UP = 3


def synchronised() -> float:
    """Return the time once the GPU is idle: pytest-benchmark's timer for CUDA."""
    torch.cuda.synchronize()
    return time.perf_counter()


class DeviceClock:
    """Microseconds between two CUDA events around a call, its operands out of the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * max(size, 1 << 25), dtype=torch.uint8, device=device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def __call__(self, run: Run) -> float:
        """Return microseconds of one call; waits for the device."""
        self._flush.zero_()
        torch.cuda._sleep(HEAD_START)
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        return 1e3 * self._start.elapsed_time(self._end)


@functools.cache
def device_clock(device: torch.device) -> DeviceClock:
    """Return the one clock of a GPU."""
    return DeviceClock(device)


def host_clock(run: Run) -> float:
    """Return microseconds of one call on a CPU."""
    start = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - start)


def in_turns(
    runs: Sequence[Run], device: torch.device, budget_s: float = BUDGET_S
) -> list[list[float]]:
    """Time every call once a round, in alternating order.

    Args:
        runs: what to time, ready to be called.
        device: where they run.
        budget_s: seconds that all rounds may take together, roughly.

    Returns:
        Microseconds of each round, one list a call. Device time on a GPU, wall time on a CPU.
    """
    cuda = device.type == "cuda"
    clock = device_clock(device) if cuda else host_clock
    for run in runs:
        for _ in range(WARM_UP if cuda else 1):
            run()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    times = [[clock(run)] for run in runs]
    rounds = CPU_ROUNDS
    if cuda:
        fitting = int(budget_s / (time.perf_counter() - start))
        rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, fitting))
    for number in range(1, rounds):
        order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            times[index].append(clock(runs[index]))
    return times


def host_us(run: Run, calls: int = 200) -> float:
    """Return the microseconds that the host spends on issuing one asynchronous call.

    Args:
        run: a call so small that the GPU keeps up, so that its queue never fills.
        calls: fewer than the queue holds.
    """
    for _ in range(WARM_UP):
        run()
    samples = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        samples.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(samples)
