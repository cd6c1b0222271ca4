"""tune: prove every candidate, time the proven, race the best with its pack against dense."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch
from pycusparselt.errors import CusparseLtError
from torch import Tensor

from sdgp_cusparselt.backends.gemm import Candidate, Gemm, SparseExecutor
from sdgp_cusparselt.errors import NotSupportedError
from sdgp_cusparselt.pruning.methods import prune
from sdgp_cusparselt.recording.spans import generators_kept
from sdgp_cusparselt.tuning.decision import (
    MATMUL,
    Decision,
    Key,
    Rival,
    dense_decision,
    describe_candidate,
)
from sdgp_cusparselt.tuning.proof import (
    EXACT_TRIALS,
    REPEATS,
    dense_operand,
    fault,
    packed_operand,
    trials,
)
from sdgp_cusparselt.tuning.store import TuningCache
from sdgp_cusparselt.tuning.timing import Timer, median, race, timer_for

Progress = Callable[[int, int, str], None]
Runs = dict[str, Callable[[], Callable[[], object]]]

#: The sparse path wins only if its median is at most this part of dense's: a tie, and what two
#: runs of the same code differ by, must go to dense.
MARGIN = 0.98
SCREENING_ROUNDS, FINAL_ROUNDS = 5, 20
#: How many of the fastest products race with their pack, which may differ where plans do.
FINALISTS = 3
#: What a library call may raise without being a programming error.
REFUSALS = (CusparseLtError, NotSupportedError, torch.OutOfMemoryError)


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
    progress: Progress | None = None,
    force: bool = False,
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
        progress: called with (done, total, what is being done).
        force: search also if the cache has a decision.

    Returns:
        Decision: dense with the reason where nothing sparse is right, fast enough, or allowed.

    Note:
        Waits for the device; not to be called while a CUDA graph is captured.
    """
    key = Key(gemm, method, transpose, rival.name)
    with cache.turn(executor, gemm.device) as held:
        known = None if force and held else cache.read(key, executor)
        if known is not None:
            return known
        if not held:
            reason = "another process or thread kept the tuner for too long; tried again next run"
            return dense_decision(key, reason, transient=True)
        search = _Search(key, executor, rival, seed, progress or _no_progress)
        decision = search.decide(timer or timer_for(gemm.device))
        cache.write(decision, executor)
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
    return _Search(key, executor, rival, seed, _no_progress).default()


@dataclass
class _Candidates:
    """Who is still in the race, and who is out and why."""

    standing: list[Candidate]
    rejected: list[tuple[Candidate, str]] = field(default_factory=list)
    out_of_memory: bool = False

    def reject(self, candidate: Candidate, reason: str | Exception) -> None:
        self.out_of_memory |= isinstance(reason, torch.OutOfMemoryError)
        self.standing.remove(candidate)
        text = f"raised {type(reason).__name__}: " if isinstance(reason, Exception) else ""
        self.rejected.append((candidate, f"{text}{str(reason).splitlines()[0]}"))


@dataclass(frozen=True)
class _Search:
    """The search for one product: the arguments that its steps share."""

    key: Key
    executor: SparseExecutor
    rival: Rival
    seed: int
    progress: Progress

    def decide(self, timer: Timer) -> Decision:
        """Prove, screen, race."""
        with torch.no_grad(), _device_of(self.key.gemm), generators_kept(self.key.gemm.device):
            offered = self._offered()
            if isinstance(offered, Decision):
                return offered
            try:
                self._prove(offered)
                if not offered.standing:
                    return self._nothing_right(offered)
                return self._race(offered, timer)
            except torch.OutOfMemoryError as error:
                return self._dense(offered, f"no memory to tune in: {_line(error)}", transient=True)

    def default(self) -> Decision:
        """Prove the first candidate only."""
        with torch.no_grad(), _device_of(self.key.gemm), generators_kept(self.key.gemm.device):
            offered = self._offered()
            if isinstance(offered, Decision):
                return offered
            del offered.standing[1:]
            try:
                self._prove(offered)
            except torch.OutOfMemoryError as error:
                return self._dense(offered, f"no memory to prove: {_line(error)}", transient=True)
            if not offered.standing:
                return self._nothing_right(offered)
            reason = "tune='never': the library's default algorithm, proven and not timed"
            return Decision(*self.key, "sparse", offered.standing[0], reason)

    def _offered(self) -> _Candidates | Decision:
        gemm = self.key.gemm
        if 0 in (gemm.m, gemm.n, gemm.k):
            return dense_decision(self.key, "the product is empty")
        try:
            offered = self.executor.candidates(gemm)
        except REFUSALS as error:
            transient = isinstance(error, torch.OutOfMemoryError)
            reason = f"the library refuses this product: {_line(error)}"
            return dense_decision(self.key, reason, transient=transient)
        if not offered:
            return dense_decision(self.key, "the library offers no algorithm for this product")
        return _Candidates(list(offered))

    def _prove(self, offered: _Candidates) -> None:
        """Take out every candidate that fails a trial; fresh data each."""
        gemm, method, transpose, _ = self.key
        made = trials(gemm, method=method, transpose=transpose, seed=self.seed)
        for number, trial in enumerate(made):
            for candidate in list(offered.standing):
                step = f"proof {number + 1}/{len(EXACT_TRIALS)} {describe_candidate(candidate)}"
                self.progress(number, len(EXACT_TRIALS) + 2, step)
                try:
                    reason: str | Exception = fault(
                        self.executor, gemm, candidate, trial, transpose=transpose
                    )
                except REFUSALS as error:
                    reason = error
                if reason:
                    offered.reject(candidate, reason)
            if not offered.standing:
                return

    def _race(self, offered: _Candidates, timer: Timer) -> Decision:
        """Screen the products, then race the best ones with their pack against the rival."""
        self.progress(len(EXACT_TRIALS), len(EXACT_TRIALS) + 2, "timing")
        gemm, _, transpose, _ = self.key
        generator = torch.Generator(gemm.device).manual_seed(self.seed + 1)
        x, dense = packed_operand(gemm, transpose, generator), dense_operand(gemm, generator)
        names = {describe_candidate(c): c for c in offered.standing}
        runs: Runs = {name: self._product(c, x, dense) for name, c in names.items()}
        screened = self._times(runs, timer, SCREENING_ROUNDS, names, offered)
        finalists = sorted(screened, key=lambda name: median(screened[name]))[:FINALISTS]
        self.progress(len(EXACT_TRIALS) + 1, len(EXACT_TRIALS) + 2, "race against dense")
        left = x.t() if transpose else x
        runs = {"dense": lambda: lambda: self.rival.dense(left, dense)}
        runs |= {name: self._whole(names[name], x, dense) for name in finalists}
        runs |= {f"pack for {name}": self._pack(names[name], x) for name in finalists}
        final = self._times(runs, timer, FINAL_ROUNDS, names, offered)
        finalists = [name for name in finalists if name in final and f"pack for {name}" in final]
        if not finalists:
            return self._nothing_right(offered)
        winner = min(finalists, key=lambda name: median(final[name]))
        return self._decision(names[winner], winner, screened, final, offered, timer)

    def _times(
        self,
        runs: Runs,
        timer: Timer,
        rounds: int,
        names: dict[str, Candidate],
        offered: _Candidates,
    ) -> dict[str, list[float]]:
        times, out = race(runs, timer, rounds=rounds, seed=self.seed, refusals=REFUSALS)
        if "dense" in out:
            raise out["dense"]
        for label, refusal in out.items():
            candidate = names[label.removeprefix("pack for ")]
            if candidate in offered.standing:
                offered.reject(candidate, refusal)
        return times

    def _decision(
        self,
        candidate: Candidate,
        name: str,
        screened: dict[str, list[float]],
        final: dict[str, list[float]],
        offered: _Candidates,
        timer: Timer,
    ) -> Decision:
        sparse_us, dense_us = median(final[name]), median(final["dense"])
        wins = sparse_us <= MARGIN * dense_us
        times = f"pack and {name} take {sparse_us:.1f} us, {self.rival.name} {dense_us:.1f} us"
        rule = f"at most {MARGIN} of dense" if wins else f"not at most {MARGIN} of dense"
        return Decision(
            *self.key,
            "sparse" if wins else "dense",
            candidate,
            f"{times}: {rule}",
            sparse_us,
            median(final[f"pack for {name}"]),
            median(screened[name]),
            dense_us,
            rejected=tuple(offered.rejected),
            conditions=self._conditions(timer, len(screened), final, name),
        )

    def _conditions(
        self, timer: Timer, timed: int, final: dict[str, list[float]], name: str
    ) -> dict[str, Any]:
        return {
            "timer": getattr(timer, "description", type(timer).__name__),
            "rounds": FINAL_ROUNDS,
            "candidates_timed": timed,
            "runs_proven": len(EXACT_TRIALS) * REPEATS,
            "sparse_us_range": [min(final[name]), max(final[name])],
            "dense_us_range": [min(final["dense"]), max(final["dense"])],
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def _pack_now(self, candidate: Candidate, x: Tensor) -> Tensor:
        gemm, method, transpose, _ = self.key
        if method == "none":
            # Whoever packs an operand as it is has pruned it just before, and that takes time too.
            x = prune(x, dim=0 if transpose else -1)
        return self.executor.pack(x, gemm, candidate, method=method, transpose=transpose)

    def _product(
        self, candidate: Candidate, x: Tensor, dense: Tensor
    ) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            packed = self._pack_now(candidate, x)
            return lambda: self.executor.matmul(packed, dense, self.key.gemm, candidate)

        return prepare

    def _whole(
        self, candidate: Candidate, x: Tensor, dense: Tensor
    ) -> Callable[[], Callable[[], object]]:
        def run() -> object:
            packed = self._pack_now(candidate, x)
            product = self.executor.matmul(packed, dense, self.key.gemm, candidate)
            return self.rival.finish(product)

        return lambda: run

    def _pack(self, candidate: Candidate, x: Tensor) -> Callable[[], Callable[[], object]]:
        return lambda: lambda: self._pack_now(candidate, x)

    def _nothing_right(self, offered: _Candidates) -> Decision:
        out = offered.rejected
        first = f"{describe_candidate(out[0][0])} {out[0][1]}"
        reason = f"none of {len(out)} algorithms is usable; {first}"
        return self._dense(offered, reason, transient=offered.out_of_memory)

    def _dense(self, offered: _Candidates, reason: str, *, transient: bool) -> Decision:
        rejected = tuple(offered.rejected)
        return dense_decision(self.key, reason, rejected=rejected, transient=transient)


def _no_progress(done: int, total: int, step: str) -> None:
    pass


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _device_of(gemm: Gemm) -> Any:
    """Make the product's device current: events and kernels go to the current one."""
    return torch.cuda.device(gemm.device if gemm.device.type == "cuda" else -1)
