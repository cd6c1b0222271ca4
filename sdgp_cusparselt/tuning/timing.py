"""How long does a call take on the device: cold L2, contenders interleaved, the median."""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch

#: Cycles that the GPU waits before a measured call, so that the host is done issuing it; at the
#: start, and at most (about 5 ms: a call that still is not issued then waits for the device).
_HEAD_START, _LONGEST_HEAD_START = 400_000, 1 << 23


class Timer(Protocol):
    """Runs a call once and says how long it took."""

    def __call__(self, run: Callable[[], object], label: str) -> float:
        """Return microseconds of ``run()``; ``label`` says what it is."""
        ...


class CudaTimer:
    """Device time between two events, after the L2 cache was overwritten.

    The device waits until the host has issued the call, so that no idle device is timed. Whether
    it waited long enough can be seen: the first event has not passed when all is issued. If it
    has, the call is timed again behind a wait that is twice as long.
    """

    description = "CUDA events, L2 flushed, current stream"

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * max(size, 1 << 24), dtype=torch.uint8, device=device)
        self._start, self._end = cuda_event(), cuda_event()
        self._cycles = _HEAD_START

    def __call__(self, run: Callable[[], object], label: str) -> float:
        """Return microseconds; waits for the device."""
        while True:
            torch.cuda._sleep(self._cycles)  # type: ignore[no-untyped-call]
            self._flush.zero_()
            self._start.record()
            run()
            self._end.record()
            late = bool(self._start.query())  # type: ignore[no-untyped-call]
            self._end.synchronize()
            if not late or self._cycles >= _LONGEST_HEAD_START:
                return 1e3 * float(self._start.elapsed_time(self._end))
            self._cycles *= 2


def cuda_event() -> torch.cuda.Event:
    """Return an event that can be timed."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class HostTimer:
    """Wall time, for tensors on a CPU."""

    description = "perf_counter"

    def __call__(self, run: Callable[[], object], label: str) -> float:
        """Return microseconds."""
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)


def timer_for(device: torch.device) -> CudaTimer | HostTimer:
    """Return the timer that fits a device."""
    return CudaTimer(device) if device.type == "cuda" else HostTimer()


def race(
    contenders: Mapping[str, Callable[[], Callable[[], object]]],
    timer: Timer,
    *,
    rounds: Iterable[int],
    seed: int,
    refusals: tuple[type[Exception], ...],
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Time every contender once a round, in an order shuffled anew each round.

    Args:
        contenders: label -> function that prepares a run and returns it; only the run is timed.
        timer: what times it.
        rounds: one element for each time that all of them run.
        seed: of the order.
        refusals: exceptions that take the contender out of the race; others propagate.

    Returns:
        (label -> microseconds of each round, label -> why that contender is out).
    """
    shuffle = random.Random(seed).shuffle
    times: dict[str, list[float]] = {label: [] for label in contenders}
    out: dict[str, Exception] = {}
    for _ in rounds:
        order = list(times)
        shuffle(order)
        for label in order:
            try:
                times[label].append(timer(contenders[label](), label))
            except refusals as refusal:
                out[label] = refusal
                del times[label]
    return times, out


def median(times: list[float]) -> float:
    """Return the middle one: a stray interrupt or clock change does not move it."""
    return float(statistics.median(times))
