"""The wheel and the sdist: what is in them, and that every command runs from the wheel alone."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from sdgp_cusparselt.extras import TRAIN_PACKAGES
from sdgp_cusparselt.versions import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(built / f"sdgp_cusparselt-{__version__}-py3-none-any.whl")


def test_the_wheel_carries_recipes_typing_and_benchmarks(built: Path) -> None:
    with wheel(built) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"sdgp_cusparselt-{__version__}.dist-info/METADATA").decode()
        scripts = archive.read(f"sdgp_cusparselt-{__version__}.dist-info/entry_points.txt")
    for package in ("sdgp_cusparselt", "bindings/pycusparselt"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".toml", ".typed"):
                inside = path.relative_to(ROOT / package).as_posix()
                assert f"{Path(package).name}/{inside}" in names
    assert "sdgp_cusparselt/_bench/bench/bench_gemm.py" in names
    assert "sdgp_cusparselt/_bench/tests/emulator/src/gemm.c" in names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"sdgp_cusparselt", "pycusparselt", f"sdgp_cusparselt-{__version__}.dist-info"}
    assert not [name for name in names if "__pycache__" in name]
    assert scripts.decode().split("=")[0].split()[-1] == "sdgp"
    assert "Typing :: Typed" in metadata and "Requires-Python: >=3.10" in metadata


def test_the_sdist_builds_the_wheel_and_runs_the_tests(built: Path) -> None:
    with tarfile.open(built / f"sdgp_cusparselt-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ["pyproject.toml", "README.md", "LICENSE", "Makefile", "bench/conftest.py"]
    needed += ["tests/conftest.py", "tests/emulator/src/gemm.c", "bindings/pycusparselt/py.typed"]
    assert set(needed) <= names


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    ["info", "plan --model resnet-50", "check", "train digits --steps 2", "bench --parts machine"],
)
def test_every_command_runs_from_the_wheel_in_another_folder(
    command: str, built: Path, tmp_path: Path
) -> None:
    with wheel(built) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "else").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    environment["SDGP_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "sdgp_cusparselt", *command.split()],
        cwd=tmp_path / "else",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(ROOT) not in done.stdout.replace(sys.prefix, "")


def test_one_command_brings_what_training_needs() -> None:
    extra = [re.split("[><=; ]", text)[0] for text in PROJECT["optional-dependencies"]["train"]]
    assert sorted(extra) == sorted((*TRAIN_PACKAGES, "tomli"))


def test_what_a_plain_installation_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One line, with a command that needs no index to know this package."""
    from sdgp_cusparselt.commands.parser import main

    for module in ("sklearn", "sklearn.datasets", "matplotlib", "mlxtend", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    for command in (["train", "digits", "--out", str(tmp_path)], ["plan", "--model", "resnet-50"]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "Run: pip install " in err
        install = err.partition("Run: pip install ")[2].rstrip().split()
        assert set(install) == set(TRAIN_PACKAGES)


def test_a_release_is_tested_on_every_python_that_is_promised() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    promised = [
        name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name
    ]
    tested = re.findall(r"\"(3\.\d+)\"", text.partition("matrix:")[2].partition("steps:")[0])
    assert tested == promised
    assert "id-token: write" in text and "pypi-publish" in text and "password" not in text
