"""What this card can do at most, and what a planned product costs the host.

    PYTHONPATH=.:bindings python -m pytest bench/bench_machine.py

The ceilings are what the report's roofline is drawn with: a large copy, a large dense product.
"""

import pytest
import torch

from bench.contender import Contender, Work, measure, parameters
from bench.operands import best_candidate, describe, multiply, operands, pack
from bench.shapes import Case, Selection
from bench.timing import host_us
from bench.verify import Check, WrongResultError

#: One side of the dense product, elements of the copy.
SIDE, COPIED = {"cuda": 8192, "cpu": 256}, {"cuda": 1 << 29, "cpu": 1 << 20}
#: Small enough that the GPU is done before the host asks again.
SMALL = 128


def _matmul_ceiling(case: Case) -> Work:
    data = operands(case)
    m, n, k = case.sizes("grad_input")
    dense = data.dense("grad_input")
    return Work(
        dense,
        data.expected_dense("grad_input").check,
        dense,
        "itself",
        flops=2 * m * n * k,
        nbytes=case.dtype.itemsize * (m * k + k * n + m * n),
    )


def _copy_ceiling(case: Case) -> Work:
    x = torch.randn(COPIED[case.device_type], device=case.device, dtype=case.dtype)

    def check(copied: torch.Tensor) -> Check:
        if not torch.equal(copied, x):
            raise WrongResultError("wrong: the copy differs")
        return Check(0.0, 0.0, "the original")

    return Work(x.clone, check, x.clone, "itself", nbytes=2 * x.numel() * x.element_size())


def _host_cost(case: Case) -> Work:
    """One planned product through the backend, as a layer's backward calls it."""
    data, best = operands(case), best_candidate(case, "grad_input")
    packed = pack(data, "grad_input", best.candidate)
    run = multiply(data, "grad_input", best.candidate, packed)
    dense = data.dense("grad_input")
    return Work(
        run,
        data.expected("grad_input").check,
        dense,
        "torch.mm",
        info={"algorithm": describe(best.candidate)},
        after=lambda: {"host_us": host_us(run), "reference_host_us": host_us(dense)},
    )


def _sizes(case: Case) -> tuple[int, int, int]:
    return case.sizes("grad_input")


def _ceilings(case: Case) -> list[Contender]:
    if case.layer == "small":
        return [Contender("host_cost", "sdgp", _host_cost, _sizes)]
    return [
        Contender("ceiling", "torch.mm", _matmul_ceiling, _sizes),
        Contender("ceiling", "clone", _copy_ceiling, _sizes),
    ]


def pairs(selection: Selection) -> list[object]:
    dtypes = {"cuda": selection.dtype, "cpu": torch.bfloat16}
    cases = [
        Case("square", "large", side, side, side, place, dtypes[place])
        for place, side in SIDE.items()
    ]
    return parameters(
        [*cases, Case("square", "small", SMALL, SMALL, SMALL, dtype=selection.dtype)], _ceilings
    )


def test_machine(request: pytest.FixtureRequest, case: Case, contender: Contender) -> None:
    """Time one ceiling, or the host's cost of a call."""
    measure(request, case, contender)
