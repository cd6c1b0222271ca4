"""Which backend runs a product, why not the others, and who was told."""

import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdgp_cusparselt.backends.base import Backend, ConvGeometry, Problem, Product
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.dense import DenseBackend
from sdgp_cusparselt.config import SDGPConfig
from sdgp_cusparselt.errors import NotSupportedError, SDGPFallbackWarning

#: In order of preference; the last one runs everything.
BACKENDS: list[Backend] = [CusparseLtBackend(), DenseBackend()]

_machine_announced: set[str] = set()


class BackendStatus(NamedTuple):
    """One line of ``backend_status()``."""

    name: str
    available: bool
    reason: str


_records: weakref.WeakValueDictionary[int, "LayerRecord"] = weakref.WeakValueDictionary()
_next_token = itertools.count(1)


@dataclass(eq=False)
class LayerRecord:
    """What one layer's backward passes did: counted here, read by telemetry and reports.

    Attributes:
        name: fully qualified name of the layer, for messages.
        calls: (product, backend name) -> number of calls.
        fallbacks: (product, backend name, reason) -> number of calls that fell back.
        token: number under which ``record_of`` finds this record; a custom operator can carry it.
    """

    name: str = "sdgp.functional"
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    fallbacks: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    token: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Register under a number of its own."""
        self.token = next(_next_token)
        _records[self.token] = self

    def __reduce__(self) -> tuple[type["LayerRecord"], tuple[Any, ...]]:
        """Copy and pickle without the number, so that no two records share one."""
        return LayerRecord, (self.name, Counter(self.calls), Counter(self.fallbacks))


#: Stands for every layer in compiled code. A number per layer would be a constant of the graph, and
#: blocks that are compiled one by one could not share their code.
COMPILED = LayerRecord("compiled layers")


def record_of(token: int) -> LayerRecord:
    """Return the record with that token; a new one if its layer is gone."""
    record = _records.get(token)
    return LayerRecord() if record is None else record


class Selection(NamedTuple):
    """The backend that runs a problem, and each preferred one's reasons for not doing so."""

    backend: Backend
    rejected: dict[str, list[str]]


def backend_status() -> list[BackendStatus]:
    """Return, for every backend in order of preference, whether this machine can run it and why."""
    return [
        BackendStatus(b.name, not reasons, "; ".join(reasons) or "available")
        for b in BACKENDS
        for reasons in [b.machine_reasons()]
    ]


def select(problem: Problem) -> Selection:
    """Return the backend that runs ``problem``.

    Args:
        problem: shapes, dtype, device and the user's choices.

    Returns:
        The first backend without a reason against it, and the reasons of those before it.

    Raises:
        NotSupportedError: if the wanted backend cannot run it and ``on_unsupported`` is "raise".
    """
    config, rejected = problem.config, dict[str, list[str]]()
    for backend in BACKENDS:
        if backend.name != "dense" and config.backend not in ("auto", backend.name):
            continue
        reasons = backend.not_supported_reasons(problem)
        if not reasons:
            if rejected and config.on_unsupported == "raise":
                raise NotSupportedError(_no_backend(problem, rejected))
            return Selection(backend, rejected)
        rejected[backend.name] = reasons
    raise NotSupportedError(_no_backend(problem, rejected))


def _no_backend(problem: Problem, rejected: dict[str, list[str]]) -> str:
    lines = [f"No backend that was asked for can run this product:\n{problem.describe()}"]
    for name, reasons in rejected.items():
        lines.append(f"{name} is out because:")
        lines += [f"  - {reason}" for reason in reasons]
    lines.append('SDGPConfig(on_unsupported="dense") runs it densely and says so.')
    return "\n".join(lines)


def announce(problem: Problem, selection: Selection, record: LayerRecord) -> None:
    """Count the call and its fallbacks; warn the first time a layer meets a reason.

    Where a backend cannot run on this machine at all and the user asked for "auto", one warning
    stands for all layers: they asked for whatever this machine has.
    """
    record.calls[problem.product, selection.backend.name] += 1
    for name, reasons in selection.rejected.items():
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


def linear_grad_input(
    grad_output: Tensor, weight: Tensor, config: SDGPConfig, record: LayerRecord
) -> Tensor:
    """Return prune(grad_output) @ weight: [..., K] @ [K, N], on the backend that is selected."""
    k, n = weight.shape
    m = grad_output.numel() // max(k, 1)
    problem = _problem("grad_input", m, n, k, grad_output, config, weight=weight)
    return _run(problem, record, lambda b: b.linear_grad_input(grad_output, weight, config))


def linear_grad_weight(
    grad_output: Tensor, input: Tensor, config: SDGPConfig, record: LayerRecord
) -> Tensor:
    """Return prune(grad_output along tokens).T @ input: [K, M].T @ [K, N]."""
    k, m = grad_output.shape
    problem = _problem("grad_weight", m, input.shape[1], k, grad_output, config)
    return _run(problem, record, lambda b: b.linear_grad_weight(grad_output, input, config))


def conv2d_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_like: Tensor,
    conv: ConvGeometry,
    config: SDGPConfig,
    record: LayerRecord,
) -> Tensor:
    """Return the transposed convolution of prune(grad_output along channels) with weight."""
    batch, channels, height, width = grad_output.shape
    problem = _problem(
        "grad_input",
        batch * height * width,
        weight[0].numel(),
        channels // conv.groups,
        grad_output,
        config,
        conv,
        weight,
    )
    return _run(
        problem,
        record,
        lambda b: b.conv2d_grad_input(grad_output, weight, input_like, conv, config),
    )


def conv2d_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    conv: ConvGeometry,
    config: SDGPConfig,
    record: LayerRecord,
) -> Tensor:
    """Return the weight gradient of a convolution from grad_output pruned along its pixels."""
    batch, channels, height, width = grad_output.shape
    problem = _problem(
        "grad_weight",
        channels // conv.groups,
        weight[0].numel(),
        batch * height * width,
        grad_output,
        config,
        conv,
        weight,
    )
    return _run(
        problem,
        record,
        lambda b: b.conv2d_grad_weight(grad_output, input, weight, conv, config),
    )


def _problem(
    product: Product,
    m: int,
    n: int,
    k: int,
    grad_output: Tensor,
    config: SDGPConfig,
    conv: ConvGeometry | None = None,
    weight: Tensor | None = None,
) -> Problem:
    dtype, device = grad_output.dtype, grad_output.device
    problem = Problem(product, m, n, k, dtype, device, config)
    if weight is None:
        return problem
    if conv is None:
        column_major = weight.stride() == (1, weight.shape[0]) != (weight.shape[1], 1)
        return replace(problem, dense_order="col") if column_major else problem
    channels_last = grad_output.is_contiguous(memory_format=torch.channels_last)
    kernel_size = (weight.shape[2], weight.shape[3])
    return replace(problem, conv=conv, kernel_size=kernel_size, channels_last=channels_last)


def _run(problem: Problem, record: LayerRecord, product: Callable[[Backend], Tensor]) -> Tensor:
    selection = select(problem)
    announce(problem, selection, record)
    return product(selection.backend)
