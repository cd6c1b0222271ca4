"""tune="auto" beside other processes: ranks that wait, disks that fail."""

from dataclasses import replace
from pathlib import Path

import pytest

from sdgp_cusparselt.errors import SDGPCacheWarning
from sdgp_cusparselt.tuning import Decision, TuningCache, tune
from sdgp_cusparselt.tuning.contest import Limits
from sdgp_cusparselt.tuning.policy import AGAIN_S, FEW
from sdgp_cusparselt.tuning.search import Search
from sdgp_cusparselt.tuning.session import Session
from tests.tuning.auto_cases import TOP_KEY, Clock, again, decide
from tests.tuning.fakes import CPU, GEMM, TOP, FakeExecutor, FakeTimer, fixed


def test_another_ranks_search_is_waited_for_briefly_and_read_later(
    cache: TuningCache, clock: Clock
) -> None:
    cache.timeout_s = 0.05
    executor = FakeExecutor("good")
    other = TuningCache(cache.folder)
    with other.turn(executor, CPU) as held:
        assert held
        meanwhile = decide(cache, executor)
        assert meanwhile.use == "dense" and meanwhile.transient and not executor.calls
        assert decide(cache, executor) is meanwhile
    tune(TOP, executor, cache=other, timer=fixed(a0=1.0))
    clock.now += AGAIN_S
    calls = executor.calls["candidates"]
    assert decide(cache, executor).use == "sparse"
    assert executor.calls["candidates"] == calls, "read, not searched for"


def test_a_waiting_rank_reads_what_is_stored_while_the_tuner_goes_on(cache: TuningCache) -> None:
    """The tuner may hold the turn for its next shape; its answer counts all the same."""
    executor, tuner = FakeExecutor("good"), TuningCache(cache.folder)
    asked = []
    with tuner.turn(executor, CPU):

        def ready() -> bool:
            asked.append(1)
            return len(asked) == 2

        with cache.turn(executor, CPU, ready=ready) as held:
            assert not held
        assert len(asked) == 3
        found = decide_while_held(cache, tuner, executor)
    assert found.use == "sparse"


def decide_while_held(cache: TuningCache, tuner: TuningCache, executor: FakeExecutor) -> Decision:
    limits = Limits(candidates=FEW)
    decision = Search(TOP_KEY, executor, limits=limits).decide(fixed(a0=1.0))
    tuner.write(decision, executor)
    return tune(TOP, executor, cache=cache, limits=limits, timer=FakeTimer({}))


def test_a_disk_that_cannot_be_written_to_is_said_once(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = TuningCache(tmp_path / "file" / "cache", session=Session(clock=clock))
    executor = FakeExecutor("good")
    with pytest.warns(SDGPCacheWarning, match="set SDGP_CACHE_DIR") as caught:
        for m in (20, 32, 64):
            assert decide(cache, executor, replace(GEMM, m=m)).use == "sparse"
        assert decide(cache, executor, replace(GEMM, n=40)).use == "sparse"
    assert len(caught) == 1
    assert executor.calls["candidates"] == 2, "one search a bucket, in memory"


def test_a_full_disk_is_said_once(cache: TuningCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdgp_cusparselt.cache._replace", full)
    executor = FakeExecutor("good")
    with pytest.warns(SDGPCacheWarning, match="No space left on device") as caught:
        for m in (20, 32, 64):
            assert decide(cache, executor, replace(GEMM, m=m)).use == "sparse"
    assert len(caught) == 1 and executor.calls["candidates"] == 1


def test_a_corrupt_file_in_a_folder_without_locks(
    cache: TuningCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = FakeExecutor("good")
    decide(cache, executor)
    cache.file(executor, CPU).path.write_text("{")

    def locked(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sdgp_cusparselt.cache.locked", locked)
    monkeypatch.setattr("sdgp_cusparselt.tuning.store.locked", locked)
    with pytest.warns(SDGPCacheWarning, match="Permission denied"):
        assert decide(again(cache), executor).use == "sparse"
