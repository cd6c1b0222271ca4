"""The emulator's answers are the card's, except where README.md names a difference."""

import ast
from collections.abc import Callable
from pathlib import Path

import pycusparselt as cslt
import pytest

from tests.emulator.build import build
from tests.emulator.card import FACTS, Answer
from tests.emulator.control import Emulator
from tests.emulator.questions import ask

README = Path(__file__).with_name("README.md")
REQUESTS: dict[str, Callable[[Emulator], None]] = {
    "": lambda emulator: None,
    "full_sizes()": lambda emulator: emulator.full_sizes(),
    "default_split_k(-1)": lambda emulator: emulator.default_split_k(-1),
}
#: Plans that keep a default of -1 are refused on request, so that all their answers differ.
PLANLESS = ("defaults", "set ", "get ", "dense ", "structured ", "GetError")


def named(request: str) -> dict[str, tuple[Answer, Answer]]:
    """Return the table's lines for a request: question -> (card, emulator)."""
    lines = [line.split("|")[1:-1] for line in README.read_text().splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in line] for line in lines[2:]]
    return {
        question: (ast.literal_eval(card), ast.literal_eval(ours))
        for asked, question, card, ours in cells
        if asked.strip("`") == request
    }


@pytest.mark.parametrize("request_", REQUESTS)
def test_only_the_named_answers_differ_from_the_card(request_: str) -> None:
    emulator = Emulator(build())
    emulator.reset()
    library = cslt.load(emulator.path)  # its version is read once, and other tests want another
    emulator.arch(86)
    emulator.version(0, 10, 0)
    REQUESTS[request_](emulator)
    answers = ask(library)
    assert not any(emulator.live().values())
    emulator.reset()
    assert answers.keys() == FACTS.keys()
    asked = [q for q in FACTS if request_ != "default_split_k(-1)" or q.startswith(PLANLESS)]
    differ = {q: (FACTS[q], answers[q]) for q in asked if FACTS[q] != answers[q]}
    assert differ == named(request_)


def test_every_line_of_the_table_belongs_to_a_request() -> None:
    assert len(FACTS) > 700 and sum(len(named(request)) for request in REQUESTS) == 4
