"""This package's version, and those of what results depend on, read without importing any of it."""

from importlib import metadata

__version__ = "0.1.0"
PACKAGES = ("torch", "triton", "numpy")


def version_of(distribution: str) -> str:
    """Return the installed version of a distribution, or "none"."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


def versions() -> dict[str, str]:
    """Return this package's version and those of torch, triton and numpy."""
    return {"sdgp_cusparselt": __version__} | {name: version_of(name) for name in PACKAGES}
