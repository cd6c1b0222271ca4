"""The parts of the site that are made for it: the notebook, badges, hooks, pages of other files."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.test_docs import ROOT, load_generator

NOTEBOOK = ROOT / "docs" / "first-steps.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own assertions hold, nothing goes to stderr, and it prints as many things as it shows."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'bindings'}")
    shown = nbformat.read(NOTEBOOK, as_version=4)
    ran = nbformat.read(NOTEBOOK, as_version=4)
    kernel = {"resources": {"metadata": {"path": str(tmp_path)}}, "kernel_name": "python3"}
    NotebookClient(ran, timeout=240, startup_timeout=240, **kernel).execute()
    for before, after in zip(shown.cells, ran.cells, strict=True):
        kinds = [output.get("name") for output in after.get("outputs", ())]
        assert kinds == [output.get("name") for output in before.get("outputs", ())]
        assert "stderr" not in kinds


def test_the_notebook_names_no_place_of_the_machine_that_ran_it() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(work|home|root|tmp|usr)/", text)
    counts = [c.get("execution_count") for c in json.loads(text)["cells"] if "outputs" in c]
    assert counts == list(range(1, len(counts) + 1)), "run from top to bottom"


def test_badges_say_what_the_repository_says() -> None:
    module = load_generator("badges")
    for path, drawn in module.files().items():
        assert path.read_text(encoding="utf-8") == drawn, "run: python docs/badges.py"
        ElementTree.fromstring(drawn)
    assert len(list(module.FOLDER.iterdir())) == len(module.files()) == 5
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert module.markdown() in readme, "README shows them, and their words instead"


def test_a_fence_that_is_not_run_says_so_on_the_site() -> None:
    hooks = load_generator("hooks")
    text = 'a\n```sh no-run: needs a "GPU"\nnvidia-smi\n```\n\n```python\nx\n```\n'
    page = hooks.on_page_markdown(text)
    assert page == 'a\n```sh title="needs a GPU"\nnvidia-smi\n```\n\n```python\nx\n```\n'


def test_version_and_repository_are_on_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = load_generator("hooks")
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    config = hooks.on_config(SimpleNamespace(site_name="sdgp", repo_url=None))
    assert re.fullmatch(r"sdgp \d+\.\d+\.\d+", config.site_name) and config.repo_url is None
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/sdgp")
    config = hooks.on_config(SimpleNamespace(site_name="sdgp", repo_url=None))
    assert config.repo_url == "https://github.com/someone/sdgp"


def test_every_page_is_in_the_navigation_and_every_entry_has_a_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": (\S+\.md)$", text.partition("\nnav:\n")[2], re.MULTILINE))
    from tests.test_docs import MADE

    kept = {page.name for page in (ROOT / "docs").glob("*.md")} - set(MADE)
    assert listed == kept | set(MADE)


def test_pages_made_of_other_files() -> None:
    module = load_generator()
    docker = module.docker_page()
    assert docker.startswith("# ") and "../docs/" not in docker
    page = module.notebook_page()
    assert "```python\nimport warnings" in page and "```text\ntensor(" in page
    assert page.count("```") % 2 == 0


@pytest.mark.parametrize("name", ["badges", "fresh_environments", "generate", "look"])
def test_scripts_of_the_documentation_say_what_they_do(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.py").read_text(encoding="utf-8")
    assert f"python docs/{name}.py" in text.split('"""')[1]


def test_look_refuses_what_is_no_site(tmp_path: Path) -> None:
    pytest.importorskip("markdown", reason="markdown comes with the docs extra")
    script = str(ROOT / "docs" / "look.py")
    done = subprocess.run(
        [sys.executable, script, "--site", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("Traceback") == 0
