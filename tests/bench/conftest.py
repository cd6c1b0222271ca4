"""A real result file: a few CPU benchmarks, run once in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_python(
    *arguments: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run this checkout's code in a new process."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "bindings")))
    # pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=own | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="session")
def result_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the benchmarks of one tiny layer write, those without a time among them."""
    path = tmp_path_factory.mktemp("results") / "cpu" / "run.json"
    path.parent.mkdir()
    files = [f"bench/bench_{name}.py" for name in ("gemm", "parts", "grads")]
    chosen = "cpu-tiny-mlp.up and (sparse_gemm or dense_gemm or grad_input or pack-sdgp)"
    done = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen),
        f"--benchmark-json={path}",
        SDGP_CACHE_DIR=str(path.parents[1] / "cache"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path
