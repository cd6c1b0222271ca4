"""Search in a process that is killed when an algorithm hangs, and replaced when one ends it.

What hung or crashed is rejected with the reason, and the search goes on in a new process.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from sdgp_cusparselt.backends.gemm import Candidate, SparseExecutor
from sdgp_cusparselt.errors import SDGPError
from sdgp_cusparselt.tuning.child import serve
from sdgp_cusparselt.tuning.contest import Limits
from sdgp_cusparselt.tuning.decision import Decision, Key, dense_decision, rejected_as_list
from sdgp_cusparselt.tuning.recorder import entry_of

#: Seconds that a candidate may go without a sign of life; learning an order takes a few of them.
PATIENCE_S = 60.0
#: Seconds for what is no candidate's doing: torch's start, and the self-test of float16.
START_S = 300.0
#: Seconds in which a killed process must be gone; one inside the driver may take longer.
KILL_S = 10.0
#: Exit status of a Python process that an exception ended.
RAISED = 1

Serve = Callable[[Connection, Callable[[], SparseExecutor]], None]


class _LostError(Exception):
    """The process is gone; what it tried, and how it went."""

    def __init__(self, candidate: Candidate | None, how: str) -> None:
        super().__init__(how)
        self.candidate, self.how = candidate, how


class Watchdog:
    """Searches through a child process; a context manager.

    Args:
        make_executor: makes what runs products, in the child; it is pickled.
        patience_s: seconds that a candidate may take for one step.
        start_s: seconds that anything else may take.
        serve: what the child runs.
    """

    def __init__(
        self,
        make_executor: Callable[[], SparseExecutor],
        *,
        patience_s: float = PATIENCE_S,
        start_s: float = START_S,
        serve: Serve = serve,
    ) -> None:
        self._make_executor, self._serve = make_executor, serve
        self._patience_s, self._start_s = patience_s, start_s
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> "Watchdog":
        """Return itself; the process starts with the first search."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the process."""
        self.close()

    def search(self, key: Key, limits: Limits) -> Decision:
        """Return what the child finds, without what ended it before.

        Args:
            key: the product; its rival is the plain product.
            limits: whose ``progress`` is told what the child does.

        Raises:
            SDGPError: a programming error ended the child; its traceback is on stderr.
        """
        excluded: list[tuple[Candidate, str]] = []
        while True:
            try:
                return self._ask(key, excluded, limits)
            except _LostError as lost:
                self.close()
                if lost.candidate is None:
                    reason = f"the process that tunes {lost.how} before it tried an algorithm"
                    return replace(
                        dense_decision(key, reason, transient=True), rejected=tuple(excluded)
                    )
                excluded.append((lost.candidate, lost.how))

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.join(KILL_S)
            self._process = None

    def _ask(self, key: Key, excluded: list[tuple[Candidate, str]], limits: Limits) -> Decision:
        connection, trying = self._started(), None
        request = {
            "product": entry_of(key),
            "device": str(key.gemm.device),
            "excluded": rejected_as_list(excluded),
        }
        try:
            connection.send(request)
            while True:
                patience = self._start_s if trying is None else self._patience_s
                if not connection.poll(patience):
                    raise _LostError(trying, f"did not go on for {patience:g} s and was killed")
                kind, *content = connection.recv()
                if kind == "trying":
                    trying = None if content[0] is None else Candidate(**content[0])
                elif kind == "step":
                    limits.progress(*content)
                elif kind == "died":
                    raise _LostError(trying, f"ended the process: {content[0]}")
                else:
                    return _decision(key.gemm.device, *content)
        except (EOFError, ConnectionError):
            raise _LostError(trying, f"ended the process: {self._status()}") from None

    def _started(self) -> Connection:
        if self._connection is None:
            # Not forked: a CUDA context does not survive that.
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            arguments = (theirs, self._make_executor)
            self._process = context.Process(target=self._serve, args=arguments, daemon=True)
            self._process.start()
            theirs.close()
        return self._connection

    def _status(self) -> str:
        if self._process is None:
            return "gone"
        self._process.join(KILL_S)
        status = self._process.exitcode
        if status == RAISED:
            raise SDGPError("tune: the process that tunes raised an error; see its traceback")
        return f"signal {-status}" if status is not None and status < 0 else f"status {status}"


def _decision(device: torch.device, data: dict[str, Any], transient: bool) -> Decision:
    return replace(Decision.from_dict(data, device), transient=transient)
