"""The installation that the images run, in a fresh virtual environment, and the files around it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def install(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run install.sh with this interpreter and nothing of this process's Python settings."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        ["bash", str(DOCKER / "install.sh"), *arguments],
        env=keep | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=580,
    )


def run_in(venv: Path, *command: str) -> str:
    """Run the installed script away from the checkout, and return what it says."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(venv / "bin" / command[0]), *command[1:]],
        cwd=venv,
        env=keep | {"SDGP_CACHE_DIR": str(venv / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def fresh_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    venv = tmp_path_factory.mktemp("install") / "venv"
    done = install("--reuse", str(venv), str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    return venv


def test_the_installed_package_is_a_copy_not_the_checkout(fresh_venv: Path) -> None:
    code = "import sdgp_cusparselt as s, pycusparselt as p; print(s.__file__, p.__file__)"
    for path in run_in(fresh_venv, "python", "-c", code).split():
        assert Path(path).is_relative_to(fresh_venv)


@pytest.mark.slow
def test_the_installed_command_plans(fresh_venv: Path) -> None:
    text = run_in(fresh_venv, "sdgp", "plan", "--model", "resnet-50", "--batch", "8")
    assert "of which SDGP may take" in text


@pytest.mark.parametrize("command", ["info", "check"])
def test_the_images_own_commands_pass(fresh_venv: Path, command: str) -> None:
    if importlib.util.find_spec(f"sdgp_cusparselt.commands.{command}") is None:
        pytest.skip(f"this checkout has no sdgp {command} yet")
    run_in(fresh_venv, "sdgp", command)


@pytest.mark.slow
def test_an_environment_with_every_dependency_of_its_own(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    done = install(
        str(venv),
        str(ROOT),
        EXTRAS="train,bench",
        TORCH="torch==2.13.0",
        CONSTRAINTS=str(ROOT / "constraints.txt"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No broken requirements found" in run_in(venv, "python", "-m", "pip", "check")
    run_in(venv, "sdgp", "--version")
    run_in(venv, "sdgp", "check")
    run_in(venv, "sdgp", "info")


@pytest.mark.parametrize("arguments", [[], ["venv", "/nonexistent"], ["a", "b", "c"]])
def test_wrong_arguments_are_refused(arguments: list[str], tmp_path: Path) -> None:
    done = install(*(str(tmp_path / a) if a == "venv" else a for a in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("install.sh: ")
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_an_image_drops_root_and_pins_through_arguments(name: str) -> None:
    lines = (DOCKER / name).read_text().splitlines()
    instructions = [line for line in lines if re.match(r"[A-Z]+ ", line)]
    assert "USER ${USER_ID}" in instructions
    assert instructions[-2:] == ['ENTRYPOINT ["tini", "--"]', 'CMD ["sdgp", "check"]']
    assert "VOLUME /cache" in instructions
    assert all("${" in line for line in instructions if line.startswith("FROM "))
    assert not any("latest" in line for line in instructions)
    assert "RUN pip check && sdgp info" in instructions


def test_every_build_argument_is_documented_with_its_default() -> None:
    declared = dict(re.findall(r"^ARG (\w+)=(\S+)$", (DOCKER / "Dockerfile").read_text(), re.M))
    table = dict(
        re.findall(
            r"^\| `([A-Z_]+)` +\| `?([^`|]+?)`? +\|$", (DOCKER / "README.md").read_text(), re.M
        )
    )
    assert table == declared


def test_all_images_install_the_same_torch() -> None:
    version = re.search(r"TORCH_VERSION=(\S+)", (DOCKER / "Dockerfile").read_text())
    assert version
    assert f"TORCH_VERSION={version[1]}" in (DOCKER / "Dockerfile.cpu").read_text()
    assert f"TORCH=torch=={version[1]}" in (DOCKER / "sdgp.def").read_text()


def test_what_the_image_needs_reaches_the_build() -> None:
    kept = set(re.findall(r"^!(\S+?)(?:/\*\*)?$", (ROOT / ".dockerignore").read_text(), re.M))
    assert {"sdgp_cusparselt", "bindings", "docker", "pyproject.toml", "README.md"} <= kept
