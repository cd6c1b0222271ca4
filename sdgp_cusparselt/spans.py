"""Samples of what a layer's backward pass costs and loses, taken without waiting for the device.

Times are pairs of CUDA events, or ``perf_counter`` on a CPU; gradient errors stay tensors on their
device. Both are read when a report asks for them.
"""

import os
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Samples kept of each kind: the most recent ones.
KEPT = 256

Reading = Callable[[], float]


@dataclass
class Samples:
    """What one layer sampled.

    Attributes:
        times: (product, part) -> functions that give microseconds, and wait for the device if it
            is not done yet.
        errors: product -> six sums on the device, see ``gradient_sums``.
        seen: product -> calls, sampled or not.
    """

    times: dict[tuple[str, str], deque[Reading]] = field(default_factory=dict)
    errors: dict[str, deque[Tensor]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)

    def due(self, product: str, every: int, device: torch.device) -> bool:
        """Count a call and return whether it is one to sample: the first and every ``every``-th."""
        if every <= 0:
            return False
        number = self.seen[product]
        self.seen[product] += 1
        return number % every == 0 and not _capturing(device)

    def add_time(self, product: str, part: str, reading: Reading) -> None:
        """Keep one time."""
        self.times.setdefault((product, part), deque(maxlen=KEPT)).append(reading)

    def median_us(self, product: str) -> dict[str, float]:
        """Return part -> median of its sampled microseconds; waits for the device."""
        return {
            part: statistics.median(reading() for reading in list(readings))
            for (of, part), readings in list(self.times.items())
            if of == product
        }

    def gradient_error(self, product: str) -> dict[str, float] | None:
        """Return medians of relative L2, cosine and kept L1 mass; waits for the device.

        Samples with an Inf or NaN, as a loss scaler provokes them, are counted and left out.
        """
        sums = [s.tolist() for s in list(self.errors.get(product, ()))]
        measures = [_measures(s) for s in sums if all(abs(v) < float("inf") for v in s)]
        if not measures:
            return None
        names = ("relative_l2", "cosine", "kept_l1")
        columns = zip(*measures, strict=True)
        result = {n: statistics.median(c) for n, c in zip(names, columns, strict=True)}
        return {**result, "samples": len(measures), "not_finite": len(sums) - len(measures)}


class _Local(threading.local):
    sink: tuple[Samples, str] | None = None


_local = _Local()
_nvtx: bool | None = None


@contextmanager
def sampling(samples: Samples, product: str) -> Iterator[None]:
    """Let every ``span`` of this thread be timed into ``samples``."""
    before = _local.sink
    _local.sink = samples, product
    try:
        yield
    finally:
        _local.sink = before


def is_sampling() -> bool:
    """Whether spans of this thread are being timed, part by part."""
    return _local.sink is not None


def span(part: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that times its body where this thread samples, and names it for NVTX.

    Args:
        part: prune, pack, matmul, dense or total.
        device: whose current stream does the work.
    """
    if _local.sink is None and not nvtx_enabled():
        return _NOTHING
    return _span(part, device, _local.sink)


def set_nvtx(enabled: bool) -> None:
    """Switch NVTX ranges on or off, whatever ``SDGP_NVTX`` says."""
    global _nvtx
    _nvtx = enabled


def nvtx_enabled() -> bool:
    """Whether spans on CUDA devices are NVTX ranges; from ``SDGP_NVTX=1`` unless set."""
    global _nvtx
    if _nvtx is None:
        _nvtx = os.environ.get("SDGP_NVTX") == "1"
    return _nvtx


def sample_gradient(
    samples: Samples, product: str, grad_output: Tensor, pruned: Callable[[], Tensor]
) -> None:
    """Keep how far a pruned gradient is from the dense one.

    Args:
        samples: of the layer.
        product: grad_input or grad_weight.
        grad_output: [...] the dense gradient.
        pruned: returns [...] the pruned one; what it draws does not move torch's generators.
    """
    with torch.no_grad(), generators_kept(grad_output.device):
        sums = gradient_sums(grad_output, pruned())
    samples.errors.setdefault(product, deque(maxlen=KEPT)).append(sums)


def gradient_sums(grad: Tensor, pruned: Tensor) -> Tensor:
    """Return |g - p|^2, g.p, |g|^2, |p|^2, |g|_1 and |g where kept|_1, of g and p over max|g|.

    Args:
        grad: [...] float.
        pruned: [...] like grad.

    Returns:
        [6] float32 on grad's device; nothing waits.
    """
    g, p = grad.float().reshape(-1), pruned.float().reshape(-1)
    # Squares of small gradients would underflow.
    scale = g.abs().amax() if g.numel() else g.new_ones(())
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    g, p = g / scale, p / scale
    size = g.abs()
    kept = size.masked_fill(p == 0, 0)
    squares = [(g - p).square().sum(), (g * p).sum(), g.square().sum(), p.square().sum()]
    return torch.stack([*squares, size.sum(), kept.sum()])


def generators_kept(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that leaves torch's generators of the CPU and ``device`` as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _measures(sums: list[float]) -> tuple[float, float, float]:
    error, inner, grad, pruned, mass, kept = sums
    if grad == 0:
        return 0.0, 1.0, 1.0
    cosine = inner / (grad * pruned) ** 0.5 if pruned > 0 else 0.0
    return (error / grad) ** 0.5, cosine, kept / mass


@contextmanager
def _span(part: str, device: torch.device, sink: tuple[Samples, str] | None) -> Iterator[None]:
    cuda = device.type == "cuda"
    named = cuda and nvtx_enabled()
    if named:
        torch.cuda.nvtx.range_push(f"sdgp {part}")  # type: ignore[no-untyped-call]
    stop = None if sink is None else _started(cuda)
    try:
        yield
        if sink is not None and stop is not None:
            samples, product = sink
            samples.add_time(product, part, stop())
    finally:
        if named:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


def _started(cuda: bool) -> Callable[[], Reading]:
    """Start a clock; the returned function stops it and returns how to read it."""
    if not cuda:
        start = time.perf_counter()

        def stop_host() -> Reading:
            elapsed = 1e6 * (time.perf_counter() - start)
            return lambda: elapsed

        return stop_host
    first, last = _cuda_event(), _cuda_event()
    first.record()

    def stop_device() -> Reading:
        last.record()

        def read() -> float:
            last.synchronize()
            return 1e3 * float(first.elapsed_time(last))

        return read

    return stop_device


def _cuda_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_NOTHING: AbstractContextManager[None] = nullcontext()
