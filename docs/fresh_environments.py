"""Run README's commands, in order, in a fresh environment per extra, and write down each verdict.

python docs/fresh_environments.py [EXTRA ...] [--torch torch==2.13.0] [--write] [--folder FOLDER]

The commands are copied from README.md: the line that installs, with the extra put in; then every
block of the page that the tests run; then every row of the table of commands, which either works or
says in one line what to add. ``plain`` names the installation without an extra, where the advice on
what to add is taken as well. ``--write`` puts the verdicts into docs/troubleshooting.md; rows of
extras that were not run stay. Environments are removed: 2 GB and a minute or more each.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- written by docs/fresh_environments.py -->", "<!-- end of written -->"
HEAD = """\
| installed | packages | README's blocks | works at once | says what to add |
|---|--:|---|---|---|"""
PLAIN = "plain"
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALL = re.compile(r"^pip install -c constraints\.txt -e \.(?= |$)", re.MULTILINE)
#: Command of README's table -> what makes it short. tune needs a GPU and says so.
SHORT = {
    "info": "",
    "train": "digits --methods dense,mvue --steps 2 --quiet",
    "plan": "--model resnet-50 --quiet",
    "tune": "--model transformers:gpt2",
    "bench": "--parts machine --quiet",
    "check": "--quiet",
    "quality": "digits --steps 2 --batches 2 --quiet",
}


@dataclass(frozen=True)
class Verdict:
    """What one environment brought and did."""

    extra: str
    packages: int
    blocks: int
    works: tuple[str, ...]
    advises: tuple[str, ...]

    def row(self) -> str:
        """Return the line of the table."""
        name = "`.`" if self.extra == PLAIN else f"`.[{self.extra}]`"
        cells = (self.works, self.advises)
        said = [", ".join(f"`{name}`" for name in names) or "none" for names in cells]
        return f"| {name} | {self.packages} | all {self.blocks} ran | {said[0]} | {said[1]} |"


def main(arguments: list[str] | None = None) -> int:
    """Try the extras that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"{PLAIN}, train, ...")
    parser.add_argument("--torch", default="torch==2.13.0", help="installed first")
    parser.add_argument("--write", action="store_true", help=f"write into {PAGE.name}")
    parser.add_argument("--folder", type=Path, help="where environments are made")
    options = parser.parse_args(arguments)
    known = extras()
    if unknown := set(options.extras) - set(known):
        parser.error(f"EXTRA must be of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        place = Path(folder)
        torch_alone(options.torch, place)
        for extra in options.extras or known:
            verdict = try_extra(extra, place)
            print(verdict.row(), flush=True)
            if options.write:
                page = with_row(PAGE.read_text(encoding="utf-8"), verdict)
                PAGE.write_text(page, encoding="utf-8")
    return 0


def extras() -> list[str]:
    """Return ``plain`` and every extra of pyproject.toml, in its order."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return [PLAIN, *re.findall(r"^(\w+) = \[", table, re.MULTILINE)]


def install_line(readme: str, extra: str) -> str:
    """Return README's command that installs from a clone, with the extra put in.

    Raises:
        ValueError: the page has no such line any more.
    """
    found = INSTALL.search(readme)
    if found is None:
        raise ValueError(f"install_line: readme must have a line {INSTALL.pattern}, got none.")
    return found[0] if extra == PLAIN else f"{found[0][:-1]}'.[{extra}]'"


def blocks(readme: str) -> list[tuple[str, str]]:
    """Return language and source of the blocks that the tests of the page run, in order."""
    found = [match.groups() for match in FENCE.finditer(readme)]
    runs = ("python", "sh", "bash")
    return [(name, source) for name, info, source in found if name in runs and not info.strip()]


def commands(readme: str) -> list[str]:
    """Return the names of README's table of commands."""
    return re.findall(r"^\| `sdgp (\w+)` \|", readme, re.MULTILINE)


def advice(readme: str) -> list[str]:
    """Return the commands that README names for what the plain installation lacks."""
    return re.findall(r"`(pip install [a-z][^`\[]+)`", readme)


def torch_alone(torch: str, folder: Path) -> None:
    """Make the environment that every extra starts from: pip and torch, as README asks."""
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    Runs(folder).shell(f"pip install --quiet {torch}", cwd=ROOT)
    venv.rename(folder / "torch")


def try_extra(extra: str, folder: Path) -> Verdict:
    """Run README's commands in an environment that has torch alone.

    Args:
        extra: of pyproject.toml, or ``plain``.
        folder: where ``torch_alone`` was.

    Raises:
        RuntimeError: a command neither worked nor said in one line what to add.
    """
    readme = README.read_text(encoding="utf-8")
    clone = folder / "clone"
    for name in ("venv", "work", "cache", "clone"):
        shutil.rmtree(folder / name, ignore_errors=True)
    # pip writes files anew where it changes any, so links to torch's are enough. The environment
    # lies where it was made: its scripts name that place.
    shutil.copytree(folder / "torch", folder / "venv", symlinks=True, copy_function=os.link)
    shutil.copytree(ROOT, clone, ignore=left_out, symlinks=True)
    runs = Runs(folder)
    runs.shell(install_line(readme, extra).replace("install", "install --quiet", 1), cwd=clone)
    listed = runs.shell("pip list --format json", cwd=clone)
    for language, source in blocks(readme):
        runs.shell(f"python - <<'END'\n{source}END" if language == "python" else source)
    works, advises = [], []
    for name in commands(readme):
        (works if runs.command(name) else advises).append(name)
    if extra == PLAIN:
        for line in advice(readme):
            runs.shell(line.replace("install", f"install --quiet -c {clone}/constraints.txt", 1))
        if still := [name for name in advises if name != "tune" and not runs.command(name)]:
            raise RuntimeError(f"try_extra: README's advice must be enough, got none for {still}")
    count = len(json.loads(listed))
    return Verdict(extra, count, len(blocks(readme)), tuple(works), tuple(advises))


def left_out(folder: str, names: list[str]) -> set[str]:
    """Return what of a checkout is no part of a clone."""
    kept = {".ci", ".github", ".dockerignore", ".gitignore", ".pre-commit-config.yaml"}
    heavy = {"build", "dist", "site", "runs", "shared", "__pycache__"}
    return {n for n in names if n in heavy or (n.startswith(".") and n not in kept)}


class Runs:
    """Commands in one environment, in a folder that is no checkout."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.work.mkdir(exist_ok=True)
        # Settings of this process's Python are not the new one's; pip's, such as an index, are.
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self.environment = keep | {
            "PATH": os.pathsep.join([str(folder / "venv" / "bin"), os.environ["PATH"]]),
            "SDGP_CACHE_DIR": str(folder / "cache"),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            # Python compiles what it imports; pip would compile all of torch.
            "PIP_NO_COMPILE": "1",
            "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "agg",
        }

    def run(self, line: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=cwd or self.work,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=3600,
        )

    def shell(self, line: str, cwd: Path | None = None) -> str:
        """Run a line that must succeed and return what it prints."""
        done = self.run(line, cwd)
        if done.returncode:
            raise RuntimeError(f"shell: {line} must exit 0, got {done.returncode}: {done.stderr}")
        return done.stdout

    def command(self, name: str) -> bool:
        """Return whether ``sdgp name`` works; False if it says in one line why not."""
        done = self.run(f"sdgp {name} {SHORT[name]}")
        said = done.stderr.strip().splitlines()
        if done.returncode == 0:
            return True
        one_line = done.returncode == 2 and said and said[-1].startswith(f"sdgp {name}: ")
        if one_line and ("Run: pip install" in said[-1] or name == "tune"):
            return False
        raise RuntimeError(
            f"command: sdgp {name} must work or say what to add, got {done.returncode}: "
            f"{done.stdout}{done.stderr}"
        )


def with_row(page: str, verdict: Verdict) -> str:
    """Return the page with this extra's row made anew, rows in the order of pyproject.toml.

    Raises:
        ValueError: the page lacks one of the two markers.
    """
    head, begin, rest = page.partition(BEGIN)
    table, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"with_row: page must hold {BEGIN} and then {END}, got neither.")
    new = verdict.row()
    rows = {row_name(row): row for row in table.splitlines() if row.startswith("| `.")}
    rows[row_name(new)] = new
    order = ["." if extra == PLAIN else f".[{extra}]" for extra in extras()]
    lines = [HEAD, *(rows.get(name, f"| `{name}` | | not run yet | | |") for name in order)]
    return "\n".join([head + begin, "", *lines, "", end + tail])


def row_name(row: str) -> str:
    """Return what a row says was installed."""
    return row.split("`")[1]


if __name__ == "__main__":
    sys.exit(main())
