"""tune="auto": a stored decision after one proof, a brief search at first use, or plain."""

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.tuning import Decision, Rival, TuningCache, tune
from sdgp_cusparselt.tuning.buckets import bucket
from sdgp_cusparselt.tuning.policy import ELSEWHERE_MARGIN, FEW
from sdgp_cusparselt.tuning.search import Search
from tests.tuning.auto_cases import AUTO, LENGTHS, TOP_KEY, Clock, Slow, again, decide
from tests.tuning.fakes import CPU, GEMM, TOP, FakeExecutor, FakeTimer, fixed


def counted(cache: TuningCache, executor: FakeExecutor, transpose: bool) -> list[Decision]:
    """Run all lengths three times, as three epochs do."""
    products = [
        Gemm(16, 24, n // 16 * 16, torch.bfloat16, "row", CPU)
        if transpose
        else Gemm(n, 24, 16, torch.bfloat16, "row", CPU)
        for n in LENGTHS
    ]
    return [
        decide(cache, executor, gemm, transpose=transpose) for _ in range(3) for gemm in products
    ]


@pytest.mark.parametrize("transpose", [False, True], ids=["grad_input", "grad_weight"])
def test_64_token_counts_tune_once_a_bucket_and_prove_once_a_plan(
    cache: TuningCache, monkeypatch: pytest.MonkeyPatch, transpose: bool
) -> None:
    proofs: list[Gemm] = []
    real = sdgp.tuning.policy.plan_fault

    def proof(key, *args):
        proofs.append(key.gemm)
        return real(key, *args)

    monkeypatch.setattr(sdgp.tuning.policy, "plan_fault", proof)
    executor = FakeExecutor("good", "good")
    found = counted(cache, executor, transpose)
    assert {(d.use, d.candidate) for d in found} == {("sparse", Candidate(1))}
    rounded = [n // 16 * 16 for n in LENGTHS] if transpose else [-(-n // 16) * 16 for n in LENGTHS]
    buckets, plans = {bucket(n) for n in (rounded if transpose else LENGTHS)}, set(rounded)
    assert executor.calls["candidates"] == len(buckets) <= 12, "one search a bucket"
    # The search has proven the top of its bucket.
    assert len(proofs) == len(plans - buckets) >= 50, "one proof a plan"
    second, proofs[:] = FakeExecutor("good", "good"), []
    assert [d.use for d in counted(again(cache), second, transpose)] == ["sparse"] * 192
    assert second.calls["candidates"] == 0, "a second process tunes nothing"
    assert len(proofs) == len(plans), "and proves each plan once"


def test_a_wrong_plan_of_a_right_bucket_runs_plain(cache: TuningCache) -> None:
    class WrongAt48(FakeExecutor):
        def matmul(self, packed, dense, gemm, candidate):
            result = super().matmul(packed, dense, gemm, candidate)
            return result + 1 if gemm.m == 48 else result

    executor = WrongAt48("good")
    right = decide(cache, executor)
    wrong = decide(cache, executor, replace(GEMM, m=48))
    assert right.use == "sparse" and wrong.use == "dense"
    assert wrong.reason.startswith("alg 0 wrong: ") and not wrong.transient and not wrong.chosen
    forced = decide(cache, executor, replace(GEMM, m=48), config=AUTO.replace(backend="cusparselt"))
    assert forced.candidate is None, "not even by force"


def test_a_narrow_win_holds_only_where_it_was_measured(cache: TuningCache) -> None:
    """At the top of the bucket 95 of 100 us win; 48 tokens may lose that."""
    executor, close = FakeExecutor("good"), fixed(a0=95.0)
    elsewhere = decide(cache, executor, replace(GEMM, m=32), timer=close)
    assert elsewhere.use == "dense" and elsewhere.chosen and "too close" in elsewhere.reason
    assert decide(cache, executor, TOP).use == "sparse"
    clear = fixed(a0=100 * ELSEWHERE_MARGIN - 1)
    other = Gemm(32, 40, 48, torch.bfloat16, "row", CPU)
    assert decide(cache, executor, other, timer=clear).use == "sparse"


def test_what_may_hang_runs_only_where_it_was_tried(cache: TuningCache) -> None:
    """The fastest was tried in a process that could be spared; other sizes run the next best."""
    executor = FakeExecutor("good", "good", unsafe=("good", "good", "good"))
    timer = fixed(a0=60.0, a1=50.0, a2=30.0, a3=31.0, a4=32.0)
    spared = Search(TOP_KEY, executor, safe=False).decide(timer)
    assert (spared.candidate, spared.elsewhere) == (Candidate(2), Candidate(1))
    cache.write(spared, executor)
    here, elsewhere = decide(cache, executor, TOP), decide(cache, executor, GEMM)
    assert (here.use, here.candidate, here.sparse_us) == ("sparse", Candidate(2), 30.0)
    assert (elsewhere.use, elsewhere.candidate, elsewhere.sparse_us) == (
        "sparse",
        Candidate(1),
        50.0,
    )
    alone = Search(TOP_KEY, FakeExecutor("nan", unsafe=("good",)), safe=False).decide(fixed(a1=1.0))
    assert (alone.candidate, alone.elsewhere) == (Candidate(1), None)
    cache.write(alone, executor)
    none = decide(again(cache), executor, GEMM)
    assert (none.use, none.candidate) == ("dense", None) and "alg 1 may hang" in none.reason


def test_few_candidates_are_tried_the_winners_of_other_products_first(cache: TuningCache) -> None:
    kinds = ["good"] * (FEW + 4)
    executor = FakeExecutor(*kinds)
    timer = FakeTimer(lambda label, count: 1.0 if label in ("alg 8", "pack for alg 8") else 50.0)
    found = decide(cache, executor, timer=timer)
    assert found.bounded and {f"alg {i}" for i in range(FEW)} <= set(timer.labels)
    assert "alg 8" not in timer.labels
    best = tune(replace(TOP, n=40), executor, cache=cache, timer=timer)
    assert best.candidate == Candidate(8) and not best.bounded
    assert decide(cache, executor, replace(TOP, n=48), timer=timer).candidate == Candidate(8)


def test_a_full_search_replaces_what_a_brief_one_found(cache: TuningCache) -> None:
    executor = FakeExecutor("good", "good")
    assert decide(cache, executor, TOP).bounded
    assert not tune(TOP, executor, cache=cache, timer=fixed(a0=1.0, a1=2.0)).bounded
    calls = executor.calls["candidates"]
    tune(TOP, executor, cache=cache, timer=fixed(a0=1.0, a1=2.0))
    assert executor.calls["candidates"] == calls
    assert not decide(again(cache), executor).bounded


def test_time_up_leaves_who_is_proven(cache: TuningCache, clock: Clock) -> None:
    """The first candidate takes its trials whatever they take; the others are not begun."""
    executor = Slow(clock, 1.5, "good", "good", "good")
    found = decide(cache, executor, timer=fixed(a0=50.0, a1=1.0, a2=1.0))
    assert (found.use, found.candidate) == ("sparse", Candidate(0))
    assert found.conditions["candidates_timed"] == 1 and found.conditions["rounds"] == 5
    assert not found.rejected, "who was not tried is not wrong"


def test_what_the_first_run_compiles_is_not_charged_to_the_search(
    cache: TuningCache, clock: Clock
) -> None:
    class Compiles(FakeExecutor):
        def pack(self, *args, **kwargs):
            clock.now += 0.0 if self.calls["pack"] else 20.0
            return super().pack(*args, **kwargs)

    found = decide(cache, Compiles("good", "good", "good"), timer=fixed(a0=9.0, a1=9.0, a2=1.0))
    assert found.candidate == Candidate(2) and found.conditions["candidates_timed"] == 3
    assert cache.session.spent == 20.0, "but to the process"


def test_a_bad_first_candidate_does_not_use_up_the_search(cache: TuningCache, clock: Clock) -> None:
    found = decide(cache, Slow(clock, 3.0, "nan", "good"), timer=fixed(a1=1.0))
    assert found.candidate == Candidate(1)


def test_a_spent_budget_runs_plain_and_the_next_run_goes_on(
    cache: TuningCache, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    executor = Slow(clock, 3.5, "good")
    first = decide(cache, executor)
    assert first.use == "sparse" and cache.session.spent > 60
    other = replace(GEMM, n=40)
    calls = executor.calls.copy()
    late = decide(cache, executor, other)
    assert late.use == "dense" and late.transient and "60 s" in late.reason
    assert not late.chosen and "sdgp tune" in late.reason
    assert executor.calls == calls and decide(cache, executor, other) is late
    assert "What is left runs plain" in capsys.readouterr().err
    assert decide(again(cache), FakeExecutor("good"), other).use == "sparse", "tuned next time"


def test_the_librarys_compress_is_a_contender_of_its_own(cache: TuningCache) -> None:
    """Where our packing is not proven the library's is raced, and named; ours is not assumed."""

    def time(label: str, count: int) -> float:
        return {"alg 0": 130.0 if count > 5 else 20.0, "alg 1": 60.0, "dense": 100.0}.get(label, 9)

    both = decide(cache, FakeExecutor("no layout", "good"), TOP, timer=FakeTimer(time))
    assert (both.candidate, both.packer) == (Candidate(1), "ours")
    alone = decide(cache, FakeExecutor("no layout"), replace(TOP, n=40), timer=FakeTimer(time))
    assert (alone.use, alone.packer) == ("dense", "library")
    assert alone.reason.startswith("the library's Compress and alg 0 take 130.0 us")


def test_what_was_measured_with_our_packer_is_not_run_with_the_librarys(
    cache: TuningCache,
) -> None:
    assert decide(cache, FakeExecutor("good"), TOP).packer == "ours"
    unproven = decide(again(cache), FakeExecutor("no layout"), TOP)
    assert unproven.use == "dense" and "our packer, which is not proven here" in unproven.reason
    other = replace(TOP, n=40)
    fast = fixed(a0=10.0)
    assert decide(cache, FakeExecutor("no layout"), other, timer=fast).packer == "library"
    assert decide(again(cache), FakeExecutor("no layout"), other).use == "sparse", "it won so"


class Rival3x3:
    rival = Rival("conv 3x3", dense=lambda left, right: left.sum())


@pytest.mark.parametrize(
    "machine, gemm, rival, words",
    [
        ("NVIDIA A100-SXM4-80GB", GEMM, None, "cannot win on A100"),
        ("a GPU", GEMM, Rival3x3.rival, "k x k convolution"),
    ],
)
def test_what_cannot_win_is_plain_at_once_unless_it_is_forced_or_was_measured(
    cache: TuningCache, machine: str, gemm: Gemm, rival: Rival | None, words: str
) -> None:
    executor = FakeExecutor("good", machine=machine)
    decision = decide(cache, executor, gemm, rival=rival)
    assert decision.use == "dense" and words in decision.reason
    assert decision.chosen and decision.predicted and not decision.transient and not executor.calls
    assert not cache.file(executor, CPU).path.exists(), "a prediction is no measurement"
    forced = decide(cache, executor, gemm, rival=rival, config=AUTO.replace(backend="cusparselt"))
    assert forced.candidate == Candidate(0)
    assert decide(again(cache), executor, gemm, rival=rival).use == "sparse", "it was measured"


def test_one_message_for_all_that_a_backward_pass_tuned(
    cache: TuningCache, capsys: pytest.CaptureFixture[str]
) -> None:
    executor = FakeExecutor("good")

    class Tunes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            for n, us in ((24, 40.0), (40, 40.0), (48, 400.0)):
                decide(cache, executor, replace(TOP, n=n), timer=ticking(cache, fixed(a0=us)))
            assert "tuned" not in capsys.readouterr().err.replace("are tuned as", "")
            return grad

    Tunes.apply(torch.ones(1, requires_grad=True)).backward()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "tuned 3 products" in said and "2 sparse, 1 plain" in said
    assert str(cache.folder) in said and "the next run saves these" in said

    class Fails(Tunes):
        @staticmethod
        def backward(ctx, grad):
            decide(cache, executor, replace(TOP, n=56), timer=ticking(cache, fixed(a0=40.0)))
            raise ValueError

    with pytest.raises(ValueError):
        Fails.apply(torch.ones(1, requires_grad=True)).backward()
    decide(cache, executor, replace(TOP, n=64), timer=ticking(cache, fixed(a0=40.0)))
    assert "tuned 2 products" in capsys.readouterr().err, "what a failed pass tuned is not lost"
    decide(cache, executor, replace(TOP, n=24))
    decide(again(cache), executor, replace(TOP, n=24))
    assert capsys.readouterr().err == "", "what is read is not announced"


def ticking(cache: TuningCache, timer: FakeTimer) -> FakeTimer:
    """Let a millisecond pass with every call that is timed."""
    clock = cache.session.clock

    def time(label: str, count: int) -> float:
        clock.now += 1e-3
        return timer.times(label, count)

    return FakeTimer(time)


def test_a_decision_is_stored_with_its_packer_and_how_it_was_found(cache: TuningCache) -> None:
    executor = FakeExecutor("good")
    found = decide(cache, executor, TOP)
    document = json.loads(cache.file(executor, CPU).path.read_text())
    (entry,) = document["entries"].values()
    assert (entry["m"], entry["packer"], entry["bounded"]) == (64, "ours", True)
    again_ = Decision.from_dict(entry, CPU)
    assert again_ == found and again_.valid_s == math.inf


def test_an_empty_product_is_plain_and_no_small_one(cache: TuningCache) -> None:
    executor = FakeExecutor("good")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decision = decide(cache, executor, replace(GEMM, m=0))
    assert decision.use == "dense" and decision.reason == "the product is empty"
