"""The example runs as it stands: here on the emulator, and on a GPU against the library."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator.build import build

ROOT = Path(__file__).parents[2]


def error_of(environment: dict[str, str]) -> float:
    finished = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "raw_matmul.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "bindings"), **environment},
        timeout=120,
        check=True,
    )
    found = re.search(r"element: (\S+)", finished.stdout)
    assert found is not None, finished.stdout
    return float(found.group(1))


def test_on_the_emulator() -> None:
    # Half a unit of bf16, relative to the largest element, and the fp32 sum of 512 products.
    assert 0 < error_of({"CUSPARSELT_LIBRARY": str(build()), "CUDA_VISIBLE_DEVICES": ""}) < 2.0**-8


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    assert 0 < error_of({}) < 2.0**-8
