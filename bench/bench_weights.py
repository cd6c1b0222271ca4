"""2:4 weights: forward, backward, a layer's step, generation, and 8-bit products.

    PYTHONPATH=.:bindings python -m pytest bench/bench_weights.py -k cpu

The weight is packed ahead, once per optimizer step or once for ever, so the products alone are
timed here; what packing costs stands beside them, in clones of the weight. A layer's step packs
anew every time, as after an optimizer's step.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sdgp_cusparselt as sdgp
from bench import rivals
from bench.bench_layers import backends_used, measured_on
from bench.contender import Contender, Work, measure, parameters
from bench.machine import TUNE
from bench.operands import Operands, UnavailableError, describe, executor, operands
from bench.shapes import Case, Selection, linear_cases
from bench.timing import in_turns
from bench.verify import Expected, product, rounding_bound
from sdgp_cusparselt.backends.masking import INPUTS, OUTPUTS
from sdgp_cusparselt.products.packed_weights import PrunedWeight
from sdgp_cusparselt.products.stored_weights import LARGEST, StoredWeight, quantized, stored_linear
from sdgp_cusparselt.products.weight_operands import LinearOutput, LinearWeightGradInput
from sdgp_cusparselt.products.weight_product import WeightProduct
from sdgp_cusparselt.recording.records import LayerRecord
from sdgp_cusparselt.weights.packed_linear import NARROW, packed_of

pytestmark = pytest.mark.filterwarnings("default::sdgp_cusparselt.errors.SDGPFallbackWarning")

CONFIG = sdgp.SDGPConfig(prune="none", forward="sparse_weight", grad_input="weight", tune=TUNE)
#: Tokens of one step of generation.
DECODED = (1, 16)
SCREENING_S = 0.02


def _weights(data: Operands) -> tuple[Tensor, Tensor]:
    """Return the weight pruned along its inputs, and that pruned along its outputs as well."""
    once = sdgp.prune(data.weight)
    return once, sdgp.prune(once, dim=0)


def _line(given: LinearOutput | LinearWeightGradInput, case: Case) -> tuple[WeightProduct, int]:
    """Return the fastest algorithm's product, and how many were tried."""
    library = executor(case.device_type)
    problem = given.problem(CONFIG)
    if reasons := library.not_supported_reasons(problem):
        raise UnavailableError("; ".join(reasons))
    offered = library.candidates(library.gemm_of(problem))
    lines = [WeightProduct(given, CONFIG, library, one) for one in offered]
    if case.device_type == "cpu" or len(lines) == 1:
        return lines[0], len(lines)
    times = in_turns([partial(line, given) for line in lines], case.device, SCREENING_S)
    best = min(range(len(lines)), key=lambda i: statistics.median(times[i]))
    return lines[best], len(lines)


def _sizes(outputs: bool, tokens: int | None, case: Case) -> tuple[int, int, int]:
    """Return (M, N, K) of output or of grad_input, with the weight as the left operand."""
    sides = case.out_features, case.in_features
    m, k = sides if outputs else sides[::-1]
    return m, case.tokens if tokens is None else tokens, k


def _forward(tokens: int | None, case: Case) -> Work:
    data = operands(case)
    x, (once, _) = data.input[:tokens], _weights(data)
    given = LinearOutput(x, PrunedWeight(data.weight, None, None, x.dtype, CONFIG))
    line, tried = _line(given, case)
    expected = product(x, once.t(), "the pruned product")
    return Work(
        partial(line, given),
        expected.check,
        partial(F.linear, x, once),
        "torch's linear",
        flops=2 * x.shape[0] * once.numel(),
        nbytes=int(1.125 * once.numel()) + 2 * (x.numel() + x.shape[0] * once.shape[0]),
        info={"algorithm": describe(line.candidate), "tried": tried},
    )


def _grad_input(case: Case) -> Work:
    data = operands(case)
    g, (_, twice) = data.grad_output, _weights(data)
    given = LinearWeightGradInput(g, PrunedWeight(data.weight, None, None, g.dtype, CONFIG))
    line, tried = _line(given, case)
    return Work(
        partial(line, given),
        product(g, twice, "the product of the weight pruned both ways").check,
        partial(torch.mm, g, twice),
        "torch.mm",
        flops=2 * g.shape[0] * twice.numel(),
        info={"algorithm": describe(line.candidate), "tried": tried},
    )


def _pack(along: int, case: Case) -> Work:
    data = operands(case)
    once, twice = _weights(data)
    kept = PrunedWeight(data.weight, None, None, data.weight.dtype, CONFIG, keeps=False)
    given = (
        LinearOutput(data.input, kept)
        if along == INPUTS
        else LinearWeightGradInput(data.grad_output, kept)
    )
    line, _ = _line(given, case)

    def check(packed: Tensor) -> Any:
        x = given.activations
        right = (once if along == INPUTS else twice.t()).t()
        result = line.multiplied(given)
        assert packed.dtype == torch.uint8
        return product(x, right, "the product of what was packed").check(result)

    run = partial(kept.packed, along, line.order, line.pack)
    return Work(run, check, data.weight.clone, "a clone of the weight")


def _semi_structured(tokens: int | None, case: Case) -> Work:
    rivals.need_cuda(case.device)
    data = operands(case)
    x, (once, _) = data.input[:tokens], _weights(data)
    sparse = torch.sparse.to_sparse_semi_structured(once)
    expected = product(x, once.t(), "the pruned product")
    run = partial(F.linear, x, sparse)
    return Work(run, expected.check, partial(F.linear, x, once), "torch's linear")


def _narrow(dtype: torch.dtype, tokens: int | None, case: Case) -> Work:
    data = operands(case)
    x, (once, _) = data.input[:tokens], _weights(data)
    executor(case.device_type)  # says why there is none
    stored, scale = packed_of(once, dtype)
    record = LayerRecord()

    def run() -> Tensor:
        return stored_linear(x, StoredWeight.of(stored, NARROW), scale, None, NARROW, record)

    expected = _quantized_product(x, once, dtype)
    return Work(
        run,
        expected.check,
        partial(F.linear, x, once),
        f"torch's linear in {str(x.dtype).removeprefix('torch.')}",
        info=measured_on(case.device_type),
        after=lambda: {"backends": backends_used(record)},
    )


def _quantized_product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Expected:
    tokens, token_scale = quantized(x, dtype)
    rows, row_scale = quantized(weight, dtype)
    wide = torch.float32 if x.device.type == "cuda" else torch.float64
    scale = token_scale.to(wide) * row_scale.to(wide).t()
    left, right = tokens.to(wide), rows.to(wide).t()
    reference, size = (left @ right) * scale, (left.abs() @ right.abs()) * scale
    bound = rounding_bound(size, reference, x.shape[1], x.dtype, roundings=1)
    bound += 8 * torch.finfo(torch.float32).eps * size
    return Expected(reference, bound, "the product of the same 8-bit numbers")


def _int_mm(tokens: int | None, case: Case) -> Work:
    rivals.need_cuda(case.device)
    data = operands(case)
    x, (once, _) = data.input[:tokens], _weights(data)
    rows, row_scale = quantized(once, torch.int8)
    right = rows.t()

    def run() -> Tensor:
        whole, scale = quantized(x, torch.int8)
        return (torch._int_mm(whole, right).float() * scale * row_scale.t()).to(x.dtype)

    expected = _quantized_product(x, once, torch.int8)
    return Work(run, expected.check, partial(F.linear, x, once), "torch's linear")


def _scaled_mm(tokens: int | None, case: Case) -> Work:
    rivals.need_cuda(case.device)
    data = operands(case)
    x, (once, _) = data.input[:tokens], _weights(data)
    rows, row_scale = quantized(once, torch.float8_e4m3fn)

    def run() -> Tensor:
        small, scale = quantized(x, torch.float8_e4m3fn)
        scales = {"scale_a": scale, "scale_b": row_scale.t().contiguous()}
        return torch._scaled_mm(small, rows.t(), out_dtype=x.dtype, **scales)

    expected = _quantized_product(x, once, torch.float8_e4m3fn)
    return Work(run, expected.check, partial(F.linear, x, once), "torch's linear")


def _layer(compiled: bool, case: Case) -> Work:
    """A layer forward and backward with its weight packed anew, beside the dense layer."""
    if compiled and case.device_type == "cpu":
        raise UnavailableError("compiled code is timed on a GPU only")
    place = {"device": case.device, "dtype": case.dtype}
    dense = nn.Linear(case.in_features, case.out_features, bias=False, **place)
    pruned = nn.Linear(case.in_features, case.out_features, bias=False, **place)
    pruned.load_state_dict(dense.state_dict())
    sdgp.convert_(pruned, CONFIG, lambda *_: True)
    x = torch.randn(case.tokens, case.in_features, requires_grad=True, **place)
    g = torch.randn(case.tokens, case.out_features, **place)
    twice = sdgp.prune(sdgp.prune(dense.weight.detach()), dim=0)
    layers = rivals.compiled(pruned, dense) if compiled else [pruned, dense]

    def step(layer: nn.Module, weight: nn.Parameter) -> Tensor:
        with torch.no_grad():
            weight.add_(0)  # an optimizer's step: both pay it
        x.grad = weight.grad = None
        layer(x).backward(g)
        assert x.grad is not None
        return x.grad

    return Work(
        partial(step, layers[0], pruned.weight),
        product(g, twice, "the product of the weight pruned both ways", 2).check,
        partial(step, layers[1], dense.weight),
        "the dense layer, compiled" if compiled else "the dense layer",
        info={"compiled": compiled} | measured_on(case.device_type),
        after=lambda: {"backends": backends_used(pruned.sdgp_record)},
    )


def _contenders(full: bool, case: Case) -> list[Contender]:
    def made(
        part: str, name: str, prepare: Callable[[Case], Work], outputs: bool = True, **more: Any
    ) -> Contender:
        tokens = more.pop("tokens", None)
        return Contender(part, name, prepare, partial(_sizes, outputs, tokens), **more)

    found = [
        made("weight_output", "sdgp", partial(_forward, None)),
        made("weight_grad_input", "sdgp", _grad_input, False),
        made("weight_pack", "sdgp along inputs", partial(_pack, INPUTS)),
        made("weight_pack", "sdgp along outputs", partial(_pack, OUTPUTS), False),
        made("weight_layer", "sdgp", partial(_layer, False)),
        made("weight_output", "torch.sparse", partial(_semi_structured, None), rival=True),
    ]
    if full:
        found.append(made("weight_layer", "sdgp, compiled", partial(_layer, True)))
    for tokens in (None, *DECODED):
        part = "weight_narrow" if tokens is None else f"weight_decode_{tokens}"
        if tokens is not None:
            found += [
                made(part, "sdgp", partial(_forward, tokens), tokens=tokens),
                made(
                    part,
                    "torch.sparse",
                    partial(_semi_structured, tokens),
                    rival=True,
                    tokens=tokens,
                ),
            ]
        found += [
            made(
                part,
                f"sdgp {str(d).removeprefix('torch.')}",
                partial(_narrow, d, tokens),
                tokens=tokens,
            )
            for d in LARGEST
        ]
        found += [
            made(part, "torch._int_mm", partial(_int_mm, tokens), rival=True, tokens=tokens),
            made(part, "torch._scaled_mm", partial(_scaled_mm, tokens), rival=True, tokens=tokens),
        ]
    return found


def pairs(selection: Selection) -> list[object]:
    linear = [case for case in linear_cases(selection) if case.with_rivals]
    return parameters(linear, partial(_contenders, selection.full))


def test_weights(request: pytest.FixtureRequest, case: Case, contender: Contender) -> None:
    """Time a product with a 2:4 weight beside torch's own after its result is checked."""
    measure(request, case, contender)
