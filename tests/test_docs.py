"""Every code block of the documentation runs, its generated parts are current, its links resolve.

A fence whose info says ``no-run: reason`` is left out; one without a reason is an error. A file's
blocks run in order, in one process and one empty folder; its python blocks share a namespace. In a
console block, lines after ``$`` are commands, and the other lines must occur in their output.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import sdgp_cusparselt as sdgp

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docker" / "README.md"]
#: Made from docstrings, docker/README.md and a notebook, and tested there.
MADE = ("api.md", "internals.md", "docker.md", "first-steps.md")
PAGES = [page for page in PAGES if page.name not in MADE]
HINT = "run: python docs/generate.py"
RUNNABLE = ("python", "sh", "bash", "console")
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Runs in the subprocess: blocks arrive as (line, language, source) on stdin.
DRIVER = r"""
import json, subprocess, sys
namespace = {"__name__": "__main__"}
for line, language, source in json.load(sys.stdin):
    print(f"--- block at line {line} ({language})", flush=True)
    if language == "python":
        exec(compile("\n" * (line) + source, sys.argv[1], "exec"), namespace)
        continue
    shown = []
    if language == "console":
        lines = source.splitlines()
        shown = [text.strip() for text in lines if text.strip() and not text.startswith("$ ")]
        source = "\n".join(text[2:] for text in lines if text.startswith("$ "))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", source], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )
    print(done.stdout, flush=True)
    missing = [text for text in shown if text != "..." and text not in done.stdout]
    if done.returncode or missing:
        sys.exit(f"block at line {line}: exit {done.returncode}, not printed: {missing}")
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its first line in the file, language, fence info and source."""

    line: int
    language: str
    info: str
    source: str

    @property
    def skipped(self) -> bool:
        return self.info.startswith("no-run")


def blocks(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        language, info, source = match.groups()
        line = text[: match.start()].count("\n") + 1
        found.append(Block(line, language, info.strip(), source))
    return [block for block in found if block.language in RUNNABLE]


def run_blocks(page: Path, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the blocks of one page; ``sdgp`` is this checkout, whatever is installed."""
    commands = folder / "bin"
    commands.mkdir()
    script = commands / "sdgp"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sdgp_cusparselt "$@"\n')
    script.chmod(0o755)
    work = folder / "work"
    work.mkdir()
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {
        "PATH": path,
        "PYTHONPATH": os.pathsep.join([".", str(ROOT), str(ROOT / "bindings")]),
        "SDGP_CACHE_DIR": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
    }
    todo = [(b.line, b.language, b.source) for b in blocks(text) if not b.skipped]
    return subprocess.run(
        [sys.executable, "-c", DRIVER, str(page)],
        input=json.dumps(todo),
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def load_generator(name: str = "generate") -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    done = run_blocks(page, text, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_block_that_does_not_run_says_why(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.info:
            assert re.fullmatch(r"no-run: \S.+", block.info), f"{page}:{block.line}: {block.info}"


@pytest.mark.parametrize(
    "text, words",
    [
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", "AssertionError"),
        ("```sh\nfalse | true\n```\n", "exit 1"),
        ("```console\n$ echo one\ntwo\n```\n", "not printed: ['two']"),
        ("```sh\nsdgp no-such-command\n```\n", "exit 2"),
    ],
)
def test_a_wrong_block_fails(text: str, words: str, tmp_path: Path) -> None:
    done = run_blocks(ROOT / "README.md", text, tmp_path)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr


def test_right_blocks_pass_and_share_their_names_and_folder(tmp_path: Path) -> None:
    text = (
        "```python\nx = 1\nopen('f', 'w').write('seven')\n```\n\n"
        "```python\nassert x == 1\n```\n\n"
        "```console\n$ cat f\nseven\n```\n\n"
        "```sh no-run: would fail\nfalse\n```\n"
    )
    done = run_blocks(ROOT / "README.md", text, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_measured_tables_are_what_the_result_files_say() -> None:
    module = load_generator("accuracy")
    found = []
    for page in module.PAGES:
        text = page.read_text(encoding="utf-8")
        assert module.with_tables(text) == text, "run: python docs/accuracy.py"
        bare = module.BLOCK.sub(r"<!-- \1: \2 -->\n", text)
        assert len(bare) < len(text) and module.with_tables(bare) == text
        found += module.BLOCK.findall(text)
    assert {kind for kind, _ in found} & set(module.TABLES) == set(module.TABLES)


def test_a_table_has_the_methods_that_its_marker_names_in_that_order() -> None:
    module = load_generator("accuracy")
    methods = "readers:mvue@2:4 dense"
    table = module.with_tables(f"<!-- accuracy: {methods} docs/results/code-lm-presets.json -->\n")
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows == ["method", "---", "readers: mvue 2:4", "dense"]
    with pytest.raises(ValueError, match=r"methods must be of dense, .* got \['no-such'\]"):
        module.with_tables("<!-- accuracy: no-such docs/results/code-lm-presets.json -->\n")


def test_predictions_in_the_docs_are_what_the_planner_says() -> None:
    module = load_generator()
    pages = module.predicted_pages()
    assert {page.name for page in pages} == {"README.md", "when-is-it-faster.md"}
    for page, made in pages.items():
        text = page.read_text(encoding="utf-8")
        assert_predictions_agree(text, module.with_predictions(text, made))


def assert_predictions_agree(text: str, fresh: str) -> None:
    number = re.compile(r"\d+(?:\.\d+)?")
    assert number.sub("#", fresh).split() == number.sub("#", text).split(), HINT
    # Norms and activations are traced as the installed transformers writes them, which moves a
    # speedup (three decimals) or a percentage (one) a little; everything else is exact.
    slack = {1: 0.3, 3: 0.005}
    for there, now in zip(number.findall(text), number.findall(fresh), strict=True):
        allowed = slack.get(len(there.partition(".")[2]), 0.0)
        assert abs(float(there) - float(now)) <= allowed, f"{there} is now {now}; {HINT}"


def test_the_reference_has_exactly_the_public_names_first_and_every_module_behind() -> None:
    module = load_generator()
    page = module.api_page()
    listed = re.findall(r"^### `sdgp\.(\w+)`$", page, re.MULTILINE)
    modules = {"functional", "nn", "weights", "diagnostics", "__version__"}
    assert sorted(listed) == sorted(set(sdgp.__all__) - modules)
    assert "\n::: sdgp_cusparselt.layers.convert.convert_\n" in page
    assert "\n::: sdgp_cusparselt.integrations.lightning\n" in page
    internals = module.internals_page()
    for name in ("sdgp_cusparselt", "sdgp_cusparselt.layers.convert", "pycusparselt.objects"):
        assert f"\n::: {name}\n" in internals


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_point_to_files(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#|api\.md|internals\.md|docker\.md|first-steps\.md", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page}: {target}"


def code_variables() -> set[str]:
    """Return the SDGP_ and CUSPARSELT_LIBRARY variables that the two packages read."""
    sources = [*(ROOT / "sdgp_cusparselt").rglob("*.py"), *(ROOT / "bindings").rglob("*.py")]
    names = re.compile(r"[\"'](SDGP_[A-Z_]+|CUSPARSELT_LIBRARY)[\"']")
    return {name for source in sources for name in names.findall(source.read_text())}


def test_the_table_of_variables_names_every_variable_that_the_code_reads() -> None:
    page = (ROOT / "docs" / "env-vars.md").read_text(encoding="utf-8")
    own = page.split("\n\n")[1]
    documented = set(re.findall(r"^\| `(\w+)`", own, re.MULTILINE))
    assert code_variables() <= documented
    image = (ROOT / "docker" / "Dockerfile").read_text()
    unknown = {name for name in documented - code_variables() if name not in image}
    assert not unknown, f"documented, but nothing reads them: {unknown}"
