"""record_shapes: which products a run asks for, so that they can be tuned ahead of the next."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdgp_cusparselt.backends.gemm import Gemm
from sdgp_cusparselt.tuning.decision import MATMUL, Key, result_as_dict


class ShapeLog:
    """The products that ran inside ``record_shapes``, and how often each did."""

    def __init__(self) -> None:
        self.counts: Counter[Key] = Counter()
        self._lock = threading.Lock()

    def add(self, key: Key) -> None:
        """Count one product; backward passes come from several threads."""
        with self._lock:
            self.counts[key] += 1

    def __len__(self) -> int:
        return len(self.counts)

    def __iter__(self) -> Iterator[Key]:
        return iter(self.counts)

    def as_list(self) -> list[dict[str, Any]]:
        """Return the products as plain JSON types, the most frequent first."""
        return [{**entry_of(key), "calls": calls} for key, calls in self.counts.most_common()]

    def write(self, path: str | Path) -> None:
        """Write the file that ``sdgp tune --shapes`` reads."""
        Path(path).write_text(json.dumps(self.as_list(), indent=1) + "\n", encoding="utf-8")


#: The logs that are being written; products look at it before they do anything for it.
ACTIVE: list[ShapeLog] = []


@contextmanager
def record_shapes() -> Iterator[ShapeLog]:
    """Record every product that converted layers ask for, on any device and backend.

    Yields:
        ShapeLog: iterate it, or ``write`` it for ``sdgp tune --shapes``.

    Example:
        >>> with record_shapes() as shapes:
        ...     pass  # one training step
        >>> len(shapes)
        0
    """
    log = ShapeLog()
    ACTIVE.append(log)
    try:
        yield log
    finally:
        # By identity, because logs of nested recorders may hold the same products.
        ACTIVE[:] = [other for other in ACTIVE if other is not log]


def note(gemm: Gemm, *, method: str, transpose: bool, rival: str = MATMUL.name) -> None:
    """Tell the active recorders of a product; does nothing without one."""
    key = Key(gemm, method, transpose, rival)
    for log in list(ACTIVE):
        log.add(key)


def entry_of(key: Key) -> dict[str, Any]:
    """Return a product as plain JSON types; ``shapes.key_of`` reads them."""
    gemm = key.gemm
    return {
        "m": gemm.m,
        "n": gemm.n,
        "k": gemm.k,
        "dtype": str(gemm.dtype).removeprefix("torch."),
        "dense_order": gemm.dense_order,
        **result_as_dict(gemm),
        "method": key.method,
        "transpose": key.transpose,
        "rival": key.rival,
    }
