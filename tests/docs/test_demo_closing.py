"""What ``make demo`` says at its end, and that its commands are ones that the parser takes."""

import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sdgp_cusparselt.commands.parser import build_parser
from tests.test_docs import ROOT, load_generator


@pytest.fixture(scope="module")
def closing() -> ModuleType:
    return load_generator("demo_closing")


def document(task: str, seeds: int, **means: float | None) -> dict[str, Any]:
    rows = [
        {"method": method, "label": f"{method} 2:4", "mean": mean, "seeds": list(range(seeds))}
        for method, mean in means.items()
    ]
    return {"task": task, "summary": rows}


def test_each_task_has_its_own_direction(closing: ModuleType) -> None:
    digits = document("digits", 2, mvue=96.5, dense=97.0, magnitude=97.254, random=97.001)
    assert closing.sentence(digits) == (
        "digits: dense ends at 97.00 % accuracy; mvue 2:4 0.50 worse, magnitude 2:4 0.25 better, "
        "random 2:4 the same to 0.01 (means of 2 seeds)."
    )
    code = document("code-lm", 1, dense=3.0, magnitude=3.5, mvue=2.96)
    assert closing.sentence(code) == (
        "code-lm: dense ends at 3.00 bits per byte; magnitude 2:4 0.50 worse, mvue 2:4 0.04 better "
        "(one seed)."
    )


@pytest.mark.parametrize("means", [{"mvue": 1.0}, {"dense": 1.0}, {"dense": 1.0, "mvue": None}])
def test_what_cannot_be_compared_is_refused(closing: ModuleType, means: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a finite dense run and a pruned one, got"):
        closing.sentence(document("digits", 1, **means))


def test_a_line_for_each_file(
    closing: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document("digits", 1, dense=97.0, mvue=97.0)))
    assert closing.main([str(path), str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Seen:",
        *2 * ["  digits: dense ends at 97.00 % accuracy; mvue 2:4 the same to 0.01 (one seed)."],
    ]
    assert closing.main([]) == 2


def test_the_demo_closes_with_the_files_that_its_runs_wrote() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    assert recipe
    *runs, last = [shlex.split(line) for line in recipe[1].splitlines()]
    folders = []
    for words in runs:
        assert words[:4] == ["$(BIN)/python", "-m", "sdgp_cusparselt", "train"]
        arguments = build_parser("train").parse_args(words[3:])
        assert "dense" in words[words.index("--methods") + 1].split(",")
        folders.append(arguments.out)
    assert last[1] == "docs/demo_closing.py"
    assert last[2:] == [f"{folder}/results.json" for folder in folders] and len(folders) == 2
