"""The recipe checks itself, and its schedule is the triangle that it says it is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdgp_cusparselt.training.recipe import Recipe, triangular


@pytest.mark.parametrize("peak_fraction", [0.0, 0.1, 1 / 3, 0.9])
@pytest.mark.parametrize("total", [1, 7, 300])
def test_triangular_is_the_line_through_three_points(total: int, peak_fraction: float) -> None:
    steps = np.arange(total + 1)
    peak = peak_fraction * total
    corners = ([0, peak, total], [1e-4, 1, 0]) if peak else ([0, total], [1, 0])
    expected = np.interp(steps, *corners)
    got = [triangular(int(step), total, peak_fraction) for step in steps]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_setting_steps_unsets_epochs_and_back() -> None:
    recipe = Recipe(epochs=3)
    assert recipe.replace(steps=5).total_steps(1000) == 5
    assert recipe.replace(steps=5).epochs is None
    assert recipe.replace(steps=5).replace(epochs=2, batch_size=300).total_steps(1000) == 6


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be an int, got 1.5"),
        ({"epochs": True}, TypeError, "epochs must be an int, got True"),
        ({"steps": 4}, ValueError, "epochs=1, steps=4"),
        ({"epochs": None}, ValueError, "epochs=None, steps=None"),
        ({"batch_size": -1}, ValueError, "batch_size must be at least 1, got -1"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be above 0, got nan"),
        ({"learning_rate": float("inf")}, ValueError, "learning_rate must be above 0, got inf"),
        ({"learning_rate": "0.1"}, TypeError, "learning_rate must be a float, got '0.1'"),
        ({"peak_fraction": 1.0}, ValueError, "peak_fraction must be in"),
        ({"momentum": -0.1}, ValueError, "momentum must be in"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0, got -1.0"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be above 0, got 0"),
        ({"decay": "norms"}, ValueError, "decay must be matrices or not_norms or all, got 'norms'"),
        ({"flip": 1}, TypeError, "flip must be a bool, got 1"),
        ({"flip_evaluation": "yes"}, TypeError, "flip_evaluation must be a bool, got 'yes'"),
        ({"translate": -1}, ValueError, "translate must be at least 0, got -1"),
        ({"cutout": 1.0}, TypeError, "cutout must be an int, got 1.0"),
        ({"gradient_accumulation": 0}, ValueError, "gradient_accumulation must be at least 1"),
        ({"gradient_accumulation": 3}, ValueError, "must be a divisor of the batch size 64, got 3"),
        ({"optimizer": "lion"}, ValueError, "optimizer must be sgd or adamw, got 'lion'"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        Recipe(**({"epochs": 1} | changes))
    assert words in str(caught.value)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="at most the 10 training examples, got 64"):
        Recipe(epochs=1, batch_size=64).total_steps(10)


RESULTS = sorted((Path(__file__).parents[2] / "docs" / "results").glob("*.md"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_from_before_the_later_fields_have_the_same_identity(path: Path) -> None:
    for run in json.loads(path.with_suffix(".json").read_text())["runs"]:
        saved = run["identity"]["recipe"]
        assert Recipe(**saved).identity() == saved


@pytest.mark.parametrize(
    "changes",
    [
        {"decay": "all"},
        {"gradient_accumulation": 2},
        {"flip": True},
        {"translate": 1},
        {"cutout": 2},
        {"flip_evaluation": True},
    ],
)
def test_a_later_field_that_is_used_is_part_of_the_identity(changes: dict[str, Any]) -> None:
    assert Recipe(epochs=1, **changes).identity() == Recipe(epochs=1).identity() | changes
