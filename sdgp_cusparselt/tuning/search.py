"""tune: prove every candidate, time the proven, race the best with its pack against dense."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch

from sdgp_cusparselt.backends.gemm import Candidate, Gemm, SparseExecutor
from sdgp_cusparselt.recording.spans import generators_kept
from sdgp_cusparselt.tuning.contest import (
    REFUSALS,
    STEPS,
    Candidates,
    Contest,
    Deadline,
    Limits,
    first_line,
)
from sdgp_cusparselt.tuning.decision import (
    MATMUL,
    Decision,
    Key,
    Rival,
    dense_decision,
    describe_candidate,
)
from sdgp_cusparselt.tuning.memory import is_out_of_memory
from sdgp_cusparselt.tuning.proof import EXACT_TRIALS, fault, trials
from sdgp_cusparselt.tuning.store import TuningCache
from sdgp_cusparselt.tuning.timing import Timer, timer_for

#: A search without limits, of everything that can be tried in this process.
FULL = Limits()

Rejected = tuple[tuple[Candidate, str], ...]
Searcher = Callable[[Key, Limits], Decision]


def tune(
    gemm: Gemm,
    executor: SparseExecutor,
    *,
    cache: TuningCache,
    method: str = "magnitude",
    transpose: bool = False,
    rival: Rival = MATMUL,
    timer: Timer | None = None,
    seed: int = 0,
    limits: Limits = FULL,
    force: bool = False,
    timeout_s: float | None = None,
    searcher: Searcher | None = None,
) -> Decision:
    """Return which way a product runs: what the cache has, or what a search finds and stores.

    Args:
        gemm: the product.
        executor: what runs it sparsely.
        cache: where decisions are; one process at a time searches, the others wait and read.
        method: how the left operand is pruned while it is packed.
        transpose: whether the packed operand is the transpose of the tensor at hand.
        rival: what the sparse path has to beat; ``torch.mm`` of the unpruned operands if not given.
        timer: what times a call; CUDA events on a GPU if None.
        seed: of data and order; torch's own generators are left as they were.
        limits: what the search may cost. One without a limit searches again where the cache has
            what a limited one found.
        force: search also if the cache has a decision.
        timeout_s: seconds to wait for another one that tunes; the cache's own if None.
        searcher: what searches; ``search_here`` if None.

    Returns:
        Decision: dense with the reason where nothing sparse is right, fast enough, or allowed.

    Note:
        Waits for the device; not to be called while a CUDA graph is captured.
    """
    key = Key(gemm, method, transpose, rival.name)

    def stored() -> Decision | None:
        known = cache.read(key, executor)
        enough = known is not None and (not known.bounded or limits.candidates is not None)
        return known if enough else None

    def ready() -> bool:
        return not force and stored() is not None

    with cache.turn(executor, gemm.device, timeout_s=timeout_s, ready=ready) as held:
        known = None if force and held else stored()
        if known is not None:
            return known
        if not held:
            reason = "another process or thread kept the tuner for too long; tried again later"
            return dense_decision(key, reason, transient=True)
        if searcher is None:
            decision = search_here(key, executor, cache, rival, timer, limits, seed)
        else:
            decision = searcher(key, limits)
        cache.write(decision, executor)
    return decision


def search_here(
    key: Key,
    executor: SparseExecutor,
    cache: TuningCache,
    rival: Rival = MATMUL,
    timer: Timer | None = None,
    limits: Limits = FULL,
    seed: int = 0,
) -> Decision:
    """Search in this process, among what cannot hang; see ``tune``."""
    liked = Counter(d.candidate for d in cache.decisions(executor, key.gemm.device))
    decision = Search(key, executor, rival, seed, limits, liked=liked).decide(timer)
    if decision.candidate is not None:
        cache.prove(key.gemm, decision.candidate)
    return decision


def prove_default(
    gemm: Gemm,
    executor: SparseExecutor,
    *,
    method: str = "magnitude",
    transpose: bool = False,
    rival: Rival = MATMUL,
    seed: int = 0,
) -> Decision:
    """Return "sparse" with the library's default algorithm if it computes right; nothing is timed.

    Args:
        gemm, executor, method, transpose, rival, seed: as ``tune``.

    Returns:
        Decision: dense with the reason if the default algorithm is wrong or refused.
    """
    key = Key(gemm, method, transpose, rival.name)
    return Search(key, executor, rival, seed, replace(FULL, candidates=1)).default()


def plan_fault(key: Key, executor: SparseExecutor, candidate: Candidate, seed: int = 0) -> str:
    """Return what is wrong with a candidate at one size, from one product of integers, or "".

    Raises:
        torch.OutOfMemoryError: no memory for it.
        CusparseLtError: likewise, in the library.
    """
    gemm, method, transpose, _ = key
    with _undisturbed(gemm):
        trial = next(trials(gemm, method=method, transpose=transpose, seed=seed))
        try:
            return fault(executor, gemm, candidate, trial, transpose=transpose)
        except REFUSALS as error:
            if is_out_of_memory(error):
                raise
            return f"raised {type(error).__name__}: {first_line(error)}"


@dataclass(frozen=True)
class Search:
    """The search for one product: the arguments that its steps share.

    Attributes:
        key: the product.
        executor: what runs it sparsely.
        rival: what the sparse path has to beat.
        seed: of data and order.
        limits: what it may cost.
        liked: candidate -> how many other products it won; the winners are tried first.
        safe: try only what cannot hang or end the process.
        excluded: candidates that did so before, with what they did.
    """

    key: Key
    executor: SparseExecutor
    rival: Rival = MATMUL
    seed: int = 0
    limits: Limits = FULL
    liked: Counter[Candidate | None] = field(default_factory=Counter)
    safe: bool = True
    excluded: Rejected = ()

    def decide(self, timer: Timer | None = None) -> Decision:
        """Prove, screen, race. Want of memory, wherever it shows, is a decision that may pass."""
        offered = Candidates([])
        try:
            with _undisturbed(self.key.gemm):
                return self._decide(offered, timer)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return self._no_memory(offered, error)

    def default(self) -> Decision:
        """Prove the first candidate only."""
        offered = Candidates([])
        try:
            with _undisturbed(self.key.gemm):
                nothing = self._offer(offered)
                if nothing is not None:
                    return nothing
                self._prove(offered, Deadline(self.limits))
                if not offered.standing:
                    return self._nothing_right(offered)
                first = offered.standing[0]
                packer = self.executor.packer(self.key.gemm, first)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return self._no_memory(offered, error)
        reason = "tune='never': the library's default algorithm, proven and not timed"
        return Decision(*self.key, "sparse", first, reason, packer=packer)

    def _decide(self, offered: Candidates, timer: Timer | None) -> Decision:
        deadline = Deadline(self.limits)
        nothing = self._offer(offered)
        if nothing is not None:
            return nothing
        self._prove(offered, deadline)
        if not offered.standing:
            return self._nothing_right(offered)
        timer = timer_for(self.key.gemm.device) if timer is None else timer
        harmless = offered.standing
        if not self.safe:
            harmless = self.executor.candidates(self.key.gemm)
        contest = Contest(
            self.key,
            self.executor,
            self.rival,
            self.limits,
            deadline,
            timer,
            self.seed,
            frozenset(harmless),
        )
        return contest.decision(offered) or self._nothing_right(offered)

    def _offer(self, offered: Candidates) -> Decision | None:
        """Fill in what is tried, or return why nothing is."""
        gemm = self.key.gemm
        if 0 in (gemm.m, gemm.n, gemm.k):
            return dense_decision(self.key, "the product is empty")
        try:
            found = self.executor.candidates(gemm, safe=self.safe)
        except REFUSALS as error:
            if is_out_of_memory(error):
                raise
            reason = f"the library refuses this product: {first_line(error)}"
            return dense_decision(self.key, reason)
        if not found:
            return dense_decision(self.key, "the library offers no algorithm for this product")
        offered.rejected += [out for out in self.excluded if out[0] in found]
        out = {candidate for candidate, _ in offered.rejected}
        left = sorted((c for c in found if c not in out), key=lambda c: -self.liked[c])
        offered.standing += left[: self.limits.candidates]
        return None if offered.standing else self._nothing_right(offered)

    def _prove(self, offered: Candidates, deadline: Deadline) -> None:
        """Take out every candidate that fails a trial, with fresh data each, or for want of time.

        The first one standing is proven whatever the time is.
        """
        gemm, method, transpose, _ = self.key
        made = trials(gemm, method=method, transpose=transpose, seed=self.seed)
        for number, trial in enumerate(made):
            for candidate in list(offered.standing):
                if candidate != offered.standing[0] and deadline.passed:
                    offered.standing.remove(candidate)
                    continue
                step = f"proof {number + 1}/{len(EXACT_TRIALS)} {describe_candidate(candidate)}"
                self.limits.progress(number, STEPS, step)
                self.limits.trying(candidate)
                try:
                    reason: str | Exception = fault(
                        self.executor, gemm, candidate, trial, transpose=transpose
                    )
                except REFUSALS as error:
                    reason = error
                deadline.start()
                if reason:
                    offered.reject(candidate, reason)
            if not offered.standing:
                return

    def _nothing_right(self, offered: Candidates) -> Decision:
        out = offered.rejected
        first = f"{describe_candidate(out[0][0])} {out[0][1]}"
        reason = f"none of {len(out)} algorithms is usable; {first}"
        return self._dense(offered, reason, transient=offered.out_of_memory)

    def _no_memory(self, offered: Candidates, error: RuntimeError) -> Decision:
        reason = f"no memory to tune in: {first_line(error)}"
        return self._dense(offered, reason, transient=True)

    def _dense(self, offered: Candidates, reason: str, *, transient: bool) -> Decision:
        rejected = tuple(offered.rejected)
        decision = dense_decision(self.key, reason, rejected=rejected, transient=transient)
        return replace(decision, bounded=self.limits.candidates is not None)


@contextmanager
def _undisturbed(gemm: Gemm) -> Iterator[None]:
    """Run on the product's device, without autograd, and leave torch's generators as they were."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        # Events and kernels go to the current device.
        stack.enter_context(torch.cuda.device(gemm.device if gemm.device.type == "cuda" else -1))
        stack.enter_context(generators_kept(gemm.device))
        yield
