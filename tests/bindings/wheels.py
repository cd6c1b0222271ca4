"""Download the wheels that the binding promises to fit, and unpack them, once."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from filelock import FileLock

FOLDER = Path(__file__).parents[2] / "build" / "wheels"
TIMEOUT_S = 900

# distribution, version, sizeof of the five structs, exported functions, declared alignment
CUSPARSELT = (
    ("nvidia-cusparselt-cu12", "0.6.2", 13072, 28, 1),
    ("nvidia-cusparselt-cu12", "0.6.3", 13072, 28, 1),
    ("nvidia-cusparselt-cu12", "0.7.1", 1024, 28, 1),
    ("nvidia-cusparselt-cu12", "0.8.1", 512, 31, 16),
    ("nvidia-cusparselt-cu13", "0.8.0", 512, 31, 16),
    ("nvidia-cusparselt-cu13", "0.9.1", 512, 31, 16),
    ("nvidia-cusparselt-cu13", "0.10.0", 512, 31, 16),
)


def fetch(distribution: str, version: str) -> Path:
    """Return the folder of an unpacked wheel, downloading it with pip the first time."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    target = FOLDER / f"{distribution}-{version}"
    with FileLock(f"{target}.lock"):
        if not target.exists():
            wheel = _wheel(distribution, version)
            partial = target.with_name(f"{target.name}.partial")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(partial)
            partial.rename(target)
    return target


def _wheel(distribution: str, version: str) -> Path:
    pattern = f"{distribution.replace('-', '_')}-{version}-*.whl"
    if not list(FOLDER.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(FOLDER)]
        command += ["--only-binary", ":all:", f"{distribution}=={version}"]
        subprocess.run(command, check=True, timeout=TIMEOUT_S)
    (found,) = FOLDER.glob(pattern)
    return found


def one_file(folder: Path, name: str) -> Path:
    """Return the only file of a name below a folder."""
    (found,) = folder.rglob(name)
    return found
