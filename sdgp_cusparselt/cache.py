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
from typing import IO, Any

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


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write`` on a file that appears as ``path`` only once its bytes are on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        entries, fault = self._parse()
        if fault:
            with locked(self._lock, WRITE_TIMEOUT_S):
                # Read again: whoever held the lock may have replaced the file meanwhile.
                entries, fault = self._parse()
                if fault:
                    _rename(self.path, fault)
        return entries

    def merge(self, entries: Mapping[str, Any]) -> None:
        """Add or replace entries and keep the others.

        Raises:
            OSError: the folder cannot be written to, or the lock is not released in time.
        """
        with locked(self._lock, WRITE_TIMEOUT_S) as held:
            if not held:
                raise TimeoutError(f"{self._lock} is still held after {WRITE_TIMEOUT_S:.0f} s")
            old, fault = self._parse()
            if fault:
                _rename(self.path, fault)
            _replace(self.path, {**self.header, "entries": {**old, **entries}})

    def set_aside(self, fault: str) -> None:
        """Rename the file, because an entry of it turned out to be unusable, and warn."""
        with locked(self._lock, WRITE_TIMEOUT_S):
            _rename(self.path, fault)

    @property
    def _lock(self) -> Path:
        return _lock_of(self.path)

    def _parse(self) -> tuple[dict[str, Any], str]:
        """Return the entries, and what is wrong with the file or ""."""
        document, fault = _parse_object(self.path)
        if document is None:
            return {}, fault
        if not isinstance(document.get("entries"), dict):
            return {}, "it is corrupt (it has no entries)"
        for key, value in self.header.items():
            if document.get(key) != value:
                return {}, f"it is foreign ({key} is {document.get(key)!r}, not {value!r})"
        return document["entries"], ""


def load(path: Path) -> dict[str, Any] | None:
    """Return a file's JSON object, or None if there is none or it had to be set aside.

    Raises:
        OSError: the file exists and cannot be opened.
    """
    document, fault = _parse_object(path)
    if fault:
        with locked(_lock_of(path), WRITE_TIMEOUT_S):
            document, fault = _parse_object(path)
            if fault:
                _rename(path, fault)
    return document


def update(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Apply change to a file's object ({} if there is none) under its lock; return the result.

    Raises:
        OSError: the folder cannot be written to, or the lock is not released in time.
    """
    lock = _lock_of(path)
    with locked(lock, WRITE_TIMEOUT_S) as held:
        if not held:
            raise TimeoutError(f"{lock} is still held after {WRITE_TIMEOUT_S:.0f} s")
        document, fault = _parse_object(path)
        if fault:
            _rename(path, fault)
        content = change(document or {})
        _replace(path, content)
    return content


def store(path: Path, content: dict[str, Any]) -> None:
    """Replace a file's object; a reader sees the old one or the new one, never a part.

    Raises:
        OSError: see ``update``.
    """
    update(path, lambda _: content)


def _parse_object(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the object in a file, and what is wrong with the file or ""."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None, ""
    except ValueError as error:  # of JSON and of UTF-8
        return None, f"it is corrupt ({error})"
    if not isinstance(document, dict):
        return None, f"it is corrupt (it holds a {type(document).__name__})"
    return document, ""


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _rename(path: Path, fault: str) -> None:
    aside = path.with_name(f"{path.name}.aside")
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
    partial = f".{path.name}."
    # The lock is held, so a partial file can only be what a killed process left behind.
    for leftover in path.parent.glob(f"{partial}*.partial"):
        leftover.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(".partial", partial, path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
