"""One layer forward and backward: a linear layer or a convolution, dense beside converted.

    PYTHONPATH=.:bindings python -m pytest bench/bench_layers.py -k cpu

The layers run as a user's do: ``sdgp.convert_`` and the tuned dispatcher. On a CPU that is the
fallback.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from bench import rivals
from bench.contender import Contender, Work, measure, parameters
from bench.machine import TUNE
from bench.operands import UnavailableError
from bench.shapes import Case, Convolution, Selection, convolution_cases, linear_cases
from bench.timing import Run
from bench.verify import Expected, check_any, rounding_bound
from sdgp_cusparselt.recording import records

# Written down with its count, not raised: 3 x 3 convolutions keep a dense grad_weight.
pytestmark = pytest.mark.filterwarnings("default::sdgp_cusparselt.errors.SDGPFallbackWarning")

CONFIGS = {
    "grad_input": sdgp.SDGPConfig(prune="magnitude", tune=TUNE),
    "grad_input + grad_weight": sdgp.SDGPConfig(prune="magnitude", grad_weight="sparse", tune=TUNE),
}


def _layer(case: Case | Convolution) -> tuple[nn.Module, Tensor]:
    """Return the dense layer and its input."""
    place = {"device": case.device, "dtype": case.dtype}
    if isinstance(case, Case):
        layer = nn.Linear(case.in_features, case.out_features, bias=False, **place)
        return layer, torch.randn(case.tokens, case.in_features, **place)
    layer = nn.Conv2d(
        case.in_channels,
        case.out_channels,
        case.kernel,
        case.stride,
        padding=case.kernel // 2,
        bias=False,
        **place,
    )
    image = torch.randn(case.batch, case.in_channels, case.edge, case.edge, **place)
    channels_last = torch.channels_last
    return layer.to(memory_format=channels_last), image.to(memory_format=channels_last)


def step_of(layer: nn.Module, input: Tensor, grad_output: Tensor) -> Run:
    """Return forward and backward, gradients of input and weight; returns the input's."""

    def step() -> Tensor:
        input.grad = layer.weight.grad = None
        layer(input).backward(grad_output)
        return input.grad

    return step


def _prepare(name: str, compiled: bool) -> Callable[[Any], Work]:
    def prepare(case: Case | Convolution) -> Work:
        if compiled and case.device_type == "cpu":
            raise UnavailableError("compiled code is timed on a GPU only")
        dense, input = _layer(case)
        pruned, _ = _layer(case)
        pruned.load_state_dict(dense.state_dict())
        sdgp.convert_(pruned, CONFIGS[name], lambda *_: True)
        input.requires_grad_(True)
        grad_output = torch.randn_like(dense(input))
        expected = _expected(case, dense, grad_output, input)
        layers = rivals.compiled(pruned, dense) if compiled else (pruned, dense)
        run, reference = (step_of(layer, input, grad_output) for layer in layers)
        return Work(
            run,
            lambda grad_input: check_any(grad_input, *expected),
            reference,
            "the dense layer, compiled" if compiled else "the dense layer",
            info={"compiled": compiled} | measured_on(case.device_type),
            after=lambda: {"backends": backends_used(_record(pruned, compiled))},
        )

    return prepare


def _expected(
    case: Case | Convolution, dense: nn.Module, grad_output: Tensor, input: Tensor
) -> list[Expected]:
    """Return the pruned and the dense grad_input with their bounds: a layer may choose either."""
    dim = -1 if isinstance(case, Case) else 1
    taps = 1 if isinstance(case, Case) else case.kernel**2
    k = case.out_features if isinstance(case, Case) else case.out_channels * taps
    wide = torch.float32 if case.device_type == "cuda" else torch.float64
    weight = dense.weight.detach().to(wide)

    def back(gradient: Tensor, by: Tensor) -> Tensor:
        if isinstance(case, Case):
            return gradient @ by
        return torch.nn.grad.conv2d_input(
            input.shape, by, gradient, case.stride, padding=case.kernel // 2
        )

    found = []
    for what, gradient in (
        ("the pruned gradient", sdgp.prune(grad_output, dim=dim)),
        ("the dense gradient", grad_output),
    ):
        gradient = gradient.to(wide)
        reference, size = back(gradient, weight), back(gradient.abs(), weight.abs())
        # Columns of a k x k convolution are rounded before they are added up into an image.
        # cuBLAS may also round the partial sums of a split K.
        bound = rounding_bound(size, reference, k, case.dtype, roundings=taps + 1)
        found.append(Expected(reference, bound, what))
    return found


def measured_on(device_type: str) -> dict[str, str]:
    """Return the mark of a layer: on a CPU the dispatcher runs the fallback."""
    return {"measured_on": "gpu" if device_type == "cuda" else "cpu, the fallback"}


def backends_used(record: records.LayerRecord) -> dict[str, int]:
    """Return "product way" -> calls, and "product not sparse: reason" -> calls."""
    used = {" ".join(key): count for key, count in record.calls.items()}
    fallbacks = {f"{p} not sparse: {why}": c for (p, why), c in record.fallbacks.items()}
    return used | fallbacks


def _record(layer: nn.Module, compiled: bool) -> records.LayerRecord:
    """Return where calls were counted; compiled layers share one record."""
    return records.COMPILED if compiled else layer.sdgp_record


def _sizes(case: Case | Convolution) -> tuple[int, int, int]:
    if isinstance(case, Case):
        return case.sizes("grad_input")
    return case.pixels, case.in_channels * case.kernel**2, case.out_channels


def _contenders(compiled: Sequence[bool], case: Case | Convolution) -> list[Contender]:
    return [
        Contender("layer", f"{name}{', compiled' if compiled else ''}", prepare, _sizes)
        for compiled in compiled
        for name in CONFIGS
        for prepare in [_prepare(name, compiled)]
    ]


def pairs(selection: Selection) -> list[object]:
    linear = [case for case in linear_cases(selection) if case.with_rivals]
    # Compiling takes seconds a layer: not in the quick run.
    contenders = partial(_contenders, (False, True) if selection.full else (False,))
    return parameters([*linear, *convolution_cases(selection)], contenders)


def test_layer(
    request: pytest.FixtureRequest, case: Case | Convolution, contender: Contender
) -> None:
    """Time a converted layer beside the dense one after its gradient is checked."""
    measure(request, case, contender)
