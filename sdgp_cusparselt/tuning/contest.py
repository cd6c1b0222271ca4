"""The contest of what is proven: products screened, the best with their pack against the rival."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import torch
from pycusparselt.errors import CusparseLtError
from torch import Tensor

from sdgp_cusparselt.backends.gemm import Candidate, SparseExecutor
from sdgp_cusparselt.errors import NotSupportedError
from sdgp_cusparselt.pruning.methods import prune
from sdgp_cusparselt.tuning.decision import Decision, Key, Rival, describe_candidate
from sdgp_cusparselt.tuning.memory import is_out_of_memory
from sdgp_cusparselt.tuning.proof import EXACT_TRIALS, REPEATS, dense_operand, packed_operand
from sdgp_cusparselt.tuning.timing import Timer, median, race

Progress = Callable[[int, int, str], None]
Runs = dict[str, Callable[[], Callable[[], object]]]

#: The sparse path wins only if its median is at most this part of dense's: a tie, and what two
#: runs of the same code differ by, must go to dense.
MARGIN = 0.98
SCREENING_ROUNDS, FINAL_ROUNDS = 5, 20
#: Rounds that are run even if the time of the search is over: a median needs some.
LEAST_ROUNDS = 5
#: How many of the fastest products race with their pack, which may differ where plans do.
FINALISTS = 3
#: What a library call may raise without being a programming error.
REFUSALS = (CusparseLtError, NotSupportedError, torch.OutOfMemoryError)
#: What the progress of a search counts: the trials, screening and race.
STEPS = len(EXACT_TRIALS) + 2


@dataclass
class Candidates:
    """Who is still in the contest, and who is out and why."""

    standing: list[Candidate]
    rejected: list[tuple[Candidate, str]] = field(default_factory=list)
    out_of_memory: bool = False

    def reject(self, candidate: Candidate, reason: str | Exception) -> None:
        """Take one out for a reason that is kept."""
        self.out_of_memory |= isinstance(reason, Exception) and is_out_of_memory(reason)
        self.standing.remove(candidate)
        text = f"raised {type(reason).__name__}: " if isinstance(reason, Exception) else ""
        self.rejected.append((candidate, f"{text}{first_line(reason)}"))


@dataclass(frozen=True)
class Limits:
    """What a search may cost, and what it tells of itself.

    Attributes:
        candidates: how many of those offered are tried; all if None.
        seconds: after which no further candidate is proven and no further round is run; see
            ``Deadline``. What has begun is finished, and one candidate is proven and timed in any
            case.
        clock: monotonic seconds.
        progress: called with (done, total, what is being done).
        trying: called before a candidate, or with None before the rival, is proven or timed;
            outside of what is timed.
    """

    candidates: int | None = None
    seconds: float = math.inf
    clock: Callable[[], float] = time.monotonic
    progress: Progress = lambda done, total, step: None
    trying: Callable[[Candidate | None], None] = lambda candidate: None


class Deadline:
    """When the time of a search is over.

    It runs from the end of the first candidate's first run, which compiles kernels, learns an
    order and loads what it needs: work that the search's first product would pay for all others.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits, self._at = limits, math.inf

    def start(self) -> None:
        """Let the time run, if it does not yet."""
        if self._at == math.inf:
            self._at = self._limits.clock() + self._limits.seconds

    @property
    def passed(self) -> bool:
        """Whether the time is over."""
        return self._limits.clock() >= self._at


@dataclass(frozen=True)
class Contest:
    """The contest for one product: the arguments that its steps share.

    Attributes:
        key: the product.
        executor: what runs it sparsely.
        rival: what the sparse path has to beat.
        limits: what it may cost.
        deadline: of the search.
        timer: what times a call.
        seed: of data and order.
        harmless: candidates that cannot hang; one of them runs at sizes that are not measured.
    """

    key: Key
    executor: SparseExecutor
    rival: Rival
    limits: Limits
    deadline: Deadline
    timer: Timer
    seed: int
    harmless: frozenset[Candidate]

    def decision(self, offered: Candidates) -> Decision | None:
        """Screen the products, then race the best ones with their pack against the rival.

        Args:
            offered: who is proven; who refuses now is taken out.

        Returns:
            Decision: None where every finalist is out.
        """
        self.limits.progress(STEPS - 2, STEPS, "timing")
        gemm, _, transpose, _ = self.key
        generator = torch.Generator(gemm.device).manual_seed(self.seed + 1)
        x, dense = packed_operand(gemm, transpose, generator), dense_operand(gemm, generator)
        names = {describe_candidate(c): c for c in offered.standing}
        runs: Runs = {name: self._product(c, x, dense) for name, c in names.items()}
        screened = self._times(runs, SCREENING_ROUNDS, names, offered)
        fastest = sorted(screened, key=lambda name: median(screened[name]))
        harmless = [name for name in fastest if names[name] in self.harmless]
        finalists = list(dict.fromkeys(fastest[:FINALISTS] + harmless[:1]))
        self.limits.progress(STEPS - 1, STEPS, "race against dense")
        runs = {"dense": self._dense(x.t() if transpose else x, dense)}
        runs |= {name: self._whole(names[name], x, dense) for name in finalists}
        runs |= {f"pack for {name}": self._pack(names[name], x) for name in finalists}
        final = self._times(runs, FINAL_ROUNDS, names, offered)
        finalists = [name for name in finalists if name in final and f"pack for {name}" in final]
        if not finalists:
            return None
        finalists.sort(key=lambda name: median(final[name]))
        decision = self._outcome(names[finalists[0]], finalists[0], screened, final, offered)
        for name in finalists:
            if names[name] in self.harmless:
                return replace(decision, elsewhere=names[name], elsewhere_us=median(final[name]))
        return decision

    def _times(
        self, runs: Runs, rounds: int, names: dict[str, Candidate], offered: Candidates
    ) -> dict[str, list[float]]:
        counted = self._rounds(rounds)
        times, out = race(runs, self.timer, rounds=counted, seed=self.seed, refusals=REFUSALS)
        if "dense" in out:
            raise out["dense"]
        for label, refusal in out.items():
            candidate = names[label.removeprefix("pack for ")]
            if candidate in offered.standing:
                offered.reject(candidate, refusal)
        return times

    def _rounds(self, most: int) -> Iterator[int]:
        for number in range(most):
            if number >= LEAST_ROUNDS and self.deadline.passed:
                return
            yield number

    def _outcome(
        self,
        candidate: Candidate,
        name: str,
        screened: dict[str, list[float]],
        final: dict[str, list[float]],
        offered: Candidates,
    ) -> Decision:
        sparse_us, dense_us = median(final[name]), median(final["dense"])
        wins = sparse_us <= MARGIN * dense_us
        packer = self.executor.packer(self.key.gemm, candidate)
        pack = "pack" if packer == "ours" else "the library's Compress"
        times = f"{pack} and {name} take {sparse_us:.1f} us, {self.rival.name} {dense_us:.1f} us"
        if self.key.gemm.packed_ahead:
            times = f"{name} takes {sparse_us:.1f} us, {self.rival.name} {dense_us:.1f} us"
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
            packer=packer,
            bounded=self.limits.candidates is not None,
            conditions=self._conditions(len(screened), final, name),
        )

    def _conditions(self, timed: int, final: dict[str, list[float]], name: str) -> dict[str, Any]:
        return {
            "timer": getattr(self.timer, "description", type(self.timer).__name__),
            "rounds": len(final["dense"]),
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

    def _dense(self, left: Tensor, dense: Tensor) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            self.limits.trying(None)
            return lambda: self.rival.dense(left, dense)

        return prepare

    def _product(
        self, candidate: Candidate, x: Tensor, dense: Tensor
    ) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            self.limits.trying(candidate)
            packed = self._pack_now(candidate, x)
            return lambda: self.executor.matmul(packed, dense, self.key.gemm, candidate)

        return prepare

    def _whole(
        self, candidate: Candidate, x: Tensor, dense: Tensor
    ) -> Callable[[], Callable[[], object]]:
        if self.key.gemm.packed_ahead:
            return self._product(candidate, x, dense)

        def run() -> object:
            self.rival.before(x)
            packed = self._pack_now(candidate, x)
            product = self.executor.matmul(packed, dense, self.key.gemm, candidate)
            return self.rival.finish(product)

        def prepare() -> Callable[[], object]:
            self.limits.trying(candidate)
            return run

        return prepare

    def _pack(self, candidate: Candidate, x: Tensor) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            self.limits.trying(candidate)
            return lambda: self._pack_now(candidate, x)

        return prepare


def first_line(about: str | BaseException) -> str:
    """Return the first line of a text or of an error, or what kind of error it is."""
    text = str(about)
    return text.splitlines()[0] if text else type(about).__name__
