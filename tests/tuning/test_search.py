"""Proof before time, time before the race, and every loser named."""

from pathlib import Path

import pytest
import torch

from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.tuning import Decision, Rival, TuningCache, tune
from sdgp_cusparselt.tuning.contest import Limits
from sdgp_cusparselt.tuning.proof import EXACT_TRIALS, REPEATS
from tests.tuning.fakes import CPU, GEMM, FakeExecutor, FakeTimer, fixed

WRONG = {
    "one element": "wrong: 0.13% of the elements are out of bound; worst (31, 23)",
    "last group": "wrong",
    "nan": "wrong: 100.00%",
    "writes nothing": "",
    "flickers": "not deterministic",
    "packs the wrong two": "wrong",
    "no plan": "raised CusparseLtError: cusparseLtMatmul failed: CUSPARSE_STATUS_NOT_SUPPORTED",
    "refuses matmul": "raised CusparseLtError",
    "no memory": "raised OutOfMemoryError: CUDA out of memory",
}


@pytest.fixture
def cache(tmp_path: Path) -> TuningCache:
    return TuningCache(tmp_path)


def search(cache: TuningCache, executor: FakeExecutor, timer: FakeTimer, **kwargs) -> Decision:
    gemm = kwargs.pop("gemm", GEMM)
    return tune(gemm, executor, cache=cache, timer=timer, **kwargs)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bad_algorithm_is_never_chosen_and_is_named(
    cache: TuningCache, kind: str, dtype: torch.dtype
) -> None:
    gemm = Gemm(32, 24, 48, dtype, "row", CPU)
    decision = search(cache, FakeExecutor(kind, "good"), fixed(a0=1.0, a1=50.0), gemm=gemm)
    assert decision.use == "sparse" and decision.candidate == Candidate(1)
    ((candidate, reason),) = decision.rejected
    assert candidate == Candidate(0) and reason.startswith(WRONG[kind])


def test_old_memory_does_not_pass_for_a_result(
    cache: TuningCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An algorithm that writes nothing returns what the allocator had there: another's result."""
    freed = torch.zeros(32, 24, dtype=torch.bfloat16)
    fill = torch.full

    def full(size, value, **kwargs):
        freed.fill_(value)
        return fill(size, value, **kwargs)

    class Reusing(FakeExecutor):
        def matmul(self, packed, dense, gemm, candidate):
            if self.kinds[candidate.alg_id] == "writes nothing":
                return freed
            return freed.copy_(super().matmul(packed, dense, gemm, candidate)).clone()

    monkeypatch.setattr(torch, "full", full)
    decision = search(cache, Reusing("good", "writes nothing"), fixed(a0=50.0, a1=1.0))
    assert decision.candidate == Candidate(0) and len(decision.rejected) == 1


@pytest.mark.parametrize("k", [16, 1024, 16384])
def test_one_missing_group_shows_at_any_reduction_length(cache: TuningCache, k: int) -> None:
    gemm = Gemm(8, 8, k, torch.bfloat16, "col", CPU)
    decision = search(cache, FakeExecutor("last group", "good"), fixed(a1=1.0), gemm=gemm)
    assert [c.alg_id for c, _ in decision.rejected] == [0]
    assert decision.candidate == Candidate(1)


def test_all_bad_is_dense(cache: TuningCache) -> None:
    kinds = [kind for kind in WRONG if kind != "no memory"]
    decision = search(cache, FakeExecutor(*kinds), fixed())
    assert decision.use == "dense" and decision.candidate is None and not decision.transient
    assert decision.reason.startswith(f"none of {len(kinds)} algorithms is usable; alg ")
    assert sorted(c.alg_id for c, _ in decision.rejected) == list(range(len(kinds)))


def test_a_programming_error_propagates(cache: TuningCache) -> None:
    with pytest.raises(TypeError, match="a programming error"):
        search(cache, FakeExecutor("good", "broken"), fixed(a0=1.0))
    assert search(cache, FakeExecutor("good"), fixed(a0=1.0)).use == "sparse"


def test_nothing_is_timed_before_all_is_proven(cache: TuningCache) -> None:
    executor = FakeExecutor("good", "good")
    proofs = 2 * len(EXACT_TRIALS) * REPEATS

    def time(label: str, count: int) -> float:
        assert executor.calls["matmul"] > proofs
        return 1.0

    search(cache, executor, FakeTimer(time))


def test_the_fastest_with_its_pack_wins(cache: TuningCache) -> None:
    executor = FakeExecutor("good", "good", "good", "good", "good")
    timer = fixed(a0=50.0, a1=20.0, a2=40.0, a3=30.0, a4=60.0)
    decision = search(cache, executor, timer)
    assert decision.candidate == Candidate(1)
    assert (decision.sparse_us, decision.dense_us) == (20.0, 100.0)
    assert (decision.pack_us, decision.matmul_us, decision.speedup) == (5.0, 20.0, 5.0)
    assert not decision.rejected
    # Only the three fastest products race on, and the order of a round is shuffled.
    assert timer.labels.count("alg 4") < timer.labels.count("alg 1")
    first_of_rounds = {timer.labels[i] for i in range(0, 25, 5)}
    assert len(first_of_rounds) > 1


def test_the_race_includes_the_pack(cache: TuningCache) -> None:
    """The faster product loses where its pack is slower."""

    def time(label: str, count: int) -> float:
        screening = count <= 5
        times = {"alg 0": 10.0 if screening else 90.0, "alg 1": 20.0 if screening else 70.0}
        return times.get(label, 100.0)

    decision = search(cache, FakeExecutor("good", "good"), FakeTimer(time))
    assert decision.candidate == Candidate(1)
    assert (decision.matmul_us, decision.sparse_us) == (20.0, 70.0)


@pytest.mark.parametrize("sparse, use", [(97.9, "sparse"), (98.1, "dense"), (120.0, "dense")])
def test_a_tie_goes_to_dense(cache: TuningCache, sparse: float, use: str) -> None:
    decision = search(cache, FakeExecutor("good"), fixed(dense=100.0, a0=sparse))
    assert decision.use == use
    assert decision.candidate == Candidate(0), "a forced backend still needs it"
    assert f"{sparse:.1f} us, mm 100.0 us" in decision.reason


def test_the_median_ignores_a_stray_interrupt(cache: TuningCache) -> None:
    def time(label: str, count: int) -> float:
        return 1000.0 if count % 7 == 0 else {"dense": 100.0}.get(label, 50.0)

    decision = search(cache, FakeExecutor("good"), FakeTimer(time))
    assert (decision.sparse_us, decision.dense_us) == (50.0, 100.0)


@pytest.mark.parametrize("method", ["none", "magnitude", "rescaled_magnitude", "random", "mvue"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("order", ["row", "col"])
def test_every_method_and_direction_is_proven(
    cache: TuningCache, method: str, transpose: bool, order: str
) -> None:
    gemm = Gemm(17, 24, 48, torch.float16, order, CPU)  # type: ignore[arg-type]
    decision = search(
        cache, FakeExecutor("good"), fixed(a0=1.0), gemm=gemm, method=method, transpose=transpose
    )
    assert decision.use == "sparse" and not decision.rejected
    assert decision.key == (gemm, method, transpose, "mm")


def test_torchs_generators_are_left_alone(cache: TuningCache) -> None:
    before = torch.get_rng_state()
    search(cache, FakeExecutor("good"), fixed(a0=1.0), method="random")
    assert torch.equal(before, torch.get_rng_state())


def test_a_refused_or_empty_product_is_dense(cache: TuningCache) -> None:
    decision = search(cache, FakeExecutor("refuses"), fixed())
    assert decision.use == "dense" and "refuses this product" in decision.reason
    assert "NOT_SUPPORTED" in decision.reason
    assert "no algorithm" in search(cache, FakeExecutor(machine="other"), fixed()).reason
    empty = Gemm(0, 24, 48, torch.bfloat16, "row", CPU)
    assert search(cache, FakeExecutor("good"), fixed(), gemm=empty).reason == "the product is empty"


def test_no_memory_is_not_remembered(cache: TuningCache) -> None:
    decision = search(cache, FakeExecutor("no memory"), fixed())
    assert decision.use == "dense" and decision.transient
    assert search(cache, FakeExecutor("good"), fixed(a0=1.0)).use == "sparse"


def test_no_memory_for_the_operands(cache: TuningCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("sdgp_cusparselt.tuning.proof.dense_operand", full)
        decision = search(cache, FakeExecutor("good"), fixed(a0=1.0))
    assert decision.transient and "no memory to tune in" in decision.reason
    assert search(cache, FakeExecutor("good"), fixed(a0=1.0)).use == "sparse"


def test_another_rival_and_what_is_left_to_do(cache: TuningCache) -> None:
    done: list[torch.Size] = []
    rival = Rival(
        "conv 3x3",
        dense=lambda left, right: left.sum(),
        finish=lambda product: done.append(product.shape),
    )
    decision = search(cache, FakeExecutor("good"), fixed(a0=1.0), rival=rival)
    assert decision.rival == "conv 3x3" and "conv 3x3 100.0 us" in decision.reason
    assert set(done) == {torch.Size([32, 24])}
    executor = FakeExecutor("good")
    assert search(cache, executor, fixed(a0=1.0)).rival == "mm"
    assert executor.calls["candidates"] == 1, "each rival is a key of its own"


def test_a_decision_survives_json(cache: TuningCache) -> None:
    decision = search(cache, FakeExecutor("nan", "good", "no plan"), fixed(a1=1.0))
    again = Decision.from_dict(decision.as_dict(), CPU)
    assert again == decision and again.conditions == decision.conditions
    assert again.conditions["runs_proven"] == len(EXACT_TRIALS) * REPEATS


def test_progress_and_force(cache: TuningCache) -> None:
    steps: list[tuple[int, int, str]] = []
    executor = FakeExecutor("good")
    limits = Limits(progress=lambda *step: steps.append(step))
    first = search(cache, executor, fixed(a0=1.0), limits=limits)
    assert [s[0] for s in steps] == sorted(s[0] for s in steps) and steps[-1][0] < steps[-1][1]
    assert search(cache, executor, fixed(a0=2.0)) == first
    assert search(cache, executor, fixed(a0=2.0), force=True).sparse_us == 2.0
    assert search(cache, executor, fixed(a0=3.0)).sparse_us == 2.0


def test_the_host_timer_and_real_times(cache: TuningCache) -> None:
    decision = tune(GEMM, FakeExecutor("good"), cache=cache)
    assert decision.candidate == Candidate(0)
    assert decision.sparse_us is not None and decision.sparse_us > 0
    assert decision.conditions["timer"] == "perf_counter"
