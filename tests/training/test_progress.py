"""Bars in a terminal, silence in a pipe."""

import io

import pytest
from rich.console import Console

from sdgp_cusparselt.training.methods import parse_method
from sdgp_cusparselt.training.progress import SweepProgress
from sdgp_cusparselt.training.recipe import Recipe
from sdgp_cusparselt.training.run import RunSpec


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals(terminal: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100)
    with SweepProgress(3, console) as bars:
        bars.on_run(RunSpec("digits", parse_method("mvue"), 2, Recipe(steps=9)), 4, 9)
        bars.on_step()
        bars.refresh()
    drawn = stream.getvalue()
    assert bool(drawn) == terminal
    if terminal:
        assert "digits, mvue 2:4, seed 2" in drawn and "5/9" in drawn and "0/3" in drawn
