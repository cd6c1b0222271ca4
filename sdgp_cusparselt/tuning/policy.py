"""decision_for: what ``SDGPConfig.tune`` says about a product that is about to run."""

from dataclasses import dataclass, replace

from sdgp_cusparselt.backends.gemm import Candidate, Gemm, SparseExecutor
from sdgp_cusparselt.backends.plans import planned_as
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.tuning import memory
from sdgp_cusparselt.tuning.contest import REFUSALS, Limits, first_line
from sdgp_cusparselt.tuning.decision import (
    MATMUL,
    Decision,
    Key,
    Rival,
    dense_decision,
    describe_candidate,
)
from sdgp_cusparselt.tuning.filter import cannot_win
from sdgp_cusparselt.tuning.search import (
    FULL,
    Searcher,
    plan_fault,
    prove_default,
    search_here,
    tune,
)
from sdgp_cusparselt.tuning.store import TuningCache, default_cache
from sdgp_cusparselt.tuning.timing import Timer

UNDER_CAPTURE = "untuned under graph capture: run one step before capturing"
NOT_TUNED_YET = "not tuned yet: run sdgp tune"
#: Candidates that a search at first use tries.
FEW = 5
#: The sparse path's time over dense's, up to which a decision holds for sizes of its bucket that
#: were not measured: 8 % are left for what a smaller size loses in launches and half-full waves.
ELSEWHERE_MARGIN = 0.9
#: Seconds that a rank waits for another one that tunes at first use. It may hold what the other
#: one's collectives wait for, so it must not be long.
PATIENCE_S = 15.0
#: Seconds after which what may have passed (want of memory, another one's search) is tried again.
AGAIN_S = 30.0


def decision_for(
    gemm: Gemm,
    executor: SparseExecutor,
    config: SDGPConfig,
    *,
    method: str,
    transpose: bool,
    capturing: bool,
    rival: Rival = MATMUL,
    cache: TuningCache | None = None,
    timer: Timer | None = None,
) -> Decision:
    """Return which way a product runs now; after the first call a dictionary look-up.

    Args:
        gemm: the product.
        executor: what runs it sparsely.
        config: its ``tune`` policy: "auto" reads what is stored and else searches briefly where
            that can pay, "first_use" searches all that can be tried here, "ahead" only reads what
            is stored, "never" proves the library's default algorithm once.
        method: how the left operand is pruned while it is packed.
        transpose: whether the packed operand is the transpose of the tensor at hand.
        capturing: whether a CUDA graph is being captured; then nothing may be tried out.
        rival: what the sparse path has to beat.
        cache: where decisions are; this process's own if None.
        timer: see ``tune``.

    Returns:
        Decision: "sparse" only with a candidate that has computed right at this very size in this
        process. Want of memory, of time, of a lock or of a disk is a transient "dense" with its
        reason.
    """
    cache = default_cache() if cache is None else cache
    key = Key(gemm, method, transpose, rival.name)
    asked = config.tune, config.backend, key
    known = cache.recall(asked)
    if known is None:
        case = _Case(key, executor, config, rival, cache, capturing, timer)
        known = cache.remember(asked, case.decide())
    return known


@dataclass(frozen=True)
class _Case:
    """A product that nothing is known of yet: the arguments that the steps share."""

    key: Key
    executor: SparseExecutor
    config: SDGPConfig
    rival: Rival
    cache: TuningCache
    capturing: bool
    timer: Timer | None

    def decide(self) -> Decision:
        if self.config.tune == "never":
            return self._default()
        stored = self.cache.read(self.key.measured, self.executor)
        if stored is not None:
            return self._here(stored)
        if self.config.tune == "ahead":
            return dense_decision(self.key, NOT_TUNED_YET, transient=True)
        if self.capturing:
            return self._passing(UNDER_CAPTURE, valid_s=0.0)
        found = self._tuned(FULL) if self.config.tune == "first_use" else self._few_tried()
        return self._here(found)

    @property
    def _forced(self) -> bool:
        """Whether the user wants the sparse path also where it is slower."""
        return self.config.backend != "auto"

    def _default(self) -> Decision:
        if self.capturing:
            return self._passing(UNDER_CAPTURE, valid_s=0.0)
        gemm, method, transpose, _ = self.key
        found = prove_default(
            gemm, self.executor, method=method, transpose=transpose, rival=self.rival
        )
        if found.candidate is not None:
            self.cache.prove(gemm, found.candidate)
        return found

    def _few_tried(self) -> Decision:
        """Search briefly, unless that is no use or not the time for it."""
        gemm, session = self.key.measured.gemm, self.cache.session
        card = self.executor.machine_key(gemm.device)["device"]
        reason = "" if self._forced else cannot_win(self.key.gemm, card, self.rival.name)
        if reason:
            return replace(dense_decision(self.key, reason), predicted=True)
        if session.spent_up:
            return dense_decision(self.key, session.spent_up, transient=True)
        short = memory.shortage(gemm)
        if short:
            return self._passing(short)
        before = session.spent
        found = self._tuned(Limits(FEW, session.shape_seconds, session.clock), self._briefly)
        if found.transient:
            return replace(found, valid_s=AGAIN_S)
        if session.spent > before:
            stored = str(self.cache.folder) if self.cache.writable else ""
            session.add(found, session.spent - before, stored)
        return found

    def _briefly(self, key: Key, limits: Limits) -> Decision:
        with self.cache.session.searching(key) as show:
            limits = replace(limits, progress=show)
            return search_here(key, self.executor, self.cache, self.rival, self.timer, limits)

    def _tuned(self, limits: Limits, searcher: Searcher | None = None) -> Decision:
        gemm, method, transpose, _ = self.key.measured
        return tune(
            gemm,
            self.executor,
            cache=self.cache,
            method=method,
            transpose=transpose,
            rival=self.rival,
            timer=self.timer,
            limits=limits,
            timeout_s=None if searcher is None else PATIENCE_S,
            searcher=searcher,
        )

    def _here(self, decision: Decision) -> Decision:
        """Return what a decision means for the product at hand, another one of its bucket."""
        if planned_as(self.key.gemm) != planned_as(decision.gemm):
            decision = self._elsewhere(decision)
        candidate = decision.candidate
        if candidate is None or not (self._forced or decision.use == "sparse"):
            return decision
        gemm = self.key.gemm
        if not self.cache.is_proven(gemm, candidate):
            fault = self._unproven(candidate)
            if fault is not None:
                return fault
            self.cache.prove(gemm, candidate)
        return decision if self._forced else self._same_packer(decision, candidate)

    def _elsewhere(self, decision: Decision) -> Decision:
        """Return what a decision says of a size that was not measured itself."""
        here = replace(decision, candidate=decision.elsewhere)
        if decision.use == "dense" or decision.candidate is None:
            return here
        us, dense_us = decision.elsewhere_us, decision.dense_us
        if us is None or dense_us is None:
            name = describe_candidate(decision.candidate)
            where = decision.gemm.describe()
            return dense_decision(self.key, f"{name} may hang, and was tried only at {where}")
        if us > ELSEWHERE_MARGIN * dense_us:
            reason = f"{decision.reason}, too close for a size that was not measured"
            return replace(here, use="dense", reason=reason)
        return replace(here, sparse_us=us)

    def _unproven(self, candidate: Candidate) -> Decision | None:
        """Prove a candidate at the size at hand; return the decision that it fails into."""
        if self.capturing:
            return self._passing(UNDER_CAPTURE, valid_s=0.0)
        short = memory.shortage(self.key.gemm)
        if short:
            return self._passing(short)
        try:
            fault = plan_fault(self.key, self.executor, candidate)
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            return self._passing(f"no memory to prove in: {first_line(error)}")
        if not fault:
            return None
        return dense_decision(self.key, f"{describe_candidate(candidate)} {fault}")

    def _same_packer(self, decision: Decision, candidate: Candidate) -> Decision:
        """Return the decision if what packs now is what raced then."""
        try:
            packer = self.executor.packer(self.key.gemm, candidate)
        except REFUSALS as error:
            return self._passing(f"{describe_candidate(candidate)}: {first_line(error)}")
        if packer == decision.packer or packer == "ours":
            return decision
        reason = "it was measured with our packer, which is not proven here"
        return dense_decision(self.key, reason)

    def _passing(self, reason: str, valid_s: float = AGAIN_S) -> Decision:
        return dense_decision(self.key, reason, transient=True, valid_s=valid_s)
