"""Tuning through the library's C interface, with algorithms that misbehave as real ones do."""

from collections.abc import Iterator
from pathlib import Path

import pycusparselt as cslt
import pytest
import torch

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.tuning import TuningCache, decision_for, tune
from tests.emulator.build import build
from tests.emulator.control import Bad, Emulator
from tests.tuning.fakes import CPU, FakeTimer

BAD = {
    Bad.WRONG_FROM_256_ROWS: "wrong: ",
    Bad.NON_DETERMINISTIC: "not deterministic: ",
    Bad.NOT_SUPPORTED_AT_PLAN: "raised CusparseLtError: cusparseLtMatmulPlanInit failed",
    Bad.NOT_SUPPORTED_AT_MATMUL: "raised CusparseLtError: cusparseLtMatmul failed",
    Bad.GIVES_NAN: "wrong: 100.00% of the elements are out of bound; worst (0, 0): got nan",
    Bad.HANGS_AT_PLAN: "raised CusparseLtError: cusparseLtMatmulPlanInit failed",
    Bad.FAILS_AT_MATMUL: "raised CusparseLtError: cusparseLtMatmul failed",
    Bad.ALWAYS_WRONG: "wrong: ",
}
#: The worse an algorithm is, the faster it looks; dense is slowest.
TIMES = FakeTimer(lambda label, count: 1000.0 if label == "dense" else float(label[-1]) + 1)


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    emulator = Emulator(build())
    emulator.reset()
    before = emulator.live()
    yield emulator
    assert emulator.live() == before
    assert emulator.unpruned_groups() == emulator.order_violations() == 0
    emulator.reset()


@pytest.fixture
def backend(emulator: Emulator) -> Iterator[CusparseLtBackend]:
    backend = CusparseLtBackend(Machine("cpu", cslt.load(emulator.path)))
    yield backend
    backend.plans.clear()


@pytest.mark.parametrize("order", ["row", "col"])
@pytest.mark.parametrize(
    "method, transpose", [("magnitude", False), ("mvue", True), ("none", True)]
)
def test_none_of_the_bad_algorithms_is_chosen_and_each_is_named(
    backend: CusparseLtBackend,
    emulator: Emulator,
    tmp_path: Path,
    order: str,
    method: str,
    transpose: bool,
) -> None:
    emulator.max_alg_id(len(BAD) + 1)
    for alg_id, kind in enumerate(BAD):
        emulator.bad_algorithm(alg_id, kind)
    gemm = Gemm(272, 24, 64, torch.bfloat16, order, CPU)  # type: ignore[arg-type]
    cache = TuningCache(tmp_path)
    decision = tune(gemm, backend, cache=cache, method=method, transpose=transpose, timer=TIMES)
    assert decision.use == "sparse" and decision.candidate == Candidate(len(BAD))
    (stored,) = TuningCache(tmp_path).decisions(backend, CPU)
    assert stored == decision
    reasons = {candidate.alg_id: reason for candidate, reason in stored.rejected}
    assert sorted(reasons) == list(range(len(BAD)))
    for alg_id, start in enumerate(BAD.values()):
        assert reasons[alg_id].startswith(start), reasons[alg_id]


def test_all_bad_is_dense(backend: CusparseLtBackend, emulator: Emulator, tmp_path: Path) -> None:
    emulator.max_alg_id(len(BAD))
    for alg_id, kind in enumerate(BAD):
        emulator.bad_algorithm(alg_id, kind)
    gemm = Gemm(300, 24, 64, torch.float16, "row", CPU)
    decision = tune(gemm, backend, cache=TuningCache(tmp_path), timer=TIMES)
    assert (decision.use, decision.candidate) == ("dense", None)
    assert len(decision.rejected) == len(BAD) and "none of 8 algorithms" in decision.reason


def test_the_slow_algorithm_loses_by_the_clock(
    backend: CusparseLtBackend, emulator: Emulator, tmp_path: Path
) -> None:
    emulator.max_alg_id(2)
    emulator.algorithm_delay(0, 20_000)
    gemm = Gemm(16, 16, 32, torch.bfloat16, "row", CPU)
    decision = tune(gemm, backend, cache=TuningCache(tmp_path))
    assert decision.candidate == Candidate(1) and not decision.rejected


@pytest.mark.parametrize("layout", ["blocked", "sm90_atom", "random"])
def test_a_metadata_order_that_the_library_keeps_to_itself(
    backend: CusparseLtBackend, emulator: Emulator, tmp_path: Path, layout: str
) -> None:
    emulator.layout(layout, seed=5)
    emulator.layout_per_plan()
    emulator.max_alg_id(2)
    gemm = Gemm(300, 40, 96, torch.bfloat16, "row", CPU)
    decision = tune(gemm, backend, cache=TuningCache(tmp_path), timer=TIMES)
    assert decision.use == "sparse" and not decision.rejected


def test_never_proves_the_default(
    backend: CusparseLtBackend, emulator: Emulator, tmp_path: Path
) -> None:
    gemm = Gemm(300, 40, 96, torch.bfloat16, "row", CPU)
    config = sdgp.SDGPConfig(prune="magnitude", tune="never")

    def decide(folder: str) -> object:
        return decision_for(
            gemm,
            backend,
            config,
            method="magnitude",
            transpose=False,
            capturing=False,
            cache=TuningCache(tmp_path / folder),
        )

    good = decide("good")
    assert (good.use, good.candidate) == ("sparse", Candidate(0))
    emulator.bad_algorithm(0, Bad.ALWAYS_WRONG)
    bad = decide("bad")
    assert bad.use == "dense" and bad.rejected[0][1].startswith("wrong")
