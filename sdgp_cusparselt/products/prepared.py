"""Prepared calls: what one kind of call needs, resolved once, kept and bounded.

A kind is operands of the same shapes, strides, dtype, device and alignment under one configuration.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from sdgp_cusparselt.backends.base import Product, Way
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.devices import is_capturing
from sdgp_cusparselt.errors import NotSupportedError
from sdgp_cusparselt.products import routes
from sdgp_cusparselt.products.announce import announce, announce_machine
from sdgp_cusparselt.products.operands import (
    LinearGradInput,
    LinearGradWeight,
    OfWeight,
    Operands,
)
from sdgp_cusparselt.products.routes import REFUSALS, Route
from sdgp_cusparselt.products.sparse import SparsePair, SparseProduct
from sdgp_cusparselt.products.weight_product import WeightProduct
from sdgp_cusparselt.recording.records import LayerRecord
from sdgp_cusparselt.tuning.decision import Key as TuningKey

#: Calls that a thread keeps of each sort; a run with ever new shapes drops the oldest.
LIMIT = 1024
Key = tuple[object, ...]
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class PreparedCall:
    """One kind of call, resolved.

    Attributes:
        way: how it runs.
        run: computes the product of operands of its kind.
        counted: what a record counts it under.
        reasons: (product, reason) pairs why it does not run sparse.
        uses: calls until the reasons are looked at again.
        watched: whether some of the calls are sampled or checked.
        asked: what tuning was asked, for those who record shapes.
        sparse: its straight line, if it runs sparse.
    """

    way: Way
    run: Callable[[Operands], Tensor]
    counted: tuple[Product, Way]
    reasons: tuple[tuple[Product, str], ...]
    uses: float
    watched: bool
    asked: TuningKey | None
    sparse: SparseProduct | WeightProduct | None

    def count(self, record: LayerRecord) -> None:
        """Count one call of a layer."""
        record.calls[self.counted] += 1
        for reason in self.reasons:
            record.fallbacks[reason] += 1
        self.uses -= 1


class _Calls(threading.local):
    """A thread's calls: plans and handles of the library belong to one thread."""

    def __init__(self) -> None:
        self.single: dict[Key, PreparedCall] = {}
        self.both: dict[Key, SparsePair] = {}
        #: Lines behind a producer, see ``produced``.
        self.produced: dict[Key, Any] = {}


calls = _Calls()
#: Kinds of calls that failed while they ran, and why; for every thread.
_barred: dict[Key, str] = {}
#: Calls that run plain, by what a layer's forward knows of them; for every thread.
_plain: dict[Key, PreparedCall] = {}


def prepare(key: Key, operands: Operands, config: SDGPConfig, record: LayerRecord) -> PreparedCall:
    """Return the call for a kind of operands, kept for the next ones unless it will not hold.

    Raises:
        NotSupportedError: it cannot go the wanted way and ``on_unsupported`` is "raise".
    """
    known, broken = calls.single.get(key), record.broken.get(operands.product)
    if broken is None and known is not None and known.uses >= 1:
        return known
    if broken is not None:  # by this layer's own check: not for others
        route = routes.refused(config, [broken], uses=0)
    elif key in _barred:
        route = routes.refused(config, [_barred[key]])
    else:
        route = routes.route_of(operands, config)
    sparse: SparseProduct | WeightProduct | None = None
    if route.way == "sparse":
        try:
            sparse = _line(operands, config, route)
        except REFUSALS as error:
            route = routes.refused_by(config, error)
    if route.reasons and config.on_unsupported == "raise":
        raise NotSupportedError(routes.describe(operands.problem(config), route.reasons))
    call = _call(operands, config, route, sparse)
    if route.uses:
        _keep(calls.single, key, call)
        if route.way == "plain" and not route.of_memory:
            _keep(_plain, (*operands.layer_key(), config.text), call)
    stored = isinstance(operands, OfWeight) and operands.pruned_weight.is_stored
    if not (stored and route.of_machine):
        _tell(operands.product, route, config, record)
    return call


def prepare_both(
    key: Key, first: LinearGradInput, second: LinearGradWeight, config: SDGPConfig
) -> SparsePair | None:
    """Return one straight line for both products, if both run sparse and can share a read."""
    singles = (calls.single.get((one.key(), config.text)) for one in (first, second))
    found = [call.sparse for call in singles if call is not None and not call.watched]
    lines = [line for line in found if isinstance(line, SparseProduct)]
    if len(lines) < 2 or key in _barred or is_capturing(first.grad_output.device):
        return None
    a, b = lines
    try:
        pair = SparsePair.of(second, a, b)
    except REFUSALS:
        return None
    if pair is not None:
        _keep(calls.both, key, pair)
    return pair


def bar(key: Key, error: Exception) -> None:
    """Let no call of a kind run sparse again in this process."""
    (reason,) = routes.refused_by(SDGPConfig(), error).reasons
    _keep(_barred, key, f"it failed while it ran: {reason}")
    drop(key)


def drop(key: Key) -> None:
    """Forget this thread's call of a kind, so that the next one prepares it anew."""
    calls.single.pop(key, None)
    calls.both.pop(key, None)
    calls.produced.pop(key, None)


def keep_produced(key: Key, line: object) -> None:
    """Keep a line behind a producer for the next calls of its kind."""
    _keep(calls.produced, key, line)


def is_barred(key: Key) -> bool:
    """Whether a call of a kind failed while it ran."""
    return key in _barred


def plain_call(layer_key: Key) -> PreparedCall | None:
    """Return the call that is known to run plain, or None: also where its reasons are due again."""
    call = _plain.get(layer_key)
    if call is not None and call.uses < 1:
        _plain.pop(layer_key, None)
        return None
    return call


def forget() -> None:
    """Forget what every thread prepared; tests start with it."""
    global calls
    calls = _Calls()
    _barred.clear()
    _plain.clear()


def _line(operands: Operands, config: SDGPConfig, route: Route) -> SparseProduct | WeightProduct:
    if isinstance(operands, OfWeight):
        return WeightProduct(operands, config, routes.LIBRARY, route.candidate)
    return SparseProduct(operands, config, routes.LIBRARY, route.candidate)


def _call(
    operands: Operands,
    config: SDGPConfig,
    route: Route,
    sparse: SparseProduct | WeightProduct | None,
) -> PreparedCall:
    product = operands.product
    run: Callable[[Any], Tensor] = type(operands).plain
    if sparse is not None:
        run = sparse.__call__
    elif route.way == "emulated":
        run = partial(type(operands).emulated, config=config)
    return PreparedCall(
        route.way,
        run,
        (product, route.way),
        tuple((product, reason) for reason in route.reasons),
        route.uses,
        bool(config.check_every or config.telemetry_every),
        route.asked,
        sparse,
    )


def _keep(kept: dict[Key, T], key: Key, value: T) -> None:
    kept.pop(key, None)
    for oldest in list(kept)[: max(0, len(kept) - LIMIT + 1)]:  # other threads may drop it first
        kept.pop(oldest, None)
    kept[key] = value


def _tell(product: Product, route: Route, config: SDGPConfig, record: LayerRecord) -> None:
    if not route.reasons:
        return
    reason = "; ".join(route.reasons)
    if route.of_machine and config.backend == "auto":
        announce_machine(reason)
    else:
        announce(record.name, product, route.way, reason)
