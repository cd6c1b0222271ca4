"""Compile the emulator once per source state; every test process may ask for it at once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

SOURCES = Path(__file__).parent / "src"
FOLDER = Path(__file__).parents[2] / "build" / "emulator"
NAME = "libcusparseLt.so.0"
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O3", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
FLAGS += ("-fvisibility=hidden", "-pthread")
TIMEOUT_S = 120


def build(*, old_api: bool = False) -> Path:
    """Return the compiled emulator.

    Args:
        old_api: leave out the three functions that came with 0.8, as in 0.6 and 0.7.

    Returns:
        Path of a shared library that stands in for libcusparseLt.

    Raises:
        RuntimeError: there is no C compiler (``CC``, cc), or it fails; its output is included.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RuntimeError("build: CC must be a C compiler, got none. Install gcc or set CC")
    flags = (*FLAGS, "-DEMU_OLD_API") if old_api else FLAGS
    sources = sorted(SOURCES.glob("*.[ch]"))
    key = hashlib.sha256(repr((compiler, flags)).encode())
    for source in sources:
        key.update(source.read_bytes())
    folder = FOLDER / key.hexdigest()[:16]
    target = folder / NAME
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not target.exists():
            _compile([compiler, *flags, *(str(s) for s in sources if s.suffix == ".c")], target)
    return target


def _compile(command: list[str], target: Path) -> None:
    # Renamed into place, so that a killed compiler leaves no half library behind.
    partial = target.with_suffix(".partial")
    finished = subprocess.run(
        [*command, "-o", str(partial), "-lm"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"build: {command[0]} failed:\n{finished.stderr}")
    partial.rename(target)
