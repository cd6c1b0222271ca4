"""Start a module of this folder in two processes, as torchrun does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def in_two_processes(module: str, folder: Path, package: str = "tests.loops") -> tuple[str, Any]:
    """Run ``python -m <package>.<module> <folder>/found`` on two ranks.

    Args:
        module: name of a module that writes JSON to the file that it is given.
        folder: of this run.
        package: where the module is.

    Returns:
        What they printed, and what they found.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", f"{package}.{module}", str(folder / "found")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bindings")]),
        "SDGP_CACHE_DIR": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "found").read_text())
