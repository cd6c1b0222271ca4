"""What the tests of tune="auto" share: a clock of their own, a decision, another process."""

from torch import Tensor

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.tuning import Decision, Rival, TuningCache, decision_for
from sdgp_cusparselt.tuning.decision import Key
from sdgp_cusparselt.tuning.session import Session
from tests.tuning.fakes import GEMM, TOP, FakeExecutor, FakeTimer, fixed

TOP_KEY = Key(TOP, "magnitude", False, "mm")
AUTO = sdgp.SDGPConfig(prune="magnitude")
#: 64 token counts, as batches of sentences have them: at most 12 buckets, more than 50 plans.
LENGTHS = [20 + 47 * (29 * i % 64) for i in range(64)]


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(FakeExecutor):
    """Every pack takes a while on the clock."""

    def __init__(self, clock: Clock, seconds: float, *kinds: str) -> None:
        super().__init__(*kinds)
        self.clock, self.seconds = clock, seconds

    def pack(self, x: Tensor, gemm: Gemm, candidate: Candidate, **kwargs: object) -> Tensor:
        self.clock.now += self.seconds
        return super().pack(x, gemm, candidate, **kwargs)


def decide(
    cache: TuningCache,
    executor: FakeExecutor,
    gemm: Gemm = GEMM,
    *,
    config: sdgp.SDGPConfig = AUTO,
    transpose: bool = False,
    capturing: bool = False,
    timer: FakeTimer | None = None,
    rival: Rival | None = None,
) -> Decision:
    return decision_for(
        gemm,
        executor,
        config,
        method="magnitude",
        transpose=transpose,
        capturing=capturing,
        cache=cache,
        timer=timer or fixed(a0=40.0, a1=30.0, a2=35.0),
        **({} if rival is None else {"rival": rival}),
    )


def again(cache: TuningCache) -> TuningCache:
    """Return the cache as another process sees it."""
    return TuningCache(cache.folder, session=Session(clock=cache.session.clock))
