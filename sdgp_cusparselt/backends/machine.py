"""What the cuSPARSELt backend runs on: devices, the library, and why not."""

import platform
import re
import subprocess
from pathlib import Path

import pycusparselt as cslt
import torch
from pycusparselt.loader import Library

from sdgp_cusparselt.versions import versions

OLDEST_CAPABILITY = (8, 0)


class Machine:
    """The CUDA devices of this machine and one libcusparseLt.

    Args:
        device_type: "cuda"; tests run the same path on "cpu" against a stand-in library.
        library: an opened library; found and opened on first use if None.
        cpu_capability: what a CPU pretends to be, for the rules that depend on it.
    """

    def __init__(
        self,
        device_type: str = "cuda",
        library: Library | None = None,
        cpu_capability: tuple[int, int] = (8, 0),
    ) -> None:
        self.device_type = device_type
        self.cpu_capability = cpu_capability
        self._library = library
        self._software: list[str] | None = None

    def library(self) -> Library:
        """Return the library, opening it the first time.

        Raises:
            LibraryNotFoundError: there is none; the message has the pip command.
            UnsupportedVersionError: its version is outside the tested range.
        """
        if self._library is None:
            self._library = cslt.load()
        return self._library

    def reasons(self, device: torch.device | None = None) -> list[str]:
        """Return why ``device`` cannot run a sparse product; empty if it can.

        Args:
            device: where the tensors are; if None, the best device of this machine.
        """
        return self.hardware_reasons(device) or self.software_reasons()

    def hardware_reasons(self, device: torch.device | None = None) -> list[str]:
        """Return why ``device``, or every device of this machine, has no sparse tensor cores."""
        if device is not None and device.type != self.device_type:
            absent = self.hardware_reasons()
            return absent or [f"the tensors are on {device.type}, not on {self.device_type}"]
        if self.device_type != "cuda":
            return []
        if not torch.cuda.is_available():
            return ["torch sees no CUDA device"]
        if torch.version.hip is not None:
            return ["this is a ROCm build of torch"]
        devices = range(torch.cuda.device_count()) if device is None else [device]
        best = max(torch.cuda.get_device_capability(one) for one in devices)
        if best < OLDEST_CAPABILITY:
            return [f"compute capability is {best[0]}.{best[1]}, sparse tensor cores need 8.0"]
        return []

    def software_reasons(self) -> list[str]:
        """Return what is not installed that a sparse product needs; found out once."""
        if self._software is None:
            self._software = [*self._library_reasons(), *self._triton_reasons()]
        return self._software

    def _library_reasons(self) -> list[str]:
        try:
            self.library()
        except (cslt.LibraryNotFoundError, cslt.UnsupportedVersionError) as error:
            return [str(error)]
        return []

    def _triton_reasons(self) -> list[str]:
        """Return why no pack kernel can be compiled: plain torch takes 20 times as long."""
        if self.device_type != "cuda":
            return []
        fault = compiler_fault()
        return [] if fault is None else [f"no pack kernel can be compiled: {fault}"]

    def capability(self, device: torch.device) -> tuple[int, int]:
        """Return the compute capability of a device."""
        if device.type != "cuda":
            return self.cpu_capability
        return torch.cuda.get_device_capability(device)

    def key(self, device: torch.device) -> dict[str, str]:
        """Return what a measurement on ``device`` depends on."""
        major, minor = self.capability(device)
        cuda = device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
            "capability": f"{major}.{minor}",
            "driver": driver_version() if cuda else "none",
            "cusparselt": self.library().version_text,
            **versions(),
        }


def compiler_fault() -> str | None:
    """Return why Triton cannot start a kernel here, or None.

    Its driver is built by the C compiler of the machine when it is first asked for. A container
    without one would raise in the middle of a backward pass.
    """
    try:
        from triton.runtime import driver

        driver.active.utils  # noqa: B018
    except ImportError:
        return "Triton cannot be imported; pip install triton"
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"{line}; install gcc, or set CC"
    return None


def driver_version() -> str:
    """Return the NVIDIA kernel driver's version, or "unknown"."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"Module\s+([\d.]+)", path.read_text()) if path.exists() else None
    return found.group(1) if found else "unknown"
