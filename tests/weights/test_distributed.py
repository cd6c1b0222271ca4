"""Recipes under DDP and FSDP2: judges what two_ranks.py found in two processes."""

from pathlib import Path
from typing import Any

import pytest

from tests.loops.launch import in_two_processes
from tests.weights.two_ranks import RECIPES, STEPS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    result: dict[str, Any] = in_two_processes("two_ranks", folder, package="tests.weights")[1]
    return result


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_half_batches_train_as_one_whole_batch(recipe: str, found: dict[str, Any]) -> None:
    """Sums of some hundred products of order one in float64, over six steps."""
    one = found[recipe]
    assert one["ddp"] < 1e-12 and one["fsdp2"] < 1e-12
    assert one["keys"] and one["step"] == STEPS and one["loaded"] < 1e-12
    assert one["zeros"] == 0.5
