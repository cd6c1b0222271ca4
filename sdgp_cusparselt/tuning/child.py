"""The process that ``sdgp tune`` can spare: searches what it is told to, and says what it tries.

It talks in builtin types: ("step", done, total, text), ("trying", candidate or None), and at the
end ("decision", ``Decision.as_dict()``, transient) or ("died", why it is of no use any more).
"""

import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from typing import Any

import pycusparselt as cslt
import torch

from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.gemm import Candidate, SparseExecutor
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.tuning.contest import first_line
from sdgp_cusparselt.tuning.decision import RIVALS, Decision, rejected_from_list
from sdgp_cusparselt.tuning.search import FULL, Search
from sdgp_cusparselt.tuning.shapes import key_of


def cusparselt_executor(
    device_type: str, library: str, capability: tuple[int, int]
) -> SparseExecutor:
    """Return a backend on the library at a path; see ``Machine`` for the rest."""
    return CusparseLtBackend(Machine(device_type, cslt.load(library), capability))


def serve(connection: Connection, make_executor: Callable[[], SparseExecutor]) -> None:
    """Answer requests until the other end closes.

    Args:
        connection: brings ``request``s.
        make_executor: called once, here.
    """
    # Ctrl-C reaches both processes; the other one ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    executor = make_executor()
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            decision = _search(request, executor, connection)
        except RuntimeError as error:  # of CUDA: nothing runs after it in this process
            connection.send(("died", f"{type(error).__name__}: {first_line(error)}"))
            return
        connection.send(("decision", decision.as_dict(), decision.transient))


def _search(request: dict[str, Any], executor: SparseExecutor, connection: Connection) -> Decision:
    def trying(candidate: Candidate | None) -> None:
        connection.send(("trying", None if candidate is None else asdict(candidate)))

    def progress(done: int, total: int, step: str) -> None:
        connection.send(("step", done, total, step))

    key = key_of(request["product"], torch.device(request["device"]))
    excluded = rejected_from_list(request["excluded"])
    limits = replace(FULL, progress=progress, trying=trying)
    rival = RIVALS[key.rival]
    return Search(key, executor, rival, limits=limits, safe=False, excluded=excluded).decide()
