"""sdgp bench as a user runs it, on a machine without a GPU."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sdgp_cusparselt.commands.bench import PARTS, result_path
from sdgp_cusparselt.commands.parser import main
from tests.bench.conftest import ROOT, run_python

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU sdgp bench measures the GPU, for minutes"
)


def test_it_measures_says_where_and_writes(tmp_path: Path) -> None:
    # As where pytest-timeout, whose setting stands in pyproject.toml, is not installed.
    code = "import os, sys; os.environ['PYTEST_ADDOPTS'] = '-p no:timeout'; "
    code += "from sdgp_cusparselt.commands.parser import main; sys.exit(main(sys.argv[1:]))"
    arguments = ("bench", "--parts", "machine", "--output", str(tmp_path), "--json", "-")
    done = run_python("-c", code, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No CUDA device" in done.stderr
    printed = json.loads(done.stdout)
    (written,) = (tmp_path / "cpu").glob("*.json")
    assert printed["file"] == str(written)
    version = torch.__version__.partition("+")[0]
    assert f"-pt{version}-cslt" in written.name
    data = json.loads(written.read_text())
    assert data["command"].startswith("sdgp bench --parts machine")
    assert {b["extra_info"]["part"] for b in data["benchmarks"]} == {"ceiling"}


def test_nothing_starts_after_the_time_limit(tmp_path: Path) -> None:
    done = run_python(
        *("-m", "sdgp_cusparselt", "bench", "--parts", "machine"),
        *("--time-limit", "0.000001", "--output", str(tmp_path)),
    )
    assert done.returncode == 1
    assert "the time limit of 1e-06 s was reached" in done.stderr
    assert "nothing was measured" in done.stderr


def test_without_a_checkout_it_says_so(tmp_path: Path) -> None:
    """As from a copy of the packages alone."""
    for package in ("sdgp_cusparselt", "bindings/pycusparselt"):
        shutil.copytree(ROOT / package, tmp_path / Path(package).name)
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.path.remove({str(ROOT)!r});"
        "from sdgp_cusparselt.commands.parser import main; sys.exit(main(['bench']))"
    )
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "a checkout of the sources with its bench folder" in done.stderr
    assert "Clone the repository" in done.stderr


@pytest.mark.parametrize("parts", ["nothing", ",", "gemm,layer"])
def test_unknown_parts_are_refused(parts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--parts", parts]) == 2
    assert "--parts must be some of machine, gemm" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, words",
    [("--models=resnet", "--models must be some of"), ("--tokens=4k", "--tokens must be such as")],
)
def test_unknown_models_and_tokens_are_refused(option: str, words: str, tmp_path: Path) -> None:
    command = ("-m", "sdgp_cusparselt", "bench", "--parts", "machine", "--output", str(tmp_path))
    done = run_python(*command, option)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"sdgp bench: {words}"), done.stderr


def test_a_cpu_leaves_the_cache_of_the_user_alone(result_file: Path) -> None:
    """Layouts were learned for those numbers, on the emulator."""
    assert not (result_file.parents[1] / "cache").exists()


def test_results_never_overwrite_each_other(tmp_path: Path) -> None:
    first = result_path(tmp_path, "2026-01-01", "0.8.1")
    first.write_text("{}")
    second = result_path(tmp_path, "2026-01-01", "0.8.1")
    assert second.name == f"{first.stem}-2.json"


def test_every_part_has_its_file() -> None:
    assert all((ROOT / "bench" / name).is_file() for name in PARTS.values())
