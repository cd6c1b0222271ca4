"""One way of doing one part of the work, and how it is checked, timed and written down."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pycusparselt import CusparseLtError

from bench.operands import UnavailableError
from bench.shapes import Case, Convolution
from bench.timing import Run, in_turns
from bench.verify import Check, WrongResultError
from sdgp_cusparselt.errors import NotSupportedError

#: What a rival may raise without being a bug of this benchmark: it goes into the result file.
REFUSALS = (
    CusparseLtError,
    NotImplementedError,
    NotSupportedError,
    RuntimeError,
    TypeError,
    ValueError,
    WrongResultError,
)
#: Wall time: rounds, microseconds a round lasts at least, calls a round has at most.
WALL_ROUNDS, ROUND_US, MOST_CALLS = 5, 2000.0, 50
CPU_WALL_ROUNDS = 3


@dataclass
class Work:
    """What a contender is about to do, ready to be checked and timed.

    Attributes:
        run: the call that is timed.
        check: looks at the result of one such call; raises WrongResultError.
        reference: what it is compared with, timed in turns with ``run``.
        reference_name: names that.
        flops: multiply-adds counted as two operations, of the dense product.
        nbytes: read and written at least.
        info: more to write down.
        after: called once the times are there, for what is known only then.
    """

    run: Run
    check: Callable[[Any], Check]
    reference: Run
    reference_name: str
    flops: int = 0
    nbytes: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    after: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Contender:
    """One way of doing one part.

    Attributes:
        part: such as dense_gemm, sparse_gemm, pack, grad_input.
        name: who does it.
        prepare: case -> Work; UnavailableError says why not.
        rival: not this project's own code, and no part of what ``sdgp plan`` reads.
        sizes: case -> (M, N, K).
    """

    part: str
    name: str
    prepare: Callable[[Any], Work]
    sizes: Callable[[Any], tuple[int, int, int]]
    rival: bool = False

    @property
    def label(self) -> str:
        """Name for tests."""
        return f"{self.part}-{self.name}".replace(" ", "_")


def measure(request: pytest.FixtureRequest, case: Case | Convolution, contender: Contender) -> None:
    """Check a contender, then time it; or write down why it did not run, and skip."""
    limit = request.config.getoption("--bench-time-limit")
    if limit and time.monotonic() - request.config.stash[STARTED] > limit:
        not_run(request, case, contender, f"the time limit of {limit:g} s was reached")
    try:
        work = contender.prepare(case)
        check = work.check(work.run())
    except UnavailableError as reason:
        not_run(request, case, contender, str(reason))
    except REFUSALS as fault:
        if not contender.rival:
            raise
        not_run(request, case, contender, f"{type(fault).__name__}: {fault}")
    times = in_turns([work.run, work.reference], case.device)
    ours, theirs = (statistics.median(rounds) for rounds in times)
    write(request, case, contender, work, check, ours, theirs, times)


def write(
    request: pytest.FixtureRequest,
    case: Case | Convolution,
    contender: Contender,
    work: Work,
    check: Check,
    us: float,
    reference_us: float,
    times: list[list[float]],
) -> None:
    """Measure wall time through pytest-benchmark and fill ``extra_info``."""
    benchmark = request.getfixturevalue("benchmark")
    benchmark.group = f"{contender.part} {case.label}"
    m, n, k = contender.sizes(case)
    cuda = case.device_type == "cuda"
    benchmark.extra_info.update(
        part=contender.part,
        contender=contender.name,
        rival=contender.rival,
        measured_on="gpu" if cuda else "cpu, the library emulated",
        model=case.model,
        layer=case.layer,
        case=case.label,
        M=m,
        N=n,
        K=k,
        dtype=str(case.dtype).removeprefix("torch."),
        flops=work.flops,
        bytes=work.nbytes,
        us=us,
        reference=work.reference_name,
        reference_us=reference_us,
        rounds=len(times[0]),
        us_range=[min(times[0]), max(times[0])],
        reference_us_range=[min(times[1]), max(times[1])],
        max_error=check.max_error,
        error_of_bound=check.of_bound,
        checked_against=check.against,
    )
    benchmark.extra_info |= work.info | work.after()
    if cuda:
        benchmark.extra_info["device_us"] = us
        calls = min(MOST_CALLS, max(1, int(ROUND_US / us)))
        benchmark.pedantic(work.run, rounds=WALL_ROUNDS, iterations=calls, warmup_rounds=1)
    else:
        benchmark.pedantic(work.run, rounds=CPU_WALL_ROUNDS)


def not_run(
    request: pytest.FixtureRequest, case: Case | Convolution, contender: Contender, reason: str
) -> None:
    """Write down why a contender has no time, and skip the test with that reason."""
    reason = " ".join(reason.split())[:400]
    request.config.stash[NOT_RUN].append(
        {"part": contender.part, "contender": contender.name, "case": case.label, "reason": reason}
    )
    if case.device_type == "cuda":
        torch.cuda.empty_cache()
    pytest.skip(reason)


#: Where the run keeps them until the result file is written.
NOT_RUN: pytest.StashKey[list[dict[str, str]]] = pytest.StashKey()
STARTED: pytest.StashKey[float] = pytest.StashKey()


def parameters(cases: list[Any], contenders: Callable[[Any], list[Contender]]) -> list[Any]:
    """Return (case, contender) pairs, those of one case side by side."""
    return [(case, contender) for case in cases for contender in contenders(case)]
