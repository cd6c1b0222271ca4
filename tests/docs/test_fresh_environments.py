"""What docs/fresh_environments.py copies from README.md, and what the page says of each extra."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.test_docs import ROOT, load_generator
from tests.test_docs import blocks as blocks_of

PAGE = ROOT / "docs" / "troubleshooting.md"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def fresh() -> ModuleType:
    sys.modules["fresh_environments"] = module = load_generator("fresh_environments")
    return module


def test_the_blocks_are_those_that_the_tests_of_the_page_run(fresh: ModuleType) -> None:
    tested = [(b.language, b.source) for b in blocks_of(README) if not b.skipped]
    assert fresh.blocks(README) == tested and len(tested) >= 4


def test_the_install_line_is_readmes_with_the_extra_put_in(fresh: ModuleType) -> None:
    plain = fresh.install_line(README, "plain")
    assert plain == "pip install -c constraints.txt -e ." and plain in README
    assert fresh.install_line(README, "train") == "pip install -c constraints.txt -e '.[train]'"
    with pytest.raises(ValueError, match="readme must have a line"):
        fresh.install_line("pip install sdgp", "train")


def test_every_command_of_the_table_has_a_short_form(fresh: ModuleType) -> None:
    from sdgp_cusparselt.commands.parser import build_parser

    assert set(fresh.commands(README)) == set(fresh.SHORT)
    commands = build_parser("info")._subparsers._group_actions[0].choices
    assert set(commands) == set(fresh.SHORT), "README's table has every command"


def test_the_advice_is_what_the_commands_themselves_say(fresh: ModuleType) -> None:
    from sdgp_cusparselt.extras import TRAIN_PACKAGES

    advice = fresh.advice(README)
    assert f"pip install {' '.join(TRAIN_PACKAGES)}" in advice
    assert any("pytest-benchmark" in line for line in advice)


def test_rows_are_renewed_in_the_order_of_the_extras(fresh: ModuleType) -> None:
    page = f"before\n\n{fresh.BEGIN}\n\n{fresh.END}\nafter\n"
    for extra, packages in (("train", 7), ("plain", 5), ("train", 9)):
        verdict = fresh.Verdict(extra, packages, 4, ("info",), ())
        page = fresh.with_row(page, verdict)
    rows = re.findall(r"^\| `(\S+)` \| (\d+) \|", page, re.MULTILINE)
    assert rows == [(".", "5"), (".[train]", "9")]
    assert page.count("not run yet") == len(fresh.extras()) - 2
    assert page.startswith("before\n\n") and page.endswith("\nafter\n")
    with pytest.raises(ValueError, match="page must hold"):
        fresh.with_row("no markers", verdict)


def test_the_page_has_a_row_for_every_extra(fresh: ModuleType) -> None:
    table = PAGE.read_text(encoding="utf-8").partition(fresh.BEGIN)[2].partition(fresh.END)[0]
    said = re.findall(r"^\| `\.(?:\[(\w+)\])?` \|", table, re.MULTILINE)
    assert [extra or "plain" for extra in said] == fresh.extras()


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["plain", "train", "bench"])
def test_readmes_commands_in_a_fresh_environment(
    fresh: ModuleType, extra: str, tmp_path: Path
) -> None:
    fresh.torch_alone("torch==2.13.0", tmp_path)
    verdict = fresh.try_extra(extra, tmp_path)
    wanted = {"info", "check"} | {"train": {"train", "plan", "quality"}, "bench": {"bench"}}.get(
        extra, set()
    )
    assert wanted <= set(verdict.works)
    assert set(verdict.works) | set(verdict.advises) == set(fresh.SHORT)
