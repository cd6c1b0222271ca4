"""Products alone: dense by torch.mm, sparse by cuSPARSELt, without prune and pack.

    PYTHONPATH=.:bindings python -m pytest bench/bench_gemm.py -k cpu

A speedup of the sparse product alone says what the library can give, not what training gains:
``bench_grads.py`` adds prune and pack.
"""

from collections.abc import Callable
from functools import partial

import pytest

from bench import rivals
from bench.contender import Contender, Work, measure, parameters
from bench.operands import best_candidate, describe, executor, multiply, operands, pack
from bench.shapes import Case, Product, Selection, linear_cases
from bench.timing import Run

#: Bytes of an element of a packed 16-bit operand: half of the values, a nibble for four.
PACKED_BYTES = 1.125


def _work(case: Case, which: Product, run: Run, packed: bool, **info: object) -> Work:
    data = operands(case)
    m, n, k = case.sizes(which)
    size = case.dtype.itemsize
    left = PACKED_BYTES if packed else size
    expected = data.expected(which) if packed else data.expected_dense(which)
    return Work(
        run,
        expected.check,
        data.dense(which),
        "torch.mm",
        flops=2 * m * n * k,
        nbytes=int(left * m * k) + size * (k * n + m * n),
        info={"product": which, **info},
    )


def _dense(which: Product) -> Callable[[Case], Work]:
    return lambda case: _work(case, which, operands(case).dense(which), False)


def _compiled(case: Case) -> Work:
    rivals.need_cuda(case.device)
    mm, data = rivals.compiled_mm(), operands(case)
    left, right = data.left("grad_input"), data.right("grad_input")
    return _work(case, "grad_input", lambda: mm(left, right), False)


def _sparse(which: Product) -> Callable[[Case], Work]:
    def prepare(case: Case) -> Work:
        data, best = operands(case), best_candidate(case, which)
        run = multiply(data, which, best.candidate, pack(data, which, best.candidate))
        algorithm = describe(best.candidate)
        found = {"algorithm": algorithm, "tried": best.tried, "rejected": best.rejected}
        return _work(case, which, run, True, **found)

    return prepare


def _default(case: Case) -> Work:
    data = operands(case)
    first = executor(case.device_type).candidates(data.gemm("grad_input"))[0]
    run = multiply(data, "grad_input", first, pack(data, "grad_input", first))
    return _work(case, "grad_input", run, True, algorithm=describe(first))


def _cslt(case: Case) -> Work:
    rival, data = rivals.TorchCslt(case.device), operands(case)
    packed = rival.compress(data.pruned("grad_input"))
    right = data.right("grad_input")
    return _work(case, "grad_input", lambda: rival.matmul(packed, right), True)


def _contenders(full: bool, case: Case) -> list[Contender]:
    def made(part: str, name: str, prepare: Callable[[Case], Work], **more: bool) -> Contender:
        return Contender(part, name, prepare, lambda c: c.sizes("grad_input"), **more)

    def of_weight(part: str, name: str, prepare: Callable[[Case], Work]) -> Contender:
        return Contender(part, name, prepare, lambda c: c.sizes("grad_weight"))

    found = [
        made("dense_gemm", "torch.mm", _dense("grad_input")),
        made("sparse_gemm", "sdgp", _sparse("grad_input")),
        of_weight("dense_gemm", "torch.mm grad_weight", _dense("grad_weight")),
        of_weight("sparse_gemm", "sdgp grad_weight", _sparse("grad_weight")),
    ]
    if case.with_rivals:
        found += [
            made("sparse_gemm", "default algorithm", _default, rival=True),
            made("sparse_gemm", "torch._cslt_sparse_mm", _cslt, rival=True),
        ]
        if full:  # its search takes seconds a shape
            found.append(made("dense_gemm", "torch.compile", _compiled, rival=True))
    return found


def pairs(selection: Selection) -> list[object]:
    return parameters(linear_cases(selection), partial(_contenders, selection.full))


def test_gemm(request: pytest.FixtureRequest, case: Case, contender: Contender) -> None:
    """Time one product after its result is checked."""
    measure(request, case, contender)
