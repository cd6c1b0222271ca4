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

from sdgp_cusparselt.devices import is_capturing

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
        moments: product -> two numbers on the device, see ``moment_sums``, for the same calls.
        draws: how often a method that draws is drawn for the moments of one call; 1 for no more
            than the errors need.
        taken: product -> calls whose gradient error was sampled, kept or not.
        seen: product -> calls, sampled or not.
    """

    times: dict[tuple[str, str], deque[Reading]] = field(default_factory=dict)
    errors: dict[str, deque[Tensor]] = field(default_factory=dict)
    moments: dict[str, deque[Tensor]] = field(default_factory=dict)
    draws: int = 1
    taken: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)

    def due(self, product: str, every: int, device: torch.device) -> bool:
        """Count a call and return whether it is one to sample: the first and every ``every``-th."""
        if every <= 0:
            return False
        number = self.seen[product]
        self.seen[product] += 1
        return number % every == 0 and not is_capturing(device)

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
        return self._error_of_last(product, KEPT, with_moments=False)

    def gradient_moments(self, product: str, last: int) -> dict[str, float] | None:
        """Return what ``gradient_error`` does for the last samples, and their bias and variance.

        bias is |E p - g| / |g| and variance E |p - E p|^2 / |g|^2, g the gradient and p its pruned
        form, so that relative_l2^2 = bias^2 + variance for the average over draws.
        """
        return self._error_of_last(product, last, with_moments=True)

    def _error_of_last(
        self, product: str, last: int, *, with_moments: bool
    ) -> dict[str, float] | None:
        errors = list(self.errors.get(product, ()))[-last:] if last else []
        rows = [_measures(s) if _all_finite(s) else None for s in (e.tolist() for e in errors)]
        names = ["relative_l2", "cosine", "kept_l1"]
        if with_moments:
            names += ["bias", "variance"]
            moments = [_bias_and_variance(m.tolist()) for m in list(self.moments[product])[-last:]]
            rows = [r and r + m for r, m in zip(rows, moments, strict=True)]
        measures = [row for row in rows if row is not None]
        if not measures:
            return None
        columns = zip(*measures, strict=True)
        result = {n: statistics.median(c) for n, c in zip(names, columns, strict=True)}
        return {**result, "samples": len(measures), "not_finite": len(rows) - len(measures)}


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


def is_traced() -> bool:
    """Whether spans of this thread do anything."""
    return _local.sink is not None or (nvtx_enabled() if _nvtx is None else _nvtx)


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
    samples: Samples,
    product: str,
    grad_output: Tensor,
    pruned: Callable[[], Tensor],
    *,
    draws: int = 1,
) -> None:
    """Keep how far a pruned gradient is from the dense one.

    Args:
        samples: of the layer.
        product: grad_input or grad_weight.
        grad_output: [...] the dense gradient.
        pruned: returns [...] the pruned one; what it draws does not move torch's generators.
        draws: how often to call ``pruned`` for bias and variance.
    """
    with torch.no_grad(), generators_kept(grad_output.device):
        first = pruned()
        sums = gradient_sums(grad_output, first)
        moments = moment_sums(grad_output, first, pruned, draws)
    samples.errors.setdefault(product, deque(maxlen=KEPT)).append(sums)
    samples.moments.setdefault(product, deque(maxlen=KEPT)).append(moments)
    samples.taken[product] += 1


def moment_sums(grad: Tensor, first: Tensor, pruned: Callable[[], Tensor], draws: int) -> Tensor:
    """Return unbiased estimates of |E p - g|^2 and E |p - E p|^2, over |g|^2.

    Over R draws with mean a: variance = sum |p - a|^2 / (R - 1); and because a itself scatters by
    variance / R around E p, squared bias = |a - g|^2 - variance / R, which may come out below 0.

    Args:
        grad: [...] float.
        first: [...] the first draw.
        pruned: returns another draw.
        draws: R; 1 takes the method for one that does not draw.

    Returns:
        [2] float32 on grad's device; nothing waits.
    """
    scale = grad.float().abs().amax() if grad.numel() else grad.new_ones((), dtype=torch.float32)
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    g = grad.float() / scale
    mean, scatter = first.float() / scale, torch.zeros_like(g)
    for number in range(2, draws + 1):  # Welford: nothing but two tensors is kept
        p = pruned().float() / scale
        step = p - mean
        mean = mean + step / number
        scatter = scatter + step * (p - mean)
    variance = scatter.sum() / max(draws - 1, 1)
    bias = (mean - g).square().sum() - variance / draws
    return torch.stack([bias, variance]) / g.square().sum().clamp_min(1e-30)


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


def _all_finite(sums: list[float]) -> bool:
    return all(abs(value) < float("inf") for value in sums)


def _bias_and_variance(moments: list[float]) -> tuple[float, ...]:
    squared_bias, variance = moments
    return max(squared_bias, 0.0) ** 0.5, variance


def _measures(sums: list[float]) -> tuple[float, ...]:
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


_NOTHING: AbstractContextManager[None] = nullcontext()
