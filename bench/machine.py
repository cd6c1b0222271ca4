"""Conditions of a run, for the result file: the card, its clocks and limits, and every version."""

import platform
from pathlib import Path
from typing import Any

import pycusparselt as cslt
import torch

from sdgp_cusparselt.backends.machine import driver_version
from sdgp_cusparselt.versions import version_of, versions

#: Layers and the dispatcher tune a shape when they first meet it, in the untimed first call.
TUNE = "first_use"


def conditions() -> dict[str, Any]:
    """Return what the numbers depend on; a part that cannot be read says why."""
    version, path = library()
    found: dict[str, Any] = {
        **versions(),
        "cuda": torch.version.cuda or "none",
        "cusparselt": version,
        "cusparselt_path": path,
        "transformers": version_of("transformers"),
        "xformers": version_of("xformers"),
        "tune": TUNE,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "driver": driver_version(),
            **_nvml(),
        }
    return found


def folder_name() -> str:
    """Return the name of this machine's result folder, such as NVIDIA-A100-SXM4-80GB, or cpu."""
    if not torch.cuda.is_available():
        return "cpu"
    return "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(0)).strip("-")


def library() -> tuple[str, str]:
    """Return version and path of the library; ("none", why) where there is none.

    The path starts at the package that brought the file: the rest belongs to the machine.
    """
    try:
        found = cslt.load()
    except (cslt.LibraryNotFoundError, cslt.UnsupportedVersionError) as error:
        return "none", str(error).splitlines()[0]
    return found.version_text, "/".join(Path(found.path).parts[-4:])


def public(machine_info: dict[str, Any]) -> None:
    """Take the host's name out of pytest-benchmark's own part, because results are published."""
    machine_info.pop("node", None)
    machine_info["platform"] = platform.machine()


def _nvml() -> dict[str, Any]:
    """Return clocks and power limit as the driver reports them."""
    try:
        import pynvml
    except ImportError:
        return {"nvml": "nvidia-ml-py is not installed: no clocks, no power limit"}
    try:
        pynvml.nvmlInit()
        try:
            return _read_nvml(pynvml)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return {"nvml": f"unreadable: {error}"}


def _read_nvml(nvml: Any) -> dict[str, Any]:
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    if uuid is not None:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
    readings = {
        "driver": lambda: _text(nvml.nvmlSystemGetDriverVersion()),
        "power_limit_w": lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3,
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "sm_clock_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
    }
    found: dict[str, Any] = {}
    for name, read in readings.items():
        try:
            found[name] = read()
        except nvml.NVMLError as error:
            found[name] = f"unreadable: {error}"
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
