"""``sdgp info``: an environment report to paste into an issue; it never fails."""

import argparse
import json
import platform
import sys
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from sdgp_cusparselt.versions import version_of, versions

#: Optional distributions whose presence changes what runs.
OPTIONAL = (
    "nvidia-cusparselt-cu13",
    "nvidia-cusparselt-cu12",
    "cupy-cuda13x",
    "cuda-pathfinder",
    "transformers",
    "pytest-benchmark",
    "scikit-learn",
    "mlxtend",
    "matplotlib",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdgp info``."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the report and return 0, whatever is missing or broken."""
    report = collect()
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in report.items():
        table.add_row(key, str(value))
    Console(highlight=False).print(table)
    return 0


def collect() -> dict[str, str]:
    """Return the report; a probe that fails says so in its own line."""
    report: dict[str, str] = {}
    for probe in PROBES:
        try:
            report.update(probe())
        # A report on a broken environment is when it is needed most.
        except Exception as error:
            report[probe.__name__.strip("_")] = f"failed: {type(error).__name__}: {error}"
    return report


def _platform() -> dict[str, str]:
    return {"python": sys.version.split()[0], "platform": platform.platform()}


def _versions() -> dict[str, str]:
    optional = {name: version_of(name) for name in OPTIONAL}
    return versions() | {name: v for name, v in optional.items() if v != "none"}


def _devices() -> dict[str, str]:
    import torch

    report = {"torch cuda": torch.version.cuda or "none"}
    if not torch.cuda.is_available():
        return report | {"devices": "no CUDA device"}
    from sdgp_cusparselt.backends.machine import driver_version

    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        memory = p.total_memory / 2**30
        report[f"device {index}"] = f"{p.name}, sm_{p.major}{p.minor}, {memory:.0f} GiB"
    return report | {"driver": driver_version()}


def _library() -> dict[str, str]:
    import pycusparselt

    try:
        library = pycusparselt.load()
    except (pycusparselt.LibraryNotFoundError, pycusparselt.UnsupportedVersionError) as error:
        return {"cusparselt": f"not loaded: {error}"}
    return {"cusparselt": f"{library.version_text} at {library.path}"}


def _backends() -> dict[str, str]:
    import sdgp_cusparselt as sdgp

    return {
        f"backend {name}": "available" if available else f"unavailable: {reason}"
        for name, available, reason in sdgp.backend_status()
    }


def _kernels() -> dict[str, str]:
    found = version_of("triton") != "none"
    return {"pack kernels": "Triton" if found else "torch reference (Triton is not installed)"}


PROBES: tuple[Callable[[], dict[str, str]], ...] = (
    _platform,
    _versions,
    _devices,
    _library,
    _backends,
    _kernels,
)
