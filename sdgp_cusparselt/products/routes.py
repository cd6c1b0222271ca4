"""Which way a product goes, and why not another: asked once for each kind of call.

A device with sparse tensor cores runs a product sparse or plain, whatever happens; a device
without them emulates what the user asked for. See ``Way``.
"""

import math
from typing import NamedTuple

import torch

from sdgp_cusparselt.backends.base import Problem, Way
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.gemm import Candidate
from sdgp_cusparselt.backends.reasons import memory_reasons, pattern_reasons, size_reasons
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.devices import is_capturing
from sdgp_cusparselt.errors import CusparseLtError, NotSupportedError
from sdgp_cusparselt.products.heavy import heavy_rival
from sdgp_cusparselt.products.operands import LinearGradInput, Operands
from sdgp_cusparselt.tuning import decision_for
from sdgp_cusparselt.tuning.decision import Key

#: What multiplies sparsely; tests put one on a CPU in its place.
LIBRARY = CusparseLtBackend()
FOR_EVER = math.inf
#: Calls after which a reason that may pass is looked at again.
ASK_AGAIN = 64
UNDER_CAPTURE = "nothing was prepared for it before the graph was captured"


class Route(NamedTuple):
    """The way that a product goes.

    Attributes:
        way: sparse, plain or emulated.
        reasons: why it is not sparse, where that was not the user's choice or a measurement.
        uses: calls for which this holds.
        candidate: how the library multiplies, if sparse.
        asked: what tuning was asked.
        of_machine: whether the device, not the product, is the reason.
        of_memory: whether the operands' strides or alignment are the reason.
    """

    way: Way
    reasons: tuple[str, ...] = ()
    uses: float = FOR_EVER
    candidate: Candidate | None = None
    asked: Key | None = None
    of_machine: bool = False
    of_memory: bool = False


class BackendStatus(NamedTuple):
    """One line of ``backend_status()``."""

    name: str
    available: bool
    reason: str


def backend_status() -> list[BackendStatus]:
    """Return, for what multiplies sparsely and densely, whether this machine can run it and why."""
    reasons = LIBRARY.machine.reasons()
    return [
        BackendStatus(LIBRARY.name, not reasons, "; ".join(reasons) or "available"),
        BackendStatus("dense", True, "available"),
    ]


def route_of(operands: Operands, config: SDGPConfig) -> Route:
    """Return the way that a product goes; may tune."""
    if config.backend == "dense":
        return Route("emulated")
    problem = operands.problem(config)
    machine = LIBRARY.machine
    if reasons := machine.hardware_reasons(problem.device):
        emulates = config.backend == "auto"
        route = refused(config, reasons)._replace(of_machine=True)
        route = route._replace(way="emulated") if emulates else route
    elif reasons := pattern_reasons(problem):
        route = Route("emulated", tuple(reasons))
    elif reasons := [*machine.software_reasons(), *size_reasons(problem)]:
        route = refused(config, reasons)
    elif reasons := memory_reasons(problem):
        route = refused(config, reasons)._replace(of_memory=True)
    elif is_capturing(problem.device):
        # Planning, compiling and proving would be recorded into the graph or break it.
        route = refused(config, [UNDER_CAPTURE], uses=0)
    else:
        route = _tuned(operands, problem)
    return route


def refused(config: SDGPConfig, reasons: list[str], uses: float = FOR_EVER) -> Route:
    """Return where a product goes that cannot run sparse for these reasons."""
    way: Way = "emulated" if config.on_unsupported == "emulate" else "plain"
    return Route(way, tuple(reasons), uses)


def refused_by(config: SDGPConfig, error: Exception) -> Route:
    """Return where a product goes after the library, the memory or the disk refused it."""
    lines = str(error).strip().splitlines()
    passes = not isinstance(error, CusparseLtError | NotSupportedError)
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return refused(config, [reason], ASK_AGAIN if passes else FOR_EVER)


#: What preparing a sparse product may raise for reasons that are not a mistake of this package.
REFUSALS = (CusparseLtError, torch.OutOfMemoryError, NotSupportedError, OSError)


def _tuned(operands: Operands, problem: Problem) -> Route:
    """Return the way that tuning chose."""
    config, rival = problem.config, operands.rival()
    if isinstance(operands, LinearGradInput) and config.heavy_tokens:
        rival = heavy_rival(config.heavy_tokens)
    transpose = problem.product == "grad_weight"
    key = Key(LIBRARY.gemm_of(problem), problem.packed_method, transpose, rival.name)
    try:
        decision = decision_for(
            key.gemm,
            LIBRARY,
            config,
            method=key.method,
            transpose=transpose,
            capturing=False,
            rival=rival,
        )
    except REFUSALS as error:
        return refused_by(config, error)._replace(asked=key)
    forced = config.backend == LIBRARY.name
    if decision.candidate is not None and (decision.use == "sparse" or forced):
        return Route("sparse", candidate=decision.candidate, asked=key)
    if decision.chosen:  # right, but measured or predicted slower
        return Route("emulated" if config.on_slower == "emulate" else "plain", asked=key)
    uses = ASK_AGAIN if decision.transient else FOR_EVER
    return refused(config, [decision.reason], uses)._replace(asked=key)


def describe(problem: Problem, reasons: tuple[str, ...]) -> str:
    """Return a product and every reason why it cannot run sparse, for an error message."""
    lines = [f"This product cannot run sparse:\n{problem.describe()}", "because:"]
    lines += [f"  - {reason}" for reason in reasons]
    lines.append('SDGPConfig(on_unsupported="plain") runs it as without this package and says so.')
    return "\n".join(lines)
