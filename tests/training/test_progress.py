"""Bars in a terminal, plain lines every few seconds in a pipe, nothing when quiet."""

import io

import pytest
import torch
from rich.console import Console

from sdgp_cusparselt.training.methods import parse_method
from sdgp_cusparselt.training.progress import LINE_EVERY_S, SweepProgress
from sdgp_cusparselt.training.recipe import Recipe
from sdgp_cusparselt.training.run import RunSpec

SPEC = RunSpec("digits", parse_method("mvue"), 2, Recipe(steps=9))


@pytest.mark.parametrize("quiet", [True, False])
def test_bars_in_a_terminal(quiet: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with SweepProgress(3, console, quiet=quiet) as bars:
        bars.on_run(SPEC, 4, 9)
        bars.on_step(torch.tensor(0.5))
        bars.refresh()
    drawn = stream.getvalue()
    if quiet:
        assert drawn == ""
    else:
        for words in ("digits, mvue 2:4, seed 2", "5/9", "0/3", "loss 0.5"):
            assert words in drawn


def test_lines_in_a_pipe() -> None:
    now = 0.0
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=False)
    with SweepProgress(3, console, clock=lambda: now) as lines:
        lines.on_run(SPEC, 0, 9)
        for step in range(1, 10):
            now = step * LINE_EVERY_S / 2
            # A loss that must not be looked at, for it would make the host wait.
            lines.on_step(torch.tensor(step / 8) if step % 2 == 0 else None)  # type: ignore[arg-type]
        lines.on_run(SPEC, 9, 9)
    assert stream.getvalue().splitlines() == [
        "run 1 of 3: digits, mvue 2:4, seed 2: 9 steps",
        "run 1 of 3: digits, mvue 2:4, seed 2: step 2/9, loss 0.25, about 18 s left",
        "run 1 of 3: digits, mvue 2:4, seed 2: step 4/9, loss 0.5, about 12 s left",
        "run 1 of 3: digits, mvue 2:4, seed 2: step 6/9, loss 0.75, about 8 s left",
        "run 1 of 3: digits, mvue 2:4, seed 2: step 8/9, loss 1, about 2 s left",
    ]
