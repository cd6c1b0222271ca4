"""What each layer's backward passes did: counted while they run, read by telemetry and reports."""

import itertools
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sdgp_cusparselt.recording.spans import Samples

_records: "weakref.WeakValueDictionary[int, LayerRecord]" = weakref.WeakValueDictionary()
_next_token = itertools.count(1)


@dataclass(eq=False)
class LayerRecord:
    """The record of one layer.

    Attributes:
        name: fully qualified name of the layer, for messages.
        calls: (product, way) -> number of calls; a way is sparse, plain or emulated.
        fallbacks: (product, reason) -> number of calls that did not run sparse for it.
        broken: product -> why this layer's sparse path is not used any more.
        samples: times and gradient errors of some of the calls.
        token: number under which ``record_of`` finds this record; a custom operator can carry it.
    """

    name: str = "sdgp.functional"
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    fallbacks: Counter[tuple[str, str]] = field(default_factory=Counter)
    broken: dict[str, str] = field(default_factory=dict)
    samples: Samples = field(default_factory=Samples, repr=False)
    token: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Register under a number of its own."""
        self.token = next(_next_token)
        _records[self.token] = self

    def __reduce__(self) -> tuple[type["LayerRecord"], tuple[Any, ...]]:
        """Copy and pickle without the number, so that no two records share one."""
        counts = (Counter(self.calls), Counter(self.fallbacks), dict(self.broken))
        return LayerRecord, (self.name, *counts)


#: Stands for every layer in compiled code. A number per layer would be a constant of the graph, and
#: blocks that are compiled one by one could not share their code.
COMPILED = LayerRecord("compiled layers")


def record_of(token: int) -> LayerRecord:
    """Return the record with that token; a new one if its layer is gone."""
    record = _records.get(token)
    return LayerRecord() if record is None else record
