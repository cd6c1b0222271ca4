"""The cuSPARSELt wheels: the one that is installed, and downloads of those the binding promises."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
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

# What libraries before 0.8 do not export.
SINCE_0_8 = {
    "cusparseLtMatmulAlgSelectionDestroy",
    "cusparseLtGetErrorName",
    "cusparseLtGetErrorString",
}


def installed() -> Distribution:
    """Return the wheel of this environment: a CUDA build of torch brings the one for its CUDA."""
    for name in ("nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12"):
        try:
            return distribution(name)
        except PackageNotFoundError:
            continue
    pytest.skip("no cuSPARSELt wheel is installed: pip install nvidia-cusparselt-cu13")


def installed_version() -> tuple[int, ...]:
    """Return (major, minor, patch) of the installed wheel."""
    return parsed(installed().version)


def parsed(version: str) -> tuple[int, ...]:
    """Return (major, minor, patch) of a version's text."""
    return tuple(int(part) for part in version.split(".")[:3])


def installed_file(name: str) -> Path:
    """Return the only file of a name in the installed wheel."""
    (found,) = [file for file in installed().files or () if file.name == name]
    return Path(str(found.locate()))


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
