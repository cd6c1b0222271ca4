"""Whole gradients: prune, pack and sparse product together, against the dense product.

    PYTHONPATH=.:bindings python -m pytest bench/bench_grads.py -k cpu

These are the numbers that a headline may use. ``sdgp`` forces the sparse path with the fastest
proven algorithm; ``auto`` is what a layer gets: the dispatcher, tuned, that may stay dense.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import sdgp_cusparselt as sdgp
from bench import rivals
from bench.contender import Contender, Work, measure, parameters
from bench.machine import TUNE
from bench.operands import UnavailableError, best_candidate, describe, executor, operands
from bench.shapes import Case, Product, Selection, linear_cases
from bench.timing import Run
from bench.verify import Check, WrongResultError, check_any, check_pruned, product
from sdgp_cusparselt.products import backward as products
from sdgp_cusparselt.products.operands import LinearGradInput, LinearGradWeight, Operands
from sdgp_cusparselt.products.sparse import sparse_product
from sdgp_cusparselt.recording import records

# The dispatcher's choice is written down, not raised.
pytestmark = pytest.mark.filterwarnings("default::sdgp_cusparselt.errors.SDGPFallbackWarning")

Prepare = Callable[[Case], Work]
BOTH: tuple[Product, Product] = ("grad_input", "grad_weight")


def _work(
    case: Case, which: Sequence[Product], run: Run, check: Callable[[Any], Check], **more: Any
) -> Work:
    data = operands(case)
    dense = [data.dense(one) for one in which]
    m, n, k = case.sizes("grad_input")
    moved = m * k + k * n + m * n
    return Work(
        run,
        check,
        dense[0] if len(dense) == 1 else lambda: [one() for one in dense],
        "torch.mm",
        flops=2 * m * n * k * len(which),
        nbytes=case.dtype.itemsize * moved * len(which),
        **more,
    )


def _config(tokens: str = "mvue") -> sdgp.SDGPConfig:
    return sdgp.SDGPConfig(
        prune="magnitude", grad_weight="sparse", grad_weight_prune=tokens, tune=TUNE
    )


def _sparse(which: Product, tokens: str = "magnitude") -> Prepare:
    """The sparse path by force; random methods are checked through the same plan by magnitude."""

    def prepare(case: Case) -> Work:
        data, best = operands(case), best_candidate(case, which)

        def run(tokens: str = tokens) -> Tensor:
            return _forced(case, which, best.candidate, tokens)

        check = data.expected(which).check
        info = {"algorithm": describe(best.candidate), "rejected": len(best.rejected)}
        return _work(case, (which,), run, lambda _: check(run("magnitude")), info=info)

    return prepare


def _forced(case: Case, which: Product, candidate: Any, tokens: str) -> Tensor:
    data, backend, config = operands(case), executor(case.device_type), _config(tokens=tokens)
    product: Operands = LinearGradInput(data.grad_output, data.weight)
    if which == "grad_weight":
        product = LinearGradWeight(data.grad_output, data.input)
    return sparse_product(backend, product, config, candidate)


def _sparse_both(case: Case) -> Work:
    data = operands(case)
    best = {which: best_candidate(case, which).candidate for which in BOTH}

    def run(tokens: str = "mvue") -> list[Tensor]:
        return [_forced(case, which, best[which], tokens) for which in BOTH]

    def check(_: Any) -> Check:
        results = zip(BOTH, run("magnitude"), strict=True)
        checks = [data.expected(which).check(result) for which, result in results]
        return max(checks, key=lambda c: c.of_bound)

    return _work(case, BOTH, run, check)


def _auto(which: Sequence[Product]) -> Prepare:
    """What a layer gets; a tuned dispatcher may choose the dense product."""

    def prepare(case: Case) -> Work:
        if case.device_type == "cpu":
            raise UnavailableError("the dispatcher runs the fallback on a CPU; see there")
        data, record = operands(case), records.LayerRecord("bench")

        config = _config()

        def run() -> list[Tensor]:
            made = []
            if "grad_input" in which:
                made.append(
                    products.linear_grad_input(data.grad_output, data.weight, config, record)
                )
            if "grad_weight" in which:
                made.append(
                    products.linear_grad_weight(data.grad_output, data.input, True, config, record)
                )
            return made

        def check(timed: list[Tensor]) -> Check:
            results = zip(which, timed, strict=True)
            return max((_check_auto(case, *one) for one in results), key=lambda c: c.of_bound)

        return _work(case, which, run, check, after=lambda: _chosen(record))

    return prepare


def _check_auto(case: Case, which: Product, result: Tensor) -> Check:
    """Compare with what the dispatcher may choose.

    A grad_weight that is not dense was pruned at random: then the sparse path by magnitude is
    checked in its place, which spares the tuner a second method.
    """
    data = operands(case)
    if which == "grad_input":
        return check_any(result, data.expected(which), data.expected_dense(which))
    try:
        return data.expected_dense(which).check(result)
    except WrongResultError:
        if not bool(torch.isfinite(result).all()):
            raise
        candidate = best_candidate(case, which).candidate
        return data.expected(which).check(_forced(case, which, candidate, "magnitude"))


def _chosen(record: records.LayerRecord) -> dict[str, Any]:
    """Return product -> way -> calls, and why it was not the sparse one."""
    chosen: dict[str, dict[str, int]] = {}
    for (which, way), count in record.calls.items():
        chosen.setdefault(which, {})[way] = count
    return {"chose": chosen, "because": sorted({reason for _, reason in record.fallbacks})}


def _fallback(case: Case) -> Work:
    """Emulation: the same numbers where there are no sparse tensor cores."""
    data, config = operands(case), _config()
    expected = data.expected("grad_input")
    info = {"measured_on": "gpu" if case.device_type == "cuda" else "cpu, the fallback"}
    run = lambda: LinearGradInput(data.grad_output, data.weight).emulated(config)  # noqa: E731
    return _work(case, ("grad_input",), run, expected.check, info=info)


def _cslt(case: Case) -> Work:
    rival, data = rivals.TorchCslt(case.device), operands(case)
    expected = data.expected("grad_input")

    def run() -> Tensor:
        return rival.matmul(rival.compress(sdgp.prune(data.grad_output)), data.weight)

    return _work(case, ("grad_input",), run, expected.check)


def _stock(case: Case) -> Work:
    data = operands(case)
    rival = rivals.Stock(data.gemm("grad_input"))

    def run() -> Tensor:
        rival.pack(data.grad_output)
        return rival.matmul(data.weight)

    def check(result: Tensor) -> Check:
        check_pruned(rival.pruned, data.grad_output)
        kept = product(rival.pruned, data.weight, "the product of what the library kept")
        return kept.check(result)

    return _work(case, ("grad_input",), run, check)


def _by_tiles(make: Callable[[Case], rivals.TorchTile | rivals.XFormers]) -> Prepare:
    def prepare(case: Case) -> Work:
        rival, data = make(case), operands(case)
        x, weight = data.grad_output, data.weight

        def check(result: Tensor) -> Check:
            kept = rivals.pruned_by(rival.sparse(x), x)
            return product(kept, weight, "the product of what the rival kept").check(result)

        return _work(case, ("grad_input",), lambda: rival.sparse(x) @ weight, check)

    return prepare


def _contenders(case: Case) -> list[Contender]:
    def made(part: str, name: str, prepare: Prepare, rival: bool = False) -> Contender:
        which: Product = "grad_weight" if part == "grad_weight" else "grad_input"
        return Contender(part, name, prepare, lambda c: c.sizes(which), rival)

    found = [
        made("grad_input", "sdgp", _sparse("grad_input")),
        made("grad_input", "auto", _auto(("grad_input",))),
        made("grad_weight", "sdgp mvue", _sparse("grad_weight", "mvue")),
        made("grad_weight", "auto", _auto(("grad_weight",))),
        made("both_grads", "sdgp", _sparse_both),
        made("both_grads", "auto", _auto(BOTH)),
    ]
    if case.with_rivals:
        found += [
            made("grad_weight", "sdgp magnitude", _sparse("grad_weight")),
            made("grad_input", "dense fallback", _fallback),
            made("grad_input", "sdgp.prune + torch._cslt", _cslt, True),
            made("grad_input", "library prune + compress", _stock, True),
            made("grad_input", "torch tile", _by_tiles(lambda c: rivals.TorchTile(c.device)), True),
            made(
                "grad_input", "xFormers sp24", _by_tiles(lambda c: rivals.XFormers(c.device)), True
            ),
        ]
    return found


def pairs(selection: Selection) -> list[object]:
    return parameters(linear_cases(selection), _contenders)


def test_gradient(request: pytest.FixtureRequest, case: Case, contender: Contender) -> None:
    """Time one way of computing gradients after its result is checked."""
    measure(request, case, contender)
