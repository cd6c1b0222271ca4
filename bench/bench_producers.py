"""What a fused producer costs: a gradient made and packed in one kernel, beside the sequences.

pytest bench/bench_producers.py -k cpu --benchmark-json=build/producers-cpu.json
pytest bench/bench_producers.py -k gpu --benchmark-json=build/producers-gpu.json -s

Rivals on a GPU, timed as ``bench_pack`` does: ``plain``, the backward of the activation by torch
alone, which packs nothing; ``sequence``, that and then the pack kernel; ``compiled``, the same with
the backward by torch.compile. Nothing is timed before the kernel was compared with its twin.
``python -m bench.pack_budget`` says what a model expects.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.bench_pack import Function, device_seconds, host_seconds
from sdgp_cusparselt.devices import current_stream
from sdgp_cusparselt.packing.layout import default_layout, padded_shape
from sdgp_cusparselt.packing.pack import pack_gradient
from sdgp_cusparselt.products.maker_check import compare
from sdgp_cusparselt.products.makers import Asked, KernelMaker, Output
from sdgp_cusparselt.products.packers import Wanted
from sdgp_cusparselt.pruning.producers import ActivationBackward, CrossEntropyBackward, Producer

SHAPES = ((8192, 4096), (16384, 14336))
#: What is written, and the limit in times of the plain backward. A gate has two gradients.
OUTPUTS = {"features and dense": (True, 1.35), "both": (False, 1.15)}
#: Times of autograd's own backward that the twin may take on a CPU.
CPU_LIMIT = 4.0


def producers(rows: int, cols: int, device: str, dtype: torch.dtype) -> dict[str, Producer]:
    """Return one of each sort with random inputs [rows, cols]."""

    def normal() -> Tensor:
        return torch.randn(rows, cols, device=device, dtype=dtype)

    logits = normal()
    target = torch.randint(cols, (rows,), device=device)
    row_scale = torch.full((rows,), 1 / rows, device=device)
    mask = torch.rand(rows, cols, device=device) < 0.9
    return {
        "gelu": ActivationBackward("gelu", normal(), normal()),
        "gelu masked": ActivationBackward("gelu", normal(), normal(), None, mask, 1 / 0.9),
        "silu gated": ActivationBackward("silu", normal(), normal(), normal()),
        "cross_entropy": CrossEntropyBackward(
            logits, logits.float().logsumexp(1), target, row_scale
        ),
    }


def autograd_backward(producer: Producer) -> Callable[[], object]:
    """Return what computes the same gradients by autograd of the unfused layers."""
    if isinstance(producer, CrossEntropyBackward):
        logits = producer.logits.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(logits, producer.target)
        return lambda: torch.autograd.grad(loss, logits, retain_graph=True)
    from sdgp_cusparselt.pruning.producers import forward

    leaves = [t.detach().requires_grad_() for t in (producer.pre, producer.up) if t is not None]
    up = leaves[1] if producer.up is not None else None
    hidden = forward(producer.activation, leaves[0], up, producer.mask, producer.scale)
    upstream = producer.upstream
    return lambda: torch.autograd.grad(hidden, leaves, upstream, retain_graph=True)


@pytest.mark.parametrize("name", ["gelu", "gelu masked", "silu gated", "cross_entropy"])
def test_cpu_twin_over_autograd(benchmark, name: str) -> None:
    """The twin of [1024, 1024] bf16 in times of autograd's backward of the unfused layers."""
    producer = producers(1024, 1024, "cpu", torch.bfloat16)[name]
    found = host_seconds({"twin": producer.gradients, "autograd": autograd_backward(producer)})
    ratio = found["twin"] / found["autograd"]
    milliseconds = {key: seconds * 1e3 for key, seconds in found.items()}
    benchmark.extra_info.update(ms=milliseconds, ratio=ratio, threads=1)
    print(f"\n{name}: {ratio:.2f} of autograd's {milliseconds['autograd']:.1f} ms")
    benchmark.pedantic(producer.gradients, rounds=3, warmup_rounds=1)
    assert ratio <= CPU_LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", ["gelu", "gelu masked", "silu gated", "cross_entropy"])
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_gpu_producer_over_plain(benchmark, rows: int, cols: int, name: str, output: str) -> None:
    """One kernel in times of the plain backward, which packs nothing."""
    producer = producers(rows, cols, "cuda", torch.bfloat16)[name]
    dense, limit = OUTPUTS[output]
    layout = default_layout(*padded_shape(rows, cols, torch.bfloat16))
    turned = None if dense else default_layout(*padded_shape(cols, rows, torch.bfloat16))
    wanted = Wanted(2, rows, "mvue", None if dense else "mvue", layout, turned)
    asked = Asked(wanted, dense=dense, sums=False)
    small = producers(512, 512, "cuda", torch.bfloat16)[name]
    assert compare(small, asked) is None
    compiled = torch.compile(producer.gradients)
    functions: dict[str, Function] = {
        "plain": autograd_backward(producer),
        "fused": _fused(producer, asked),
        "sequence": _sequence(producer.gradients, asked),
        "compiled": _sequence(compiled, asked),
    }
    found = device_seconds(functions)
    ratios = {key: seconds / found["plain"] for key, seconds in found.items()}
    benchmark.extra_info.update(
        gpu=torch.cuda.get_device_name(),
        shape=[rows, cols],
        microseconds={key: seconds * 1e6 for key, seconds in found.items()},
        ratios=ratios,
        limit=limit,
    )
    print(f"\n[{rows}, {cols}] {name} -> {output}: {ratios}")
    benchmark.pedantic(functions["fused"], rounds=3, warmup_rounds=1)
    assert ratios["fused"] < min(ratios["sequence"], ratios["compiled"])
    assert ratios["fused"] <= limit


def _fused(producer: Producer, asked: Asked) -> Function:
    maker = KernelMaker(producer, asked)
    gradients = producer.gradients()
    kept = [torch.empty_like(one) for one in gradients]
    buffers = [torch.empty(maker.nbytes, dtype=torch.uint8, device="cuda") for _ in gradients]
    outputs = [
        Output(one if asked.dense else None, buffer.data_ptr(), None)
        for one, buffer in zip(kept, buffers, strict=True)
    ]

    def run() -> object:
        stream = current_stream(torch.device("cuda", torch.cuda.current_device()))
        maker(producer, outputs, stream)
        return kept, buffers

    return run


def _sequence(gradients: Callable[[], tuple[Tensor, ...]], asked: Asked) -> Function:
    packed = asked.packed

    def run() -> object:
        return [
            pack_gradient(
                one,
                features=packed.features,
                tokens=packed.tokens,
                features_layout=packed.features_layout,
                tokens_layout=packed.tokens_layout,
                backend="triton",
            )
            for one in gradients()
        ]

    return run
