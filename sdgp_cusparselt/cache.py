"""What this package learns about a machine, kept on disk: small JSON files, written whole."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

LOCK_TIMEOUT_S = 60


def cache_dir() -> Path:
    """Return the folder for learned facts: SDGP_CACHE_DIR, or the platform's cache folder."""
    chosen = os.environ.get("SDGP_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sdgp_cusparselt"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "sdgp_cusparselt"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sdgp_cusparselt"


def load(path: Path) -> dict[str, Any] | None:
    """Return a file's JSON object, or None if there is none.

    A file that is not a JSON object is renamed to ``*.corrupt`` with a warning: what it held is
    learned again, and the old bytes stay for whoever wants to look.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, UnicodeDecodeError) as error:
        _set_aside(path, str(error))
        return None
    if not isinstance(content, dict):
        _set_aside(path, f"expected a JSON object, got {type(content).__name__}")
        return None
    return content


def store(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=LOCK_TIMEOUT_S):
        _replace(path, content)


def update(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Apply change to a file's object ({} if there is none) under its lock; return the result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=LOCK_TIMEOUT_S):
        content = change(load(path) or {})
        _replace(path, content)
    return content


def _replace(path: Path, content: dict[str, Any]) -> None:
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, sort_keys=True)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _set_aside(path: Path, why: str) -> None:
    aside = path.with_name(path.name + ".corrupt")
    # Another process may have set it aside, or repaired it, in the meantime.
    if path.exists():
        os.replace(path, aside)
    warnings.warn(
        f"cache: {path} must be a JSON object, got {why}. It was renamed to {aside.name} and "
        "will be learned again.",
        RuntimeWarning,
        stacklevel=3,
    )
