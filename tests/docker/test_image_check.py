"""docker/image-check with stand-ins for buildah and mmdebstrap: what it builds and what it runs."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docker" / "image-check"
FILES = {"cuda": "Dockerfile", "cpu": "Dockerfile.cpu"}
#: Knows the images that it built, and says of every Python that it is $PYTHON_THERE.
BUILDAH = """#!/usr/bin/env bash
echo "buildah $*" >>"$LOG"
case "$1" in
  inspect) grep -qxF -- "${@: -1}" "$LOG.images" 2>/dev/null ;;
  bud)
    while (($#)); do
      [[ "$1" == --tag ]] && echo "$2" >>"$LOG.images"
      shift
    done
    ;;
  from) echo "container-of-${@: -1}" ;;
  images) echo "1.5 GB" ;;
  run)
    [[ "$*" == *"import sys"* ]] && echo "$PYTHON_THERE"
    [[ "$*" == *" python -" ]] && cat >/dev/null
    [[ -z "${FAIL:-}" || "$*" != *"$FAIL"* ]]
    ;;
esac
"""
MMDEBSTRAP = """#!/usr/bin/env bash
echo "mmdebstrap $*" >>"$LOG"
for word in "$@"; do [[ "$word" == *.tar ]] && touch "$word"; done
exit 0
"""


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, str]:
    """Return an environment whose PATH has the stand-ins first."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"buildah": BUILDAH, "mmdebstrap": MMDEBSTRAP}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return {
        "PATH": f"{commands}:/usr/bin:/bin",
        "LOG": str(tmp_path / "log"),
        "WORK": str(tmp_path / "work"),
        "PYTHON_THERE": argument("Dockerfile", "PYTHON_VERSION"),
    }


def argument(file: str, name: str) -> str:
    found = re.search(rf"^ARG {name}=(\S+)$", (ROOT / "docker" / file).read_text(), re.MULTILINE)
    assert found, (file, name)
    return found[1]


def check(*names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *names], env=environment, capture_output=True, text=True, timeout=120
    )


def calls(tools: dict[str, str]) -> list[str]:
    return Path(tools["LOG"]).read_text().splitlines()


@pytest.mark.parametrize("name", FILES)
def test_the_base_bears_the_name_that_the_dockerfile_asks_for(
    name: str, tools: dict[str, str]
) -> None:
    done = check(name, **tools)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (ROOT / "docker" / FILES[name]).read_text()
    python, release = (
        argument(FILES[name], "PYTHON_VERSION"),
        argument(FILES[name], "DEBIAN_RELEASE"),
    )
    asked = re.search(r"^FROM (\S+)$", text, re.MULTILINE)
    assert asked
    base = asked[1].replace("${PYTHON_VERSION}", python).replace("${DEBIAN_RELEASE}", release)
    built = [call for call in calls(tools) if call.startswith("buildah bud ")]
    assert f"--tag localhost/{base} " in built[0]
    assert any(f" {release} " in call for call in calls(tools) if call.startswith("mmdebstrap"))
    # The Dockerfile as it is, with the defaults that it has.
    assert f"--file {ROOT}/docker/{FILES[name]} " in built[1]
    for known in ("PYTHON_VERSION", "DEBIAN_RELEASE", "TORCH_VERSION", "TORCH_INDEX"):
        assert f"--build-arg {known}={argument(FILES[name], known)} " in built[1]
    assert "--pull-never" in built[1] and len(built) == 2


@pytest.mark.parametrize("name", FILES)
def test_every_command_of_the_image_runs_behind_its_entry_point(
    name: str, tools: dict[str, str]
) -> None:
    done = check(name, **tools)
    ran = [call.partition(" -- tini -s -- ")[2] for call in calls(tools) if " -- tini " in call]
    text = (ROOT / "docker" / FILES[name]).read_text()
    assert 'ENTRYPOINT ["tini", "--"]' in text
    default = re.findall(r'^CMD \["(\w+)", "(\w+)"\]$', text, re.MULTILINE)
    assert ran[0] == " ".join(default[0]) == "sdgp check"
    assert ran[1].startswith("sdgp train digits") and "pip check" in ran
    assert ("python -" in ran) == (name == "cuda"), "Triton's compiler, where there is one"
    assert f"== sdgp:{name} 1.5 GB" in done.stdout


def test_both_images_are_checked_by_default_on_one_base(tools: dict[str, str]) -> None:
    assert check(**tools).returncode == 0
    assert sum(call.startswith("mmdebstrap") for call in calls(tools)) == 1
    assert sum(" --file " in call for call in calls(tools)) == 2


def test_a_setting_may_be_of_one_image_alone(tools: dict[str, str]) -> None:
    own = {"CPU_TORCH_VERSION": "2.8.0", "TORCH_VERSION": "2.9.0", "CUDA_TORCH_INDEX": "http://own"}
    assert check(**tools, **own).returncode == 0
    cuda, cpu = [call for call in calls(tools) if " --file " in call]
    assert "--build-arg TORCH_VERSION=2.9.0 --build-arg TORCH_INDEX=http://own " in cuda
    index = argument("Dockerfile.cpu", "TORCH_INDEX")
    assert f"--build-arg TORCH_VERSION=2.8.0 --build-arg TORCH_INDEX={index} " in cpu


def test_what_was_made_is_removed(tools: dict[str, str]) -> None:
    assert check("cpu", **tools).returncode == 0
    assert not Path(tools["WORK"]).exists()
    assert check("cpu", **tools, KEEP="1").returncode == 0
    assert Path(tools["WORK"]).exists()


@pytest.mark.parametrize("wrong", ["sdgp check", "sdgp train", "pip check"])
def test_a_command_that_fails_fails_the_check(wrong: str, tools: dict[str, str]) -> None:
    done = check("cpu", **tools, FAIL=f"-- {wrong}")
    assert done.returncode != 0 and "built and run" not in done.stdout
    assert not Path(tools["WORK"]).exists()


def test_another_python_than_debians_is_refused(tools: dict[str, str]) -> None:
    done = check("cpu", **(tools | {"PYTHON_THERE": "3.12"}))
    assert done.returncode == 2
    assert "is 3.12; give PYTHON_VERSION=3.12 or another DEBIAN_RELEASE" in done.stderr
    assert not any(" --file " in call for call in calls(tools))


def test_wheels_of_this_machine_are_mounted_and_not_copied(
    tools: dict[str, str], tmp_path: Path
) -> None:
    assert check("cpu", **tools, WHEELS=str(tmp_path)).returncode == 0
    build = next(call for call in calls(tools) if " --file " in call)
    assert f"--volume {tmp_path}:/wheels:ro" in build


@pytest.mark.parametrize(
    "names, settings, words",
    [
        (("gpu",), {}, "images are cuda and cpu, got gpu"),
        (("cpu",), {"WHEELS": "/nonexistent"}, "WHEELS must be a folder, got /nonexistent"),
        (("cpu",), {"PATH": "/usr/bin:/bin", "HIDE": "1"}, "Run: apt-get install buildah"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_built(
    names: tuple[str, ...], settings: dict[str, str], words: str, tools: dict[str, str]
) -> None:
    if settings.pop("HIDE", None):
        # Only what the script needs before it looks for its tools.
        bare = Path(tools["LOG"]).parent / "bare"
        bare.mkdir()
        for name in ("bash", "dirname"):
            os.symlink(f"/usr/bin/{name}", bare / name)
        settings["PATH"] = str(bare)
    done = check(*names, **(tools | settings))
    assert done.returncode == 2 and done.stderr.startswith("image-check: ")
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert not Path(tools["LOG"]).exists(), "nothing was called, nothing installed"
