"""JSON files in the cache folder that processes and threads share, and a kill cannot corrupt.

A file is replaced whole by a rename, so a reader sees the old or the new one and never half of
one; writers take turns on a lock file beside it. A file that cannot be read, or that was written
for another machine or format, is renamed and rebuilt, with a warning that says so.
"""

import json
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sdgp_cusparselt.errors import SDGPCacheWarning

#: Seconds that a short write may have to wait for another one.
WRITE_TIMEOUT_S = 30.0

_thread_locks: dict[Path, threading.Lock] = {}
_registry = threading.Lock()


def cache_dir() -> Path:
    """Return the folder of this package's caches: ``SDGP_CACHE_DIR`` or the platform's own."""
    chosen = os.environ.get("SDGP_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sdgp_cusparselt"


@contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[bool]:
    """Hold the lock ``path`` across processes and threads; yields whether it was got in time.

    Args:
        path: the lock file; made with its folder if missing, and left behind.
        timeout_s: seconds to wait; 0 tries once.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file lock over NFS belongs to a process and would let its other threads in.
    with _registry:
        threads = _thread_locks.setdefault(path.resolve(), threading.Lock())
    if not threads.acquire(timeout=max(timeout_s, 0.0)):
        yield False
        return
    try:
        between_processes = FileLock(path)
        try:
            between_processes.acquire(timeout=max(timeout_s, 0.0))
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            between_processes.release()
    finally:
        threads.release()


def load(path: Path) -> dict[str, Any] | None:
    """Return a file's JSON object, or None if there is none.

    A file that is not a JSON object is set aside with a warning: what it held is made anew, and
    the old bytes stay for whoever wants to look.
    """
    return _load(path, _fault_of_object)


def store(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object so that a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the folder cannot be written to, or the lock is not released in time.
    """
    with _writing(path):
        _replace(path, content)


def update(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Apply change to a file's object ({} if there is none) under its lock; return the result.

    Raises:
        OSError: as ``store``.
    """
    with _writing(path):
        content = change(_load_locked(path, _fault_of_object) or {})
        _replace(path, content)
    return content


@dataclass(frozen=True)
class CacheFile:
    """One JSON file ``{**header, "entries": {key: value}}``.

    Attributes:
        path: where it lies.
        header: what its entries are worth nothing without: format, machine, versions.
    """

    path: Path
    header: Mapping[str, Any]

    def read(self) -> dict[str, Any]:
        """Return the entries; none if there is no file, or one that had to be set aside.

        Raises:
            OSError: the file exists and cannot be opened.
        """
        return self._entries(_load(self.path, self._fault))

    def merge(self, entries: Mapping[str, Any]) -> None:
        """Add or replace entries and keep the others.

        Raises:
            OSError: as ``store``.
        """
        with _writing(self.path):
            old = self._entries(_load_locked(self.path, self._fault))
            _replace(self.path, {**self.header, "entries": {**old, **entries}})

    def set_aside(self, fault: str) -> None:
        """Rename the file, because an entry of it turned out to be unusable, and warn."""
        with _writing(self.path):
            _set_aside(self.path, fault)

    def _fault(self, document: object) -> str:
        if not isinstance(document, dict) or not isinstance(document.get("entries"), dict):
            return "it is corrupt (it has no entries)"
        for key, value in self.header.items():
            if document.get(key) != value:
                return f"it is foreign ({key} is {document.get(key)!r}, not {value!r})"
        return ""

    @staticmethod
    def _entries(document: dict[str, Any] | None) -> dict[str, Any]:
        entries: dict[str, Any] = document["entries"] if document else {}
        return entries


Fault = Callable[[object], str]


def _fault_of_object(document: object) -> str:
    if isinstance(document, dict):
        return ""
    return f"it is corrupt (a JSON object was expected, not {type(document).__name__})"


def _parse(path: Path, fault_of: Fault) -> tuple[dict[str, Any] | None, str]:
    """Return the object of a file, None if there is no file, and what is wrong with it or ""."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None, ""
    except ValueError as error:  # of JSON and of UTF-8
        return None, f"it is corrupt ({error})"
    fault = fault_of(document)
    return (None if fault else document), fault


def _load(path: Path, fault_of: Fault) -> dict[str, Any] | None:
    document, fault = _parse(path, fault_of)
    if fault:
        # Read again under the lock: another process may have replaced the file meanwhile.
        with _writing(path):
            return _load_locked(path, fault_of)
    return document


def _load_locked(path: Path, fault_of: Fault) -> dict[str, Any] | None:
    document, fault = _parse(path, fault_of)
    if fault:
        _set_aside(path, fault)
    return document


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    lock = path.with_name(path.name + ".lock")
    with locked(lock, WRITE_TIMEOUT_S) as held:
        if not held:
            raise TimeoutError(f"{lock} is still held after {WRITE_TIMEOUT_S:.0f} s")
        yield


def _set_aside(path: Path, fault: str) -> None:
    aside = path.with_name(f"{path.name}.corrupt")
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        return
    warnings.warn(
        f"{path} is not used: {fault}. It was renamed to {aside.name}; its contents are made anew.",
        SDGPCacheWarning,
        stacklevel=3,
    )


def _replace(path: Path, document: Mapping[str, Any]) -> None:
    """Write a file whole; the caller holds its lock."""
    partial = f".{path.name}."
    # As the lock is held, a partial file can only be what a killed process left behind.
    for leftover in path.parent.glob(f"{partial}*.partial"):
        leftover.unlink(missing_ok=True)
    name = str(path); handle = os.open(name, os.O_WRONLY | os.O_TRUNC | os.O_CREAT)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
