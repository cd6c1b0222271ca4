"""Importing does nothing: no CUDA, no library loaded, no compiler, no output."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = """
import sys
def mapped():
    maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
    return {{line.split(maxsplit=5)[5] for line in maps.splitlines() if "cusparseLt" in line}}
if "{package}" != "pycusparselt":
    import torch  # whose CUDA builds are linked with a libcusparseLt
maps_before, modules_before = mapped(), set(sys.modules)
import {package}
heavy = {{"triton", "cupy", "transformers", "matplotlib", "sklearn", "mlxtend"}} & set(sys.modules)
assert heavy <= modules_before, heavy
assert mapped() == maps_before
if "torch" in sys.modules:
    import torch
    assert not torch.cuda.is_initialized()
else:
    assert "{package}" == "pycusparselt"
"""


@pytest.mark.parametrize(
    "package", ["sdgp_cusparselt", "pycusparselt", "sdgp_cusparselt.commands.parser"]
)
def test_import_has_no_side_effect(package: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROBE.format(package=package)],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'bindings'}", "PATH": ""},
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and result.stderr == ""
