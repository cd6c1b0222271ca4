"""A search in a process that is killed when an algorithm hangs and replaced when one ends it."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sdgp_cusparselt.backends.gemm import Candidate
from sdgp_cusparselt.errors import SDGPError
from sdgp_cusparselt.tuning import TuningCache, tune
from sdgp_cusparselt.tuning.contest import Limits
from sdgp_cusparselt.tuning.decision import Key
from sdgp_cusparselt.tuning.watchdog import Watchdog
from tests.tuning.fake_children import dies_at_once, hangs_at_once, misbehaves
from tests.tuning.fakes import CPU, TOP, FakeExecutor

KEY = Key(TOP, "magnitude", False, "mm")
LIMITS = Limits()


def watchdog(
    *kinds: str, serve: Callable[..., None] = misbehaves, patience_s: float = 0.3
) -> Watchdog:
    """A child is told by its executor's place what its algorithms do."""
    return Watchdog(list(kinds), patience_s=patience_s, start_s=20.0, serve=serve)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("hangs", "did not go on for 0.3 s and was killed"),
        ("ignores signals and hangs", "did not go on for 0.3 s and was killed"),
        ("crashes", "ended the process: signal 11"),
        ("exits", "ended the process: status 7"),
        ("loses its context", "ended the process: AcceleratorError: CUDA error: an illegal inst"),
    ],
)
def test_what_ends_a_child_is_rejected_and_the_search_goes_on(kind: str, reason: str) -> None:
    children = []
    with watchdog("good", kind, "good") as dog:
        found = dog.search(KEY, Limits(progress=lambda *step: children.append(dog._process)))
    assert (found.use, found.candidate, found.key) == ("sparse", Candidate(2), KEY)
    ((candidate, why),) = found.rejected
    assert candidate == Candidate(1) and why.startswith(reason)
    assert len(set(children)) == 2, "one for the bad algorithm, one after it"
    assert not any(child.is_alive() for child in children), "none outlives the search"


def test_several_bad_ones_each_cost_a_process_and_good_searches_share_one() -> None:
    with watchdog("crashes", "hangs", "good") as dog:
        found = dog.search(KEY, LIMITS)
        assert [c.alg_id for c, _ in found.rejected] == [0, 1]
    with watchdog("good") as dog:
        one, two = dog.search(KEY, LIMITS), dog.search(KEY, LIMITS)
    assert one.reason == two.reason != found.reason and str(os.getpid()) not in one.reason


@pytest.mark.parametrize(
    "serve, words", [(hangs_at_once, "did not go on for 0.5 s"), (dies_at_once, "status 9")]
)
def test_a_child_that_never_starts_is_plain_for_now(serve: Callable[..., None], words: str) -> None:
    patience = 0.5 if serve is hangs_at_once else 20.0
    with Watchdog([], start_s=patience, serve=serve) as dog:
        found = dog.search(KEY, LIMITS)
    assert found.use == "dense" and found.transient and not found.rejected
    assert words in found.reason and "before it tried an algorithm" in found.reason


def test_a_programming_error_is_no_property_of_an_algorithm() -> None:
    with watchdog("bug", "good") as dog, pytest.raises(SDGPError, match="see its traceback"):
        dog.search(KEY, LIMITS)


def test_progress_comes_through() -> None:
    steps: list[tuple[int, int, str]] = []
    with watchdog("good", "good") as dog:
        dog.search(KEY, Limits(progress=lambda *step: steps.append(step)))
    assert steps == [(0, 2, "alg 0"), (1, 2, "alg 1")]


def test_what_it_finds_is_stored_with_what_it_killed(tmp_path: Path) -> None:
    cache, executor = TuningCache(tmp_path), FakeExecutor("good")
    with watchdog("hangs", "good") as dog:
        found = tune(TOP, executor, cache=cache, searcher=dog.search)
    assert not executor.calls, "nothing is tried in this process"
    (stored,) = TuningCache(tmp_path).decisions(executor, CPU)
    assert stored == found and stored.rejected[0][0] == Candidate(0)


def test_the_real_child_survives_a_real_search() -> None:
    make = partial(FakeExecutor, "nan", "good", unsafe=("sleeps", "good"))
    with Watchdog(make, patience_s=3.0) as dog:
        found = dog.search(KEY, LIMITS)
    reasons = {candidate.alg_id: reason for candidate, reason in found.rejected}
    assert sorted(reasons) == [0, 2]
    assert reasons[0].startswith("wrong: ") and "and was killed" in reasons[2]
    assert found.candidate in (Candidate(1), Candidate(3)) and found.elsewhere == Candidate(1)
    assert found.conditions["candidates_timed"] == 2 and not found.bounded
