"""What packing costs: against one prune on a CPU, against a copy of the tensor on a GPU.

pytest bench/bench_pack.py -k cpu --benchmark-json=build/pack-cpu.json
pytest bench/bench_pack.py -k gpu --benchmark-json=build/pack-gpu.json -s

On a GPU each time is that of CUDA graph replays, so that it is the device's and not Python's; all
functions of a test take turns within one run, and the figure is the median. Every tensor is larger
than the L2 cache. A clone reads and writes 2 bytes per element; packing one direction reads 2 and
writes 1.125, both directions 2.25. ``python -m bench.pack_budget`` says what a model expects.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import pycusparselt as cslt
import pytest
import torch

from sdgp_cusparselt.packing.layout import default_layout, padded_shape
from sdgp_cusparselt.packing.pack import pack_gradient
from sdgp_cusparselt.packing.prune import prune_dense
from sdgp_cusparselt.pruning.methods import prune

ROUNDS = 9
REPLAYS = 10
SHAPES = ((8192, 4096), (16384, 16384), (44160, 1024))
# What packing must not exceed, in clones of the same tensor, and what it moves per element.
LIMITS = {"features": 0.90, "both": 1.25, "features+sums": 0.95, "both+sums": 1.30}
LIMITS |= {"features mvue": 0.95, "tokens mvue": 0.95, "both mvue": 1.35, "prune mvue": 1.15}
BYTES = {"features": 3.125, "tokens": 3.125, "both": 4.25, "prune": 4.0}
Function = Callable[[], object]


def host_seconds(functions: dict[str, Function]) -> dict[str, float]:
    """Return the median CPU seconds of each function on one thread, measured in turns.

    CPU time, so that another program does not count; before each timed call one that is not,
    because what another function freed costs the next call page faults.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(ROUNDS):
        for name, function in functions.items():
            function()
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    return {name: statistics.median(found) for name, found in times.items()}


def device_seconds(functions: dict[str, Function]) -> dict[str, float]:
    """Return the median device seconds of each function, replayed in turn from CUDA graphs."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, function in functions.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(ROUNDS + 2):
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(REPLAYS):
                graph.replay()
            stop.record()
            stop.synchronize()
            if round_number >= 2:
                times[name].append(start.elapsed_time(stop) / 1e3 / REPLAYS)
    return {name: statistics.median(found) for name, found in times.items()}


def test_cpu_reference_pack_over_prune(benchmark) -> None:
    """The reference pack of [4096, 1024] bf16 takes at most three magnitude prunes of it."""
    x = torch.randn(4096, 1024).bfloat16()
    found = host_seconds(
        {
            "prune": lambda: prune(x),
            "pack": lambda: pack_gradient(x, backend="reference"),
            "pack tokens": lambda: pack_gradient(
                x, features=None, tokens="magnitude", backend="reference"
            ),
        }
    )
    ratios = {name: seconds / found["prune"] for name, seconds in found.items()}
    milliseconds = {name: seconds * 1e3 for name, seconds in found.items()}
    benchmark.extra_info.update(ms=milliseconds, ratios=ratios, threads=1)
    print(f"\nprune {milliseconds['prune']:.1f} ms; ratios {ratios}")
    benchmark.pedantic(lambda: pack_gradient(x, backend="reference"), rounds=3, warmup_rounds=1)
    assert ratios["pack"] <= 3


@pytest.mark.gpu
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_gpu_pack_over_clone(benchmark, rows: int, cols: int) -> None:
    """Packing in clones of the same bf16 tensor, with the library and torch on the same work."""
    x = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
    functions: dict[str, Function] = {"clone": x.clone}
    functions |= {name: _named(x, name) for name in LIMITS}
    with ExitStack() as stack:
        functions["library prune + compress"] = _library(stack, x)
        if rows % 128 == 0 and cols % 128 == 0:
            functions["torch tile, both ways"] = lambda: torch._sparse_semi_structured_tile(
                x, algorithm="", use_cutlass=False
            )
        found = device_seconds(functions)
    clones = {name: seconds / found["clone"] for name, seconds in found.items()}
    copy_rate = 4 * x.numel() / found["clone"]
    moved = {name: BYTES[name.split("+")[0].split()[0]] for name in LIMITS}
    share = {name: moved[name] * x.numel() / found[name] / copy_rate for name in LIMITS}
    benchmark.extra_info.update(
        gpu=torch.cuda.get_device_name(),
        shape=[rows, cols],
        microseconds={name: seconds * 1e6 for name, seconds in found.items()},
        clones=clones,
        copy_TB_s=copy_rate / 1e12,
        share_of_copy_bandwidth=share,
        limits=LIMITS,
    )
    print(f"\n[{rows}, {cols}] bf16, clone at {copy_rate / 1e12:.2f} TB/s")
    for name, ratio in clones.items():
        note = f", {share[name]:.2f} of copy bandwidth" if name in share else ""
        print(f"  {name}: {ratio:.3f} clones{note}")
    benchmark.pedantic(functions["features"], rounds=3, warmup_rounds=1)
    slow = {name: clones[name] for name, limit in LIMITS.items() if clones[name] > limit}
    assert not slow, f"over the limit: {slow}"


def _named(x: torch.Tensor, name: str) -> Function:
    """Return what a name of LIMITS stands for: the direction, its method, and column sums."""
    ways, _, method = name.removesuffix("+sums").partition(" ")
    method = method or "magnitude"
    if ways == "prune":
        return lambda: prune_dense(x, method=method, backend="triton")
    return lambda: pack_gradient(
        x,
        features=method if ways != "tokens" else None,
        tokens=method if ways != "features" else None,
        column_sums=name.endswith("+sums"),
        backend="triton",
    )


def _pack(x: torch.Tensor, tokens: str | None, column_sums: bool) -> Function:
    return lambda: pack_gradient(x, tokens=tokens, column_sums=column_sums, backend="triton")


def _library(stack: ExitStack, x: torch.Tensor) -> Function:
    """Prune and compress by the library, out of place, into buffers that are there already."""
    rows, cols = padded_shape(*x.shape, x.dtype)
    if (rows, cols) != tuple(x.shape):
        raise ValueError(f"_library: x must have a padded shape, got {tuple(x.shape)}")
    handle = stack.enter_context(cslt.Handle(cslt.load()))
    kind, row = cslt.DataType.R_16BF, cslt.Order.ROW
    a = stack.enter_context(
        cslt.MatDescriptor.structured(
            handle, rows, cols, ld=cols, dtype=kind, order=row, alignment=16
        )
    )
    b, c = (
        stack.enter_context(
            cslt.MatDescriptor.dense(
                handle, lines, 1024, ld=1024, dtype=kind, order=row, alignment=16
            )
        )
        for lines in (cols, rows)
    )
    matmul = cslt.MatmulDescriptor(
        handle,
        op_a=cslt.Operation.N,
        op_b=cslt.Operation.N,
        a=a,
        b=b,
        c=c,
        d=c,
        compute_type=cslt.ComputeType.COMPUTE_32F,
    )
    selection = stack.enter_context(cslt.AlgSelection(handle, matmul))
    plan = stack.enter_context(cslt.MatmulPlan(handle, matmul, selection))
    size, scratch_size = plan.compressed_size()
    pruned = torch.empty_like(x)
    out = torch.empty(size, dtype=torch.uint8, device=x.device)
    scratch = torch.empty(max(16, scratch_size), dtype=torch.uint8, device=x.device)

    def run() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        matmul.prune(x.data_ptr(), pruned.data_ptr(), cslt.PruneAlg.STRIP, stream=stream)
        plan.compress(pruned.data_ptr(), out.data_ptr(), scratch.data_ptr(), stream=stream)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_gpu_host_time_of_a_pack(benchmark, rows: int, cols: int) -> None:
    """What Python, the checks and the launch add to one direction on the host."""
    x = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
    layout = default_layout(*padded_shape(rows, cols, x.dtype))
    device = device_seconds({"clone": x.clone, "pack": _pack(x, None, False)})

    def eager() -> None:
        pack_gradient(x, features_layout=layout, backend="triton")

    eager()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(100):
        eager()
    host = (time.perf_counter() - start) / 100
    torch.cuda.synchronize()
    benchmark.extra_info.update(
        host_microseconds=host * 1e6, device_microseconds=device["pack"] * 1e6
    )
    print(f"\n[{rows}, {cols}]: host {host * 1e6:.0f} us, device {device['pack'] * 1e6:.0f} us")
    benchmark.pedantic(eager, rounds=3, warmup_rounds=1)
