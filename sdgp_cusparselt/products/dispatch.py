"""Which way a product runs, why not another, and who was told."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from sdgp_cusparselt.backends.base import Backend, Problem
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.dense import DenseBackend, pruned_gradient
from sdgp_cusparselt.backends.gemm import Candidate
from sdgp_cusparselt.backends.plans import is_capturing
from sdgp_cusparselt.errors import EquivalenceError, NotSupportedError, SDGPFallbackWarning
from sdgp_cusparselt.products.checks import fault
from sdgp_cusparselt.recording.records import LayerRecord
from sdgp_cusparselt.recording.spans import sample_gradient, sampling, span
from sdgp_cusparselt.tuning import Decision, Rival, decision_for, note

#: In order of preference; the last one runs everything.
BACKENDS: list[Backend] = [CusparseLtBackend(), DenseBackend()]
#: Name under which a gradient that was left unpruned, because that is faster, is counted.
UNPRUNED = "unpruned"
#: Routes that a record keeps; a run with ever new shapes starts over instead of growing.
MAX_ROUTES = 1024

_machine_announced: set[str] = set()


class BackendStatus(NamedTuple):
    """One line of ``backend_status()``."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Ways:
    """Every way of computing one product; nothing runs before it is called.

    Attributes:
        pruned: (backend, candidate) -> the product of the pruned gradient.
        unpruned: () -> the plain dense product.
        operands: () -> (left, right), the matrices that the sparse product multiplies.
        rival: () -> what the sparse path has to beat.
        grad_output: the gradient as it came.
    """

    pruned: Callable[[Backend, Candidate | None], Tensor]
    unpruned: Callable[[], Tensor]
    operands: Callable[[], tuple[Tensor, Tensor]]
    rival: Callable[[], Rival]
    grad_output: Tensor


class Route(NamedTuple):
    """The way that is taken, and each preferred backend's reasons for not being it."""

    backend: Backend | None
    candidate: Candidate | None
    rejected: dict[str, list[str]]

    @property
    def name(self) -> str:
        """Name of the way in counts and tables."""
        return UNPRUNED if self.backend is None else self.backend.name


def backend_status() -> list[BackendStatus]:
    """Return, for every backend in order of preference, whether this machine can run it and why."""
    return [
        BackendStatus(b.name, not reasons, "; ".join(reasons) or "available")
        for b in BACKENDS
        for reasons in [b.machine_reasons()]
    ]


def run(problem: Problem, record: LayerRecord, ways: Ways) -> Tensor:
    """Compute a product the best way that is allowed, and count it.

    Args:
        problem: shapes, dtype, device and the user's choices.
        record: of the layer.
        ways: how to compute it.

    Returns:
        The product.

    Raises:
        NotSupportedError, EquivalenceError: see ``settle``.
    """
    return compute(problem, settle(problem, record, ways), record, ways)


def settle(problem: Problem, record: LayerRecord, ways: Ways) -> Route:
    """Return the way that a call takes, counted, announced and, where it is due, checked.

    Raises:
        NotSupportedError: if the wanted backend cannot run it and ``on_unsupported`` is "raise".
        EquivalenceError: likewise, if a sparse product fails its check.
    """
    route = record.routes.get(problem)
    if route is None:
        route = route_of(problem, record, ways)
    announce(problem, route, record)
    every, number = problem.config.check_every, record.calls[problem.product, route.name]
    if every and (number - 1) % every == 0 and not _holds(problem, route, record, ways):
        return settle(problem, record, ways)
    return route


def compute(problem: Problem, route: Route, record: LayerRecord, ways: Ways) -> Tensor:
    """Compute a product by a settled route, sampled where that is due."""
    samples, of = record.samples, problem.product
    if not samples.due(of, problem.config.telemetry_every, problem.device):
        return _computed(route, ways)
    if route.backend is not None:
        gradient, draws = ways.grad_output, samples.draws if problem.draws else 1
        pruned = partial(pruned_gradient, problem, gradient)
        sample_gradient(samples, of, gradient, pruned, draws=draws)
    with sampling(samples, of), span("total", problem.device):
        return _computed(route, ways)


def _computed(route: Route, ways: Ways) -> Tensor:
    if route.backend is None:
        with span("dense", ways.grad_output.device):
            return ways.unpruned()
    return ways.pruned(route.backend, route.candidate)


def route_of(problem: Problem, record: LayerRecord, ways: Ways) -> Route:
    """Return the way that a problem takes, and remember it where it will not change.

    Raises:
        NotSupportedError: see ``run``.
    """
    route, final = _first_supported(problem, record), True
    if isinstance(route.backend, CusparseLtBackend):
        route, final = _decided(problem, route.backend, ways)
    if route.rejected and problem.config.on_unsupported == "raise":
        raise NotSupportedError(_no_backend(problem, route.rejected))
    if final:
        if len(record.routes) >= MAX_ROUTES:
            record.routes.clear()
        record.routes[problem] = route
    return route


def _first_supported(problem: Problem, record: LayerRecord) -> Route:
    config, rejected = problem.config, dict[str, list[str]]()
    for backend in BACKENDS:
        if backend.name != "dense" and config.backend not in ("auto", backend.name):
            continue
        reasons = backend.not_supported_reasons(problem)
        if not reasons and backend.name != "dense" and problem.product in record.broken:
            reasons = [record.broken[problem.product]]
        if not reasons:
            return Route(backend, None, rejected)
        rejected[backend.name] = reasons
    raise NotSupportedError(_no_backend(problem, rejected))


def _decided(problem: Problem, backend: CusparseLtBackend, ways: Ways) -> tuple[Route, bool]:
    """Return the way that tuning chose, and whether it will stay so."""
    config = problem.config
    decision = _decision(problem, backend, ways)
    forced = config.backend == backend.name
    if decision.candidate is not None and (decision.use == "sparse" or forced):
        return Route(backend, decision.candidate, {}), True
    dense = BACKENDS[-1]
    if decision.sparse_us is not None:  # right, but measured slower
        return Route(None if config.on_slower == "dense" else dense, None, {}), True
    return Route(dense, None, {backend.name: [decision.reason]}), not decision.transient


def _decision(problem: Problem, backend: CusparseLtBackend, ways: Ways) -> Decision:
    config, rival = problem.config, ways.rival()
    transpose = problem.product == "grad_weight"
    method = config.grad_weight_prune if transpose else config.prune
    if (config.n, config.m) != (2, 4):
        method = "none"  # pruned beforehand, packed as it is
    gemm = backend.gemm_of(problem)
    note(gemm, method=method, transpose=transpose, rival=rival.name)
    return decision_for(
        gemm,
        backend,
        config,
        method=method,
        transpose=transpose,
        capturing=is_capturing(problem.device),
        rival=rival,
    )


def _holds(problem: Problem, route: Route, record: LayerRecord, ways: Ways) -> bool:
    """Check a sparse product; where it fails, bar the layer from it.

    Raises:
        EquivalenceError: it failed, and falling back is forbidden.
    """
    backend, candidate = route.backend, route.candidate
    if not isinstance(backend, CusparseLtBackend) or candidate is None:
        return True
    if is_capturing(problem.device):
        return True
    found = fault(problem, backend, candidate, *ways.operands())
    if found is None:
        return True
    reason = f"it failed a check against dense: {found}"
    record.broken[problem.product] = reason
    record.routes.clear()
    if problem.config.on_unsupported == "raise":
        raise EquivalenceError(f"{record.name}: {problem.product} is not used: {reason}")
    return False


def _no_backend(problem: Problem, rejected: dict[str, list[str]]) -> str:
    lines = [f"No backend that was asked for can run this product:\n{problem.describe()}"]
    for name, reasons in rejected.items():
        lines.append(f"{name} is out because:")
        lines += [f"  - {reason}" for reason in reasons]
    lines.append('SDGPConfig(on_unsupported="dense") runs it densely and says so.')
    return "\n".join(lines)


def announce(problem: Problem, route: Route, record: LayerRecord) -> None:
    """Count the call and its fallbacks; warn the first time a layer meets a reason.

    Where a backend cannot run on this machine at all and the user asked for "auto", one warning
    stands for all layers: they asked for whatever this machine has.
    """
    record.calls[problem.product, route.name] += 1
    for name, reasons in route.rejected.items():
        for reason in reasons:
            key = (problem.product, name, reason)
            record.fallbacks[key] += 1
            if record.fallbacks[key] == 1:
                _warn(problem, name, reason, record)


def _warn(problem: Problem, name: str, reason: str, record: LayerRecord) -> None:
    backend = next(b for b in BACKENDS if b.name == name)
    where = f"{record.name}: {problem.product}"
    if problem.config.backend == "auto" and reason in backend.machine_reasons():
        if reason in _machine_announced:
            return
        _machine_announced.add(reason)
        where = "every layer"
    warnings.warn(
        f"{where} runs on the dense backend instead of {name}: {reason}. The numbers are the "
        'same, the speed is not; SDGPConfig(on_unsupported="raise") forbids it.',
        SDGPFallbackWarning,
        stacklevel=2,
    )
