"""Find and open one libcusparseLt: lazily, once, by absolute path, with its symbols kept local."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import threading
import warnings
from typing import Any

from pycusparselt.abi import Property, Status
from pycusparselt.errors import (
    FunctionNotAvailableError,
    LibraryNotFoundError,
    LibraryVersionWarning,
    UnsupportedVersionError,
)

ENVIRONMENT_VARIABLE = "CUSPARSELT_LIBRARY"
SONAME = "libcusparseLt.so.0"
OLDEST_TESTED = (0, 6, 2)
NEWEST_TESTED = (0, 10)  # any patch release of it
KNOWN_REGRESSIONS = {
    (0, 8, 0): "it has known performance regressions on H100 and L4, fixed in 0.8.1",
}
INSTALL_HINT = (
    "Install it with: pip install nvidia-cusparselt-cu13 (CUDA 12: nvidia-cusparselt-cu12)"
)

# cuda.pathfinder can only open what it finds, with RTLD_GLOBAL: 0.6 and 0.7 would then leak up to
# 83,000 C++ symbols into this process. So it searches in a process of its own.
_FIND = (
    "from cuda.pathfinder import load_nvidia_dynamic_lib as load\n"
    "print(load('cusparseLt').abs_path)"
)
_FIND_TIMEOUT_S = 60

_lock = threading.RLock()
_libraries: dict[tuple[str, str | int], Library] = {}


class Library:
    """One opened libcusparseLt.

    Attributes:
        cdll: the ctypes library.
        path: absolute path of its file, or the name it was injected with.
        version: (major, minor, patch) from ``cusparseLtGetProperty``, which needs no GPU.
    """

    def __init__(self, cdll: ctypes.CDLL, path: str) -> None:
        self.cdll = cdll
        self.path = path
        self._symbols: dict[str, Any] = {}
        self.version = _read_version(cdll, path)

    def __repr__(self) -> str:
        return f"Library(path={self.path!r}, version={self.version_text})"

    @property
    def version_text(self) -> str:
        """The version as people write it, for example ``0.8.1``."""
        return ".".join(str(part) for part in self.version)

    def has(self, function: str) -> bool:
        """Return whether this version exports a C function."""
        return hasattr(self.cdll, function)

    def symbol(self, function: str, argtypes: tuple[Any, ...], restype: Any) -> Any:
        """Return a C function with its types set.

        The types live on a function object of our own, so that another user of the same CDLL
        neither sees nor changes them.

        Raises:
            FunctionNotAvailableError: this version does not export the function.
        """
        found = self._symbols.get(function)
        if found is None:
            try:
                found = self.cdll[function]
            except AttributeError:
                raise FunctionNotAvailableError(
                    f"{function} is not exported by cuSPARSELt {self.version_text} ({self.path}). "
                    "Use a newer library",
                    function,
                ) from None
            found.argtypes = argtypes
            found.restype = restype
            self._symbols[function] = found
        return found


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    cdll: ctypes.CDLL | None = None,
    allow_untested: bool = False,
) -> Library:
    """Return the library, opening it the first time; later calls return the same object.

    Args:
        path: file to open. Without it, ``CUSPARSELT_LIBRARY`` names the file; without that, the
            copy that this process already holds (torch brings one) is used, else what
            ``cuda.pathfinder`` finds (wheels, conda, the system).
        cdll: an opened library to use as it is, instead of a path.
        allow_untested: go on with a warning where the version lies outside the tested range.

    Returns:
        The opened library, with its version read.

    Raises:
        LibraryNotFoundError: no library was found, or the file is not libcusparseLt.
        UnsupportedVersionError: its version is outside 0.6.2 to 0.10 and allow_untested is False.

    Source: ``cusparseLtGetProperty``.
    """
    if cdll is not None and path is not None:
        raise TypeError("load: cdll must be given alone, got path as well. Drop one of the two")
    with _lock:
        if cdll is not None:
            key: tuple[str, str | int] = ("cdll", cdll._handle)
        else:
            named = os.fspath(path) if path is not None else os.environ.get(ENVIRONMENT_VARIABLE)
            key = ("path", os.path.realpath(named)) if named else ("search", "")
        library = _libraries.get(key)
        if library is None:
            library = _open(key, cdll)
            _check_version(library, allow_untested)
            _libraries[key] = library
        return library


def _open(key: tuple[str, str | int], cdll: ctypes.CDLL | None) -> Library:
    if cdll is not None:
        return Library(cdll, str(cdll._name))
    path = str(key[1]) or _already_loaded() or _search()
    try:
        return Library(ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL | os.RTLD_NOW), path)
    except OSError as error:
        if isinstance(error, LibraryNotFoundError):
            raise
        raise LibraryNotFoundError(
            f"load: {path} must be a cuSPARSELt library that opens, got: {error}. {INSTALL_HINT}, "
            f"or set {ENVIRONMENT_VARIABLE} to its file",
            (path,),
        ) from error


def _already_loaded() -> str | None:
    """Return the file behind the SONAME if this process holds it; two copies share nothing."""
    try:
        ctypes.CDLL(SONAME, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            name = line.rstrip("\n").split(maxsplit=5)[-1]
            if os.path.basename(name).startswith("libcusparseLt.so"):
                return name
    return None


def _search() -> str:
    """Ask ``cuda.pathfinder`` where the library is."""
    tried = [f"{ENVIRONMENT_VARIABLE} (not set)", f"{SONAME} (not loaded in this process)"]
    if not sys.executable or not _has_pathfinder():
        tried.append("cuda.pathfinder (not installed)")
        advice = "Let it be searched for with: pip install cuda-pathfinder"
    else:
        path, answer = _run_search()
        if path:
            return path
        tried += [f"cuda.pathfinder: {line}" for line in answer]
        advice = INSTALL_HINT
    listing = "\n  ".join(tried)
    raise LibraryNotFoundError(
        f"load: libcusparseLt was not found. {advice}, or set {ENVIRONMENT_VARIABLE} to its file. "
        f"Searched:\n  {listing}",
        tuple(tried),
    )


def _has_pathfinder() -> bool:
    try:
        return importlib.util.find_spec("cuda.pathfinder") is not None
    except ModuleNotFoundError:  # not even the namespace ``cuda`` exists
        return False


def _run_search() -> tuple[str, list[str]]:
    """Return the path that was found, or "" and why not."""
    command = [sys.executable, "-c", _FIND]
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=_FIND_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "", [f"no answer in {_FIND_TIMEOUT_S} s"]
    found = finished.stdout.strip().splitlines()
    if finished.returncode == 0 and found:
        return found[-1], []
    lines = finished.stderr.strip().splitlines()
    start = max((i for i, line in enumerate(lines) if "NotFoundError" in line), default=-1)
    return "", [line.strip() for line in lines[start:] if line.strip()] or ["no answer"]


def _read_version(cdll: ctypes.CDLL, path: str) -> tuple[int, int, int]:
    try:
        get_property = cdll["cusparseLtGetProperty"]
    except AttributeError:
        raise LibraryNotFoundError(
            f"load: {path} must export cusparseLtGetProperty, got a library without it. "
            f"{INSTALL_HINT}",
            (path,),
        ) from None
    get_property.argtypes = (ctypes.c_int, ctypes.c_void_p)
    get_property.restype = ctypes.c_int
    parts = []
    for part in Property:
        value = ctypes.c_int(-1)
        if get_property(part, ctypes.byref(value)) != Status.SUCCESS:
            raise LibraryNotFoundError(
                f"load: {path} must answer cusparseLtGetProperty, got an error. {INSTALL_HINT}",
                (path,),
            )
        parts.append(value.value)
    return parts[0], parts[1], parts[2]


def _check_version(library: Library, allow_untested: bool) -> None:
    version = library.version
    if version in KNOWN_REGRESSIONS:
        warnings.warn(
            f"cuSPARSELt {library.version_text}: {KNOWN_REGRESSIONS[version]}. Use another version",
            LibraryVersionWarning,
            stacklevel=3,
        )
    if version >= OLDEST_TESTED and version[:2] <= NEWEST_TESTED:
        return
    message = (
        f"load: cuSPARSELt must be between 0.6.2 and 0.10, the versions that this binding was "
        f"compared with, got {library.version_text} at {library.path}. "
        "Install a tested version, or pass allow_untested=True"
    )
    if not allow_untested:
        raise UnsupportedVersionError(message)
    warnings.warn(message, LibraryVersionWarning, stacklevel=3)
