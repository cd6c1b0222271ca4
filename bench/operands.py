"""Operands of a case, the sparse executor that runs it, and its fastest proven candidate."""

import functools
import statistics
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pycusparselt as cslt
import torch
from torch import Tensor

import sdgp_cusparselt as sdgp
from bench.shapes import Case, Product
from bench.timing import Run, in_turns
from bench.verify import Expected, WrongResultError, product
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.products import routes

#: Seconds in which all candidates of one product are timed once more each.
SCREENING_S = 0.02


class UnavailableError(Exception):
    """A contender cannot run here; the message is the reason, and goes into the result file."""


class Operands:
    """Tensors of one case, made on its device when they are first used."""

    def __init__(self, case: Case) -> None:
        self.case = case
        seed = zlib.crc32(case.label.encode())
        self._generator = torch.Generator(case.device).manual_seed(seed)
        self._kept: dict[tuple[str, Product], Any] = {}

    def _once(self, name: str, which: Product, make: Callable[[], Any]) -> Any:
        """Keep a result with the operands, so that it goes when they go."""
        if (name, which) not in self._kept:
            self._kept[name, which] = make()
        return self._kept[name, which]

    def _random(self, rows: int, cols: int) -> Tensor:
        options = {"device": self.case.device, "dtype": self.case.dtype}
        return torch.randn(rows, cols, generator=self._generator, **options)

    @cached_property
    def grad_output(self) -> Tensor:
        """[tokens, out_features]."""
        return self._random(self.case.tokens, self.case.out_features)

    @cached_property
    def weight(self) -> Tensor:
        """[out_features, in_features]."""
        return self._random(self.case.out_features, self.case.in_features)

    @cached_property
    def input(self) -> Tensor:
        """[tokens, in_features]."""
        return self._random(self.case.tokens, self.case.in_features)

    def left(self, which: Product) -> Tensor:
        """Return the operand to be pruned, [M, K] of the product; a view."""
        return self.grad_output if which == "grad_input" else self.grad_output.t()

    def right(self, which: Product) -> Tensor:
        """Return the dense operand, [K, N] of the product."""
        return self.weight if which == "grad_input" else self.input

    def pruned(self, which: Product) -> Tensor:
        """Return ``left`` pruned by magnitude in plain torch, [M, K]."""
        left = self.left(which)
        return self._once("pruned", which, lambda: sdgp.prune(left.contiguous()))

    def expected(self, which: Product) -> Expected:
        """Return the pruned product and its bound."""
        pruned, right = self.pruned(which), self.right(which)
        return self._once("expected", which, lambda: product(pruned, right, "the pruned product"))

    def expected_dense(self, which: Product) -> Expected:
        """Return the unpruned product and its bound."""
        left, right = self.left(which), self.right(which)
        # torch lets cuBLAS round the partial sums of a split K to 16 bits.
        return self._once("dense", which, lambda: product(left, right, "the dense product", 2))

    def gemm(self, which: Product) -> Gemm:
        """Return the product as the sparse executor sees it."""
        m, n, k = self.case.sizes(which)
        return Gemm(m, n, k, self.case.dtype, "row", self.case.device)

    def dense(self, which: Product) -> Run:
        """Return the dense product as autograd computes it, ready to be timed."""
        left, right = self.left(which), self.right(which)
        return lambda: torch.mm(left, right)


@functools.lru_cache(maxsize=1)
def operands(case: Case) -> Operands:
    """Return the case's operands; those of the case before are dropped."""
    return Operands(case)


@functools.cache
def executor(device_type: str) -> CusparseLtBackend:
    """Return the cuSPARSELt backend: the one that layers use, or one on the emulator for a CPU.

    Raises:
        UnavailableError: there is no library, no device, or no emulator.
    """
    if device_type == "cpu":
        return CusparseLtBackend(Machine("cpu", cslt.load(_emulator())))
    reasons = routes.LIBRARY.machine_reasons()
    if reasons:
        raise UnavailableError("; ".join(reasons))
    return routes.LIBRARY


def _emulator() -> str:
    try:
        from tests.emulator.build import build
    except ImportError as error:
        raise UnavailableError("the emulator's sources are not beside the benchmarks") from error
    try:
        return str(build())
    except RuntimeError as error:
        raise UnavailableError(str(error).splitlines()[0]) from error


@dataclass(frozen=True)
class Best:
    """The fastest candidate that computes right.

    Attributes:
        candidate: it.
        tried: how many there are.
        rejected: candidate -> why it is out.
    """

    candidate: Candidate
    tried: int
    rejected: dict[str, str]


@functools.cache
def best_candidate(case: Case, which: Product) -> Best:
    """Prove every candidate on the case's own data, time the proven, return the fastest.

    Raises:
        UnavailableError: none computes right; the message has the first reason.
    """
    backend, data = executor(case.device_type), operands(case)
    gemm, expected = data.gemm(which), data.expected(which)
    offered = backend.candidates(gemm)
    proven: dict[Candidate, float] = {}
    rejected: dict[str, str] = {}
    for candidate in offered:
        try:
            packed = pack(data, which, candidate)
            run = multiply(data, which, candidate, packed)
            for _ in range(2):
                expected.check(run())
        except (cslt.CusparseLtError, WrongResultError) as fault:
            rejected[describe(candidate)] = str(fault).splitlines()[0]
            continue
        (times,) = in_turns([run], gemm.device, SCREENING_S)
        proven[candidate] = statistics.median(times)
        if case.device_type == "cpu":
            break
    if not proven:
        first = next(iter(rejected.items()), ("", "the library offers none"))
        raise UnavailableError(f"no candidate is right: {' '.join(first)}")
    return Best(min(proven, key=lambda c: proven[c]), len(offered), rejected)


def pack(data: Operands, which: Product, candidate: Candidate) -> Tensor:
    """Return grad_output pruned by magnitude and packed for one product."""
    return executor(data.case.device_type).pack(
        data.grad_output,
        data.gemm(which),
        candidate,
        method="magnitude",
        transpose=which == "grad_weight",
    )


def multiply(data: Operands, which: Product, candidate: Candidate, packed: Tensor) -> Run:
    """Return packed @ dense, ready to be timed."""
    backend, gemm, right = executor(data.case.device_type), data.gemm(which), data.right(which)
    return lambda: backend.matmul(packed, right, gemm, candidate)


def describe(candidate: Candidate) -> str:
    """Return a short form such as ``alg 3 split_k -1``."""
    parts = [f"alg {candidate.alg_id}"]
    if candidate.split_k != 1:
        parts.append(f"split_k {candidate.split_k}")
    if candidate.split_k_mode is not None:
        parts.append(f"mode {candidate.split_k_mode}")
    return " ".join(parts)
