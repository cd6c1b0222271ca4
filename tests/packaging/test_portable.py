"""The script that runs the suite on several machines poses as those that this one can."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASH = shutil.which("bash")
PYTHON = """#!/bin/sh
echo "ran ${ATEN_CPU_CAPABILITY:-free} $OMP_NUM_THREADS $*"
test "${ATEN_CPU_CAPABILITY:-free}" != "$FAILS_ON"
"""


def pose(folder: Path, *arguments: str, has_avx512: bool, fails_on: str = "") -> tuple[int, str]:
    """Run the script beside a Python that only says what it was given and a grep that decides."""
    for name, text in (("python", PYTHON), ("grep", f"#!/bin/sh\nexit {int(not has_avx512)}\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(folder / "python"),
        "FAILS_ON": fails_on,
    }
    environment.pop("MACHINES", None)
    environment.pop("ATEN_CPU_CAPABILITY", None)
    assert BASH is not None
    done = subprocess.run(
        [BASH, ROOT / ".ci/portable", *arguments],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def runs(output: str) -> list[list[str]]:
    return [line.split()[1:3] for line in output.splitlines() if line.startswith("ran ")]


pytestmark = pytest.mark.skipif(BASH is None, reason="the script is one of bash")


@pytest.mark.parametrize("has_avx512", [False, True])
def test_a_processor_poses_only_as_what_it_can_do(tmp_path: Path, has_avx512: bool) -> None:
    code, output = pose(tmp_path, "tests/some", has_avx512=has_avx512)
    widths = ["default", "avx2", *["avx512"] * has_avx512, "free"]
    assert code == 0, output
    assert runs(output) == [[width, threads] for width in widths for threads in ("1", "4")]
    assert ("avx512: left out, this processor has no AVX-512" in output) is not has_avx512
    assert output.count("tests/some") == 2 * len(widths)


def test_a_machine_that_fails_is_named_after_the_others_ran(tmp_path: Path) -> None:
    code, output = pose(tmp_path, has_avx512=False, fails_on="avx2")
    assert code == 1 and len(runs(output)) == 6
    assert "failed on: avx2/1 avx2/4" in output
