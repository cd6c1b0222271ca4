"""TuningCache: decisions in memory for the hot path, on disk for the next run and other ranks."""

import hashlib
import json
import math
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from sdgp_cusparselt.backends.gemm import Candidate, Gemm, SparseExecutor
from sdgp_cusparselt.backends.plans import planned_as
from sdgp_cusparselt.cache import CacheFile, cache_dir, locked
from sdgp_cusparselt.errors import SDGPCacheWarning
from sdgp_cusparselt.tuning.decision import Decision, Key
from sdgp_cusparselt.tuning.session import Session

FORMAT = 2
#: What a folder raises that cannot be written to, or whose file system knows no locks.
LOCK_FAILURES = (OSError, NotImplementedError)
#: Seconds that a process waits for another one that tunes; longer than any shape takes.
TURN_TIMEOUT_S = 120.0
#: Seconds between two looks at whether the one who tunes has stored what others wait for.
LOOK_S = 0.2


class TuningCache:
    """Decisions of every machine that shares a cache folder, one file a machine key.

    Args:
        folder: where the files lie; ``cache_dir()`` if None.
        timeout_s: how long ``turn`` waits for another process or thread that tunes.
        session: what searches at first use may cost this process; a new one if None.
    """

    def __init__(
        self,
        folder: Path | None = None,
        timeout_s: float = TURN_TIMEOUT_S,
        session: Session | None = None,
    ) -> None:
        self.folder = cache_dir() if folder is None else Path(folder)
        self.timeout_s = timeout_s
        self.session = Session() if session is None else session
        self._memory: dict[Hashable, tuple[Decision, float]] = {}
        self._proven: set[tuple[Gemm, Candidate]] = set()
        self._entries: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}
        self._own: dict[tuple[Path, Key], Decision] = {}
        self._gave_up = False
        self._warned = False
        self._unshared = threading.Lock()

    @property
    def writable(self) -> bool:
        """Whether everything so far could be stored."""
        return not self._warned

    def recall(self, asked: Hashable) -> Decision | None:
        """Return what this process remembers for a question; one dictionary look-up."""
        found = self._memory.get(asked)
        if found is None or (found[1] < math.inf and self.session.clock() >= found[1]):
            return None
        return found[0]

    def remember(self, asked: Hashable, decision: Decision) -> Decision:
        """Remember a decision for as long as it is valid in this process, and return it."""
        until = decision.valid_s
        if until < math.inf:
            until += self.session.clock()
        self._memory[asked] = decision, until
        return decision

    def is_proven(self, gemm: Gemm, candidate: Candidate) -> bool:
        """Whether a plan computed right in this process."""
        return (planned_as(gemm), candidate) in self._proven

    def prove(self, gemm: Gemm, candidate: Candidate) -> None:
        """Note that a plan computed right in this process."""
        self._proven.add((planned_as(gemm), candidate))

    def forget(self) -> None:
        """Drop what this process remembers; the files stay."""
        for memory in (self._memory, self._proven, self._entries, self._own):
            memory.clear()
        self._gave_up = False

    def read(self, key: Key, executor: SparseExecutor) -> Decision | None:
        """Return the decision that is stored for the machine at hand, or None.

        What is on disk counts before what this process found itself.
        """
        file = self.file(executor, key.gemm.device)
        try:
            data = self._entries_of(file).get(key.text())
            if data is not None:
                return _decision(data, key)
        except (KeyError, TypeError, ValueError) as error:
            self._set_aside(file, f"its entry {key.text()!r} is corrupt ({error!r})")
        except LOCK_FAILURES as error:
            self._warn_unwritable(error)
        return self._own.get((file.path, key))

    def write(self, decision: Decision, executor: SparseExecutor) -> None:
        """Store a decision, unless its reason may pass.

        On a disk that cannot be written to it lasts as long as this process; said once.
        """
        if decision.transient:
            return
        file = self.file(executor, decision.gemm.device)
        self._own[file.path, decision.key] = decision
        try:
            file.merge({decision.key.text(): decision.as_dict()})
        except LOCK_FAILURES as error:
            self._warn_unwritable(error)

    def decisions(self, executor: SparseExecutor, device: torch.device) -> list[Decision]:
        """Return every sound decision on disk for the machine at hand."""
        found = []
        try:
            entries = self._entries_of(self.file(executor, device))
        except LOCK_FAILURES as error:
            self._warn_unwritable(error)
            return []
        for data in entries.values():
            with suppress(KeyError, TypeError, ValueError):
                found.append(Decision.from_dict(data, device))
        return found

    def file(self, executor: SparseExecutor, device: torch.device) -> CacheFile:
        """Return the file of the machine that ``device`` belongs to."""
        machine = executor.machine_key(device)
        digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()
        header = {"kind": "sdgp tuning", "format": FORMAT, "machine": machine}
        return CacheFile(self.folder / f"tuning-{digest[:16]}.json", header)

    @contextmanager
    def turn(
        self,
        executor: SparseExecutor,
        device: torch.device,
        *,
        timeout_s: float | None = None,
        ready: Callable[[], bool] = lambda: False,
    ) -> Iterator[bool]:
        """Hold the right to tune on this kind of machine; yields False if another one kept it.

        Ranks of one job meet the same shapes: one of them tunes and the others wait here and read
        what it wrote. After one wait in vain this process does not wait again.

        Args:
            executor: says what kind of machine it is.
            device: likewise.
            timeout_s: how long to wait; the cache's own if None.
            ready: asked while waiting; True ends the wait, because what was to be found is there.
        """
        path = self.file(executor, device).path.with_suffix(".turn.lock")
        patience = self.timeout_s if timeout_s is None else min(timeout_s, self.timeout_s)
        with ExitStack() as stack:
            try:
                held = _wait(stack, path, 0.0 if self._gave_up else patience, ready)
            except LOCK_FAILURES as error:
                self._warn_unwritable(error)
                held = stack.enter_context(self._unshared)
            self._gave_up = not (held or ready())
            yield held

    def _entries_of(self, file: CacheFile) -> dict[str, Any]:
        """Return the file's entries, read again only if it changed."""
        try:
            status = file.path.stat()
        except OSError:
            return {}
        stamp = (status.st_mtime_ns, status.st_ino)
        known = self._entries.get(file.path)
        if known is None or known[0] != stamp:
            known = stamp, file.read()
            self._entries[file.path] = known
        return known[1]

    def _set_aside(self, file: CacheFile, fault: str) -> None:
        try:
            file.set_aside(fault)
        except LOCK_FAILURES as error:
            self._warn_unwritable(error)

    def _warn_unwritable(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"tuning results cannot be stored in {self.folder}: {error}. They last as long as "
                "this process; set SDGP_CACHE_DIR to a folder that can be written to.",
                SDGPCacheWarning,
                stacklevel=3,
            )


def _decision(data: dict[str, Any], key: Key) -> Decision:
    decision = Decision.from_dict(data, key.gemm.device)
    if decision.key != key:
        raise ValueError(f"it is about {decision.key.text()}")
    return decision


def _wait(stack: ExitStack, path: Path, timeout_s: float, ready: Callable[[], bool]) -> bool:
    """Enter the lock ``path`` and return True, or False where ``ready`` or the timeout came first.

    Looking again and again, and not only at the lock: whoever tunes may take its next shape before
    a waiter gets in, and would then wait for a waiter that its collectives need.
    """
    until = time.monotonic() + timeout_s
    while True:
        left = max(0.0, until - time.monotonic())
        if stack.enter_context(locked(path, min(left, LOOK_S))):
            return True
        stack.close()
        if ready() or time.monotonic() >= until:
            return False


_default: TuningCache | None = None
_default_lock = threading.Lock()


def default_cache() -> TuningCache:
    """Return this process's cache in ``cache_dir()``."""
    global _default
    if _default is None:
        with _default_lock:
            if _default is None:
                _default = TuningCache()
    return _default
