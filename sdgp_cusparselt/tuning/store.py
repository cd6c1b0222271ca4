"""TuningCache: decisions in memory for the hot path, on disk for the next run and other ranks."""

import hashlib
import json
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from sdgp_cusparselt.backends.gemm import SparseExecutor
from sdgp_cusparselt.cache import CacheFile, cache_dir, locked
from sdgp_cusparselt.errors import SDGPCacheWarning
from sdgp_cusparselt.tuning.decision import Decision, Key

FORMAT = 1
#: What a folder raises that cannot be written to, or whose file system knows no locks.
LOCK_FAILURES = (OSError, NotImplementedError)
#: Seconds that a process waits for another one that tunes; longer than any shape takes.
TURN_TIMEOUT_S = 120.0


class TuningCache:
    """Decisions of every machine that shares a cache folder, one file a machine key.

    Args:
        folder: where the files lie; ``cache_dir()`` if None.
        timeout_s: how long ``turn`` waits for another process or thread that tunes.
    """

    def __init__(self, folder: Path | None = None, timeout_s: float = TURN_TIMEOUT_S) -> None:
        self.folder = cache_dir() if folder is None else Path(folder)
        self.timeout_s = timeout_s
        self._memory: dict[tuple[str, Key], Decision] = {}
        self._entries: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}
        self._gave_up = False
        self._warned = False
        self._unshared = threading.Lock()

    def recall(self, policy: str, key: Key) -> Decision | None:
        """Return what this process remembers under a tune policy; one dictionary look-up."""
        return self._memory.get((policy, key))

    def remember(self, policy: str, decision: Decision) -> Decision:
        """Remember a decision for the rest of this process, and return it."""
        self._memory[policy, decision.key] = decision
        return decision

    def forget(self) -> None:
        """Drop what this process remembers; the files stay."""
        self._memory.clear()
        self._entries.clear()
        self._gave_up = False

    def read(self, key: Key, executor: SparseExecutor) -> Decision | None:
        """Return the decision on disk for the machine at hand, or None."""
        file = self.file(executor, key.gemm.device)
        data = self._entries_of(file).get(key.text())
        if data is None:
            return None
        try:
            decision = Decision.from_dict(data, key.gemm.device)
            if decision.key != key:
                raise ValueError(f"it is about {decision.key.text()}")
        except (KeyError, TypeError, ValueError) as error:
            file.set_aside(f"its entry {key.text()!r} is corrupt ({error!r})")
            return None
        return decision

    def write(self, decision: Decision, executor: SparseExecutor) -> None:
        """Store a decision on disk, unless its reason may pass; warn once if that fails."""
        if decision.transient:
            return
        file = self.file(executor, decision.gemm.device)
        try:
            file.merge({decision.key.text(): decision.as_dict()})
        except LOCK_FAILURES as error:
            self._warn_unwritable(error)

    def decisions(self, executor: SparseExecutor, device: torch.device) -> list[Decision]:
        """Return every decision on disk for the machine at hand."""
        entries = self._entries_of(self.file(executor, device))
        return [Decision.from_dict(data, device) for data in entries.values()]

    def file(self, executor: SparseExecutor, device: torch.device) -> CacheFile:
        """Return the file of the machine that ``device`` belongs to."""
        machine = executor.machine_key(device)
        digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()
        header = {"kind": "sdgp tuning", "format": FORMAT, "machine": machine}
        return CacheFile(self.folder / f"tuning-{digest[:16]}.json", header)

    @contextmanager
    def turn(self, executor: SparseExecutor, device: torch.device) -> Iterator[bool]:
        """Hold the right to tune on this kind of machine; yields False if another one kept it.

        Ranks of one job meet the same shapes: one of them tunes and the others wait here and read
        what it wrote. After one wait in vain this process does not wait again.
        """
        path = self.file(executor, device).path.with_suffix(".turn.lock")
        timeout_s = 0.0 if self._gave_up else self.timeout_s
        with ExitStack() as stack:
            try:
                held = stack.enter_context(locked(path, timeout_s))
            except LOCK_FAILURES as error:
                self._warn_unwritable(error)
                held = stack.enter_context(self._unshared)
            self._gave_up = not held
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

    def _warn_unwritable(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"tuning results cannot be stored in {self.folder}: {error}. They last as long as "
                "this process; set SDGP_CACHE_DIR to a folder that can be written to.",
                SDGPCacheWarning,
                stacklevel=3,
            )


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
