"""Prune, pack, and both: what a sparse product costs before it starts, in clones of grad_output.

    PYTHONPATH=.:bindings python -m pytest bench/bench_parts.py -k cpu

A clone reads and writes the tensor once. Packing one direction moves 0.78 of that, both 1.06.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import sdgp_cusparselt as sdgp
from bench import rivals
from bench.contender import Contender, Work, measure, parameters
from bench.operands import best_candidate, describe, executor, multiply, operands
from bench.shapes import Case, Product, Selection, linear_cases
from bench.timing import Run
from bench.verify import Check, Expected, check_pruned, product

METHODS = ("magnitude", "rescaled_magnitude", "random", "mvue")
PRUNED_BYTES, PACKED_BYTES = 2.0, 1.125
Prepare = Callable[[Case], Work]


def _work(case: Case, run: Run, check: Callable[[Any], Check], written: float, **info: Any) -> Work:
    x = operands(case).grad_output
    return Work(
        run,
        check,
        x.clone,
        "clone",
        nbytes=int((case.dtype.itemsize + written) * x.numel()),
        info=info,
    )


def _exact(case: Case, method: str) -> Callable[[Tensor], Check]:
    """Compare with ``sdgp.prune`` where that is deterministic; else look at the groups."""

    def check(pruned: Tensor) -> Check:
        x = operands(case).grad_output
        if method in ("magnitude", "rescaled_magnitude"):
            wide = sdgp.prune(x.float(), method=method)
            # One rounding of the ratio's product; magnitude keeps the bits.
            eps = torch.finfo(x.dtype).eps
            bound = (
                wide.abs() * (2 * eps if method != "magnitude" else 0)
                + torch.finfo(torch.float32).tiny
            )
            return Expected(wide, bound, f"float32 {method}").check(pruned)
        if method == "random":
            check_pruned(pruned, x)
        else:
            check_pruned(pruned.sign(), x.sign())
        return Check(0.0, 0.0, "two of four, kept values")

    return check


def _prune(method: str) -> Prepare:
    def prepare(case: Case) -> Work:
        x = operands(case).grad_output
        run = lambda: sdgp.prune(x, method=method)  # noqa: E731
        return _work(case, run, _exact(case, method), PRUNED_BYTES, method=method)

    return prepare


def _product_of(case: Case, which: Product, candidate: Any) -> Callable[[Tensor], Check]:
    """Check a packed buffer by the product that it was packed for."""
    data = operands(case)
    expected = data.expected(which)
    return lambda packed: expected.check(multiply(data, which, candidate, packed)())


def _pack(which: Product, method: str = "magnitude") -> Prepare:
    def prepare(case: Case) -> Work:
        data, best = operands(case), best_candidate(case, which)
        backend, x, gemm = executor(case.device_type), data.grad_output, data.gemm(which)
        transpose = which == "grad_weight"

        def packed(method: str) -> Tensor:
            return backend.pack(x, gemm, best.candidate, method=method, transpose=transpose)

        # Random methods differ between implementations; the same plan is proven by magnitude.
        of_magnitude = _product_of(case, which, best.candidate)
        return _work(
            case,
            lambda: packed(method),
            lambda _: of_magnitude(packed("magnitude")),
            PACKED_BYTES,
            method=method,
            algorithm=describe(best.candidate),
        )

    return prepare


def _pack_both(case: Case) -> Work:
    data, backend = operands(case), executor(case.device_type)
    products: tuple[Product, Product] = ("grad_input", "grad_weight")
    best = {which: best_candidate(case, which).candidate for which in products}

    def run() -> list[Tensor]:
        return [
            backend.pack(
                data.grad_output,
                data.gemm(which),
                best[which],
                method="magnitude",
                transpose=which == "grad_weight",
            )
            for which in products
        ]

    def check(packed: list[Tensor]) -> Check:
        checks = [
            _product_of(case, which, best[which])(one)
            for which, one in zip(products, packed, strict=True)
        ]
        return max(checks, key=lambda c: c.of_bound)

    return _work(case, run, check, 2 * PACKED_BYTES, passes=2)


def _prune_then_compress(case: Case) -> Work:
    """Plain torch prunes, then the executor packs what is 2:4 already."""
    data, best = operands(case), best_candidate(case, "grad_input")
    backend, gemm, x = executor(case.device_type), data.gemm("grad_input"), data.grad_output

    def run() -> Tensor:
        return backend.pack(sdgp.prune(x), gemm, best.candidate, method="none")

    check = _product_of(case, "grad_input", best.candidate)
    return _work(case, run, check, 2 * PRUNED_BYTES + PACKED_BYTES)


def _stock(case: Case) -> Work:
    data = operands(case)
    rival = rivals.Stock(data.gemm("grad_input"))

    def check(_: Tensor) -> Check:
        check_pruned(rival.pruned, data.grad_output)
        expected = product(rival.pruned, data.weight, "the product of what the library kept")
        return expected.check(rival.matmul(data.weight))

    run = lambda: rival.pack(data.grad_output)  # noqa: E731
    return _work(case, run, check, 2 * PRUNED_BYTES + PACKED_BYTES)


def _cslt_compress(case: Case) -> Work:
    rival, data = rivals.TorchCslt(case.device), operands(case)
    pruned, expected = data.pruned("grad_input"), data.expected("grad_input")

    def check(compressed: Tensor) -> Check:
        return expected.check(rival.matmul(compressed, data.weight))

    return _work(case, lambda: rival.compress(pruned), check, PACKED_BYTES, pruning="not included")


def _tile(case: Case) -> Work:
    rival, x = rivals.TorchTile(case.device), operands(case).grad_output

    def check(_: Any) -> Check:
        rivals.pruned_by(rival.sparse(x), x)
        return Check(0.0, 0.0, "its product with the identity")

    return _work(case, lambda: rival.pack(x), check, 2 * PACKED_BYTES)


def _xformers(case: Case) -> Work:
    rival, x = rivals.XFormers(case.device), operands(case).grad_output

    def check(sparse: Any) -> Check:
        rivals.pruned_by(sparse, x)
        return Check(0.0, 0.0, "its product with the identity")

    return _work(case, lambda: rival.sparse(x), check, 2 * PACKED_BYTES)


def _contenders(full: bool, case: Case) -> list[Contender]:
    def made(part: str, name: str, prepare: Prepare, which: Product = "grad_input", **more: bool):
        return Contender(part, name, prepare, lambda c: c.sizes(which), **more)

    found = [
        made("prune", "sdgp", _prune("magnitude")),
        made("pack", "sdgp", _pack("grad_input")),
        made("pack_tokens", "sdgp", _pack("grad_weight"), "grad_weight"),
        made("pack_tokens", "sdgp mvue", _pack("grad_weight", "mvue"), "grad_weight"),
        made("pack_both", "sdgp", _pack_both),
        made("prune_pack", "sdgp.prune, then pack", _prune_then_compress),
    ]
    if case.with_rivals:
        for method in METHODS[1:] if full else ():
            found.append(made("prune", f"sdgp {method}", _prune(method)))
            # Not what ``sdgp plan`` reads: its pack is the one by magnitude.
            found.append(made("pack", f"sdgp {method}", _pack("grad_input", method), rival=True))
        found += [
            made("prune_pack", "library prune + compress", _stock, rival=True),
            made("prune_pack", "torch._cslt_compress", _cslt_compress, rival=True),
            made("pack_both", "torch tile", _tile, rival=True),
            made("pack_both", "xFormers sp24", _xformers, rival=True),
        ]
    return found


def pairs(selection: Selection) -> list[object]:
    return parameters(linear_cases(selection), partial(_contenders, selection.full))


def test_part(request: pytest.FixtureRequest, case: Case, contender: Contender) -> None:
    """Time one way of pruning or packing after its result is checked."""
    measure(request, case, contender)
