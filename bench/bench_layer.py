"""What pruning costs on a CPU: the fallback is measured, not promised. Ratios within one run.

pytest bench/bench_layer.py -k cpu --benchmark-json=build/layer.json
"""

import functools
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import sdgp_cusparselt as sdgp

ROUNDS, CALLS = 7, 3


def interleaved(
    first: Callable[[], object], second: Callable[[], object], rounds: int = ROUNDS
) -> tuple[float, float, float]:
    """Return median seconds of both and the median of second / first, round by round.

    Seconds are CPU time of one thread: another program on the machine does not count. A round
    measures each in a steady state of its own: one call untimed, because what the other one freed
    costs the next call page faults, then some timed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, into in zip((first, second), times, strict=True):
            function()
            start = time.process_time()
            for _ in range(CALLS):
                function()
            into.append((time.process_time() - start) / CALLS)
    torch.set_num_threads(threads)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["magnitude", "rescaled_magnitude", "random", "mvue"])
@pytest.mark.parametrize(
    "tokens, in_features, out_features",
    [(4096, 1024, 1024), (2048, 2048, 2048), (1024, 256, 256), (512, 64, 256), (64, 64, 64)],
)
def test_cpu_layer_forward_backward(
    benchmark,
    tokens: int,
    in_features: int,
    out_features: int,
    method: str,
    dtype: torch.dtype,
) -> None:
    """Forward and backward of a converted linear layer over those of the dense one."""
    dense, pruned = (nn.Linear(in_features, out_features, dtype=dtype) for _ in range(2))
    sdgp.convert_(pruned, sdgp.SDGPConfig(prune=method, backend="dense"))
    input = torch.randn(tokens, in_features, dtype=dtype, requires_grad=True)
    grad_output = torch.randn(tokens, out_features, dtype=dtype)
    # Enough of them that the clock's grain and the calls around do not count.
    repeats = max(1, 2**28 // (tokens * in_features * out_features))

    def step(layer: nn.Module) -> None:
        for _ in range(repeats):
            input.grad = None
            layer.zero_grad()
            layer(input).backward(grad_output)

    plain, ours, ratio = interleaved(lambda: step(dense), lambda: step(pruned))
    benchmark.extra_info.update(
        shape=f"[{tokens}, {in_features}] x {out_features}",
        method=method,
        dtype=str(dtype),
        dense_ms=plain * 1e3 / repeats,
        pruned_ms=ours * 1e3 / repeats,
        ratio=ratio,
    )
    print(f"\n{method} {dtype} [{tokens}, {in_features}] x {out_features}: {ratio:.3f} x dense")
    benchmark.pedantic(lambda: step(pruned), rounds=3, warmup_rounds=1)


def best_us(function: Callable[[], object], rounds: int = 15, calls: int = 500) -> float:
    """Return microseconds of CPU time of one call, the best of many rounds."""
    function()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            function()
        times.append((time.process_time() - start) / calls)
    return 1e6 * min(times)


@pytest.mark.parametrize("prune", ["none", "magnitude"])
def test_cpu_host_time_of_a_layer(benchmark, monkeypatch, prune: str) -> None:
    """Host time of a tiny layer over torch's own, its grad_input being one plain product."""
    monkeypatch.setattr(
        "sdgp_cusparselt.products.backward.linear_grad_input",
        lambda grad_output, weight, config, record: grad_output.mm(weight),
    )
    plain, ours = nn.Linear(8, 8), nn.Linear(8, 8)
    sdgp.convert_(ours, sdgp.SDGPConfig(prune=prune))
    input, grad_output = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)

    def step(layer: nn.Module) -> None:
        torch.autograd.grad(layer(input), [input, *layer.parameters()], grad_output)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    forward = [best_us(functools.partial(layer, input)) for layer in (plain, ours)]
    both = [best_us(functools.partial(step, layer)) for layer in (plain, ours)]
    torch.set_num_threads(threads)
    benchmark.extra_info.update(forward_us=forward, forward_and_backward_us=both)
    print(f"\n{prune}: forward {forward[1]:.1f} us over {forward[0]:.1f},", end=" ")
    print(f"with backward {both[1]:.1f} us over {both[0]:.1f}")
    benchmark.pedantic(lambda: step(ours), rounds=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cpu_magnitude_over_topk(benchmark, dtype: torch.dtype) -> None:
    """Magnitude pruning of [4096, 1024] against abs().topk(2) of the same groups of four."""
    x = torch.randn(4096, 1024).to(dtype)
    topk, ours, ratio = interleaved(
        lambda: x.view(-1, 4).abs().topk(2), lambda: sdgp.prune(x), rounds=2 * ROUNDS
    )
    benchmark.extra_info.update(topk_ms=topk * 1e3, prune_ms=ours * 1e3, ratio=1 / ratio)
    print(f"\nprune {dtype}: {1 / ratio:.2f} times as fast as abs().topk(2)")
    benchmark.pedantic(lambda: sdgp.prune(x), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("method", ["magnitude", "rescaled_magnitude", "random", "mvue"])
@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (16, 32)])
def test_cpu_prune(benchmark, method: str, n: int, m: int) -> None:
    """Every method on [1024, 1024] fp32, in clones of the tensor."""
    x = torch.randn(1024, 1024)
    prune = functools.partial(sdgp.prune, x, method=method, n=n, m=m)
    _, ours, clones = interleaved(lambda: x.clone(), prune, rounds=5)
    benchmark.extra_info.update(clones=clones, prune_ms=ours * 1e3)
    benchmark.pedantic(prune, rounds=3)
