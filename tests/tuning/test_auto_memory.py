"""tune="auto" under capture and without memory: plain for now, and nothing is remembered."""

from collections.abc import Callable

import pytest
import torch

from sdgp_cusparselt.backends.gemm import Candidate
from sdgp_cusparselt.tuning import Decision, TuningCache, decision_for, memory, tune
from sdgp_cusparselt.tuning.policy import AGAIN_S
from tests.tuning.auto_cases import AUTO, Clock, again, decide
from tests.tuning.fakes import GEMM, TOP, FakeExecutor, fixed


def test_under_capture_nothing_is_read_tried_or_remembered(cache: TuningCache) -> None:
    executor = FakeExecutor("good")
    decision = decide(cache, executor, capturing=True)
    assert decision.use == "dense" and decision.transient and not executor.calls
    assert decide(cache, executor).use == "sparse"
    assert decide(cache, executor, capturing=True).use == "sparse", "it is proven by now"
    fresh = FakeExecutor("good")
    unproven = decide(again(cache), fresh, capturing=True)
    assert unproven.use == "dense" and unproven.transient and not fresh.calls


@pytest.mark.parametrize("stored", [False, True], ids=["search", "proof"])
def test_without_free_memory_nothing_is_tried_until_there_is(
    cache: TuningCache, clock: Clock, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    if stored:
        tune(TOP, FakeExecutor("good"), cache=cache, timer=fixed(a0=1.0))
        cache = again(cache)
    executor = FakeExecutor("good")
    with monkeypatch.context() as patch:
        patch.setattr(memory, "free_bytes", lambda device: 1000.0)
        decision = decide(cache, executor)
    assert decision.use == "dense" and decision.transient and "GiB are free" in decision.reason
    assert not executor.calls
    assert decide(cache, executor) is decision, "not asked at every step"
    clock.now += AGAIN_S
    assert decide(cache, executor).use == "sparse"


def no_memory(*args: object, **kwargs: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")


def no_driver_memory(*args: object, **kwargs: object) -> None:
    raise RuntimeError("Triton Error [CUDA]: out of memory")


@pytest.mark.parametrize("error", [no_memory, no_driver_memory])
@pytest.mark.parametrize(
    "where",
    [
        "search.timer_for",
        "search.trials",
        "search.generators_kept",
        "contest.dense_operand",
        "contest.race",
        "proof._poison",
    ],
)
def test_no_memory_anywhere_is_plain_for_now(
    cache: TuningCache,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: Callable[..., None],
) -> None:
    def ask() -> Decision:
        return decision_for(
            GEMM,
            FakeExecutor("good"),
            AUTO,
            method="magnitude",
            transpose=False,
            capturing=False,
            cache=cache,
        )

    with monkeypatch.context() as patch:
        patch.setattr(f"sdgp_cusparselt.tuning.{where}", error)
        decision = ask()
    assert decision.use == "dense" and decision.transient and "out of memory" in decision.reason
    clock.now += AGAIN_S
    assert ask().candidate == Candidate(0), "and is tried again"


def test_no_memory_for_the_proof_of_a_plan(
    cache: TuningCache, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(TOP, FakeExecutor("good"), cache=cache, timer=fixed(a0=1.0))
    with monkeypatch.context() as patch:
        patch.setattr("sdgp_cusparselt.tuning.search.trials", no_memory)
        decision = decide(cache, FakeExecutor("good"))
    assert decision.transient and "no memory to prove in" in decision.reason
    clock.now += AGAIN_S
    assert decide(cache, FakeExecutor("good")).use == "sparse"
