"""Whether float16 can be trusted on a device: asked of a process of its own, once per machine.

cuSPARSELt 0.8.1 has raised an illegal instruction on H100 for float16, where bfloat16 works, and
that ends the CUDA context of the process.
"""

import os
import subprocess
import sys

import torch

from sdgp_cusparselt import cache
from sdgp_cusparselt.backends.machine import Machine

TIMEOUT_S = 180
_FILE = "selftest-float16.json"


def float16_fault(machine: Machine, device: torch.device) -> str | None:
    """Return why float16 cannot be used on a device, or None; tested once per machine key.

    Args:
        machine: library and devices.
        device: the one to test.

    Returns:
        The last line that the test printed, or None where every product was right.
    """
    key = " ".join(f"{name}={value}" for name, value in sorted(machine.key(device).items()))
    path = cache.cache_dir() / _FILE
    known = cache.load(path) or {}
    if key not in known:
        fault = _run(machine, device)
        known = cache.update(path, lambda old: {**old, key: fault})
    found = known[key]
    return None if found is None else str(found)


def _run(machine: Machine, device: torch.device) -> str | None:
    environment = os.environ | {
        "CUSPARSELT_LIBRARY": machine.library().path,
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
    }
    command = [sys.executable, "-m", "sdgp_cusparselt.backends.selftest", "--device", str(device)]
    try:
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"it did not end within {TIMEOUT_S} s"
    if finished.returncode == 0:
        return None
    lines = (finished.stdout + finished.stderr).strip().splitlines()
    return lines[-1][:300] if lines else f"it ended with status {finished.returncode}"
