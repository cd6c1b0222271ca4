"""What each tune policy does when a product first occurs, again, and under graph capture."""

from pathlib import Path

import pytest

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.gemm import Candidate
from sdgp_cusparselt.tuning import Decision, TuningCache, decision_for, tune
from tests.tuning.fakes import GEMM, TOP, FakeExecutor, fixed

FIRST_USE = sdgp.SDGPConfig(prune="magnitude", tune="first_use")
AHEAD = sdgp.SDGPConfig(prune="magnitude", tune="ahead")
NEVER = sdgp.SDGPConfig(prune="magnitude", tune="never")


@pytest.fixture
def cache(tmp_path: Path) -> TuningCache:
    return TuningCache(tmp_path)


def decide(
    cache: TuningCache, executor: FakeExecutor, config: sdgp.SDGPConfig, capturing: bool = False
) -> Decision:
    return decision_for(
        GEMM,
        executor,
        config,
        method="magnitude",
        transpose=False,
        capturing=capturing,
        cache=cache,
        timer=fixed(a0=40.0, a1=30.0),
    )


def test_first_use_tunes_once_and_then_only_looks_up(cache: TuningCache) -> None:
    executor = FakeExecutor("good", "good")
    first = decide(cache, executor, FIRST_USE)
    assert (first.use, first.candidate) == ("sparse", Candidate(1))
    calls = executor.calls.copy()
    cache.file(executor, GEMM.device).path.unlink()
    assert decide(cache, executor, FIRST_USE) is first
    assert executor.calls == calls


def test_under_capture_nothing_is_tried_and_nothing_remembered(cache: TuningCache) -> None:
    executor = FakeExecutor("good", "good")
    for config in (FIRST_USE, NEVER):
        decision = decide(cache, executor, config, capturing=True)
        assert decision.use == "dense" and "untuned under graph capture" in decision.reason
    assert not executor.calls
    assert decide(cache, executor, FIRST_USE).use == "sparse"
    assert decide(cache, executor, FIRST_USE, capturing=True).use == "sparse"


def test_ahead_only_reads(cache: TuningCache) -> None:
    executor = FakeExecutor("good", "good")
    decision = decide(cache, executor, AHEAD)
    assert (decision.use, decision.reason) == ("dense", "not tuned yet: run sdgp tune")
    assert not executor.calls
    assert decide(cache, executor, AHEAD) is decision
    tune(TOP, executor, cache=cache, timer=fixed(a0=40.0, a1=30.0))
    later = TuningCache(cache.folder)
    found = decide(later, executor, AHEAD, capturing=True)
    assert found.use == "dense" and "under graph capture" in found.reason, "it is not proven here"
    for capturing in (False, True):
        found = decide(later, executor, AHEAD, capturing)
        assert (found.use, found.candidate) == ("sparse", Candidate(1))


def test_never_proves_the_default_and_times_nothing(cache: TuningCache) -> None:
    executor = FakeExecutor("good", "good")
    decision = decide(cache, executor, NEVER)
    assert (decision.use, decision.candidate) == ("sparse", Candidate(0))
    assert decision.sparse_us is None and "not timed" in decision.reason
    assert not cache.file(executor, GEMM.device).path.exists()
    calls = executor.calls.copy()
    assert decide(cache, executor, NEVER) is decision and executor.calls == calls


def test_never_goes_dense_where_the_default_is_wrong(cache: TuningCache) -> None:
    decision = decide(cache, FakeExecutor("nan", "good"), NEVER)
    assert decision.use == "dense" and decision.rejected[0][0] == Candidate(0)
    assert len(decision.rejected) == 1


def test_method_and_direction_are_part_of_the_key(cache: TuningCache) -> None:
    executor = FakeExecutor("good")
    timer = fixed(a0=1.0)
    for number, (method, transpose) in enumerate(
        [("magnitude", False), ("mvue", False), ("mvue", True)], start=1
    ):
        tune(GEMM, executor, cache=cache, timer=timer, method=method, transpose=transpose)
        assert executor.calls["candidates"] == number
    assert len(cache.decisions(executor, GEMM.device)) == 3
