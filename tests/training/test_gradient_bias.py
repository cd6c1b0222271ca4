"""The measurement behind docs/numerics.md: what it says of gradients whose bias is known."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sdgp_cusparselt.training.methods import parse_method
from sdgp_cusparselt.training.run import RunSpec, Trainer
from sdgp_cusparselt.training.tasks import Task

SCRIPT = Path(__file__).parents[2] / "docs" / "gradient_bias.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gradient_bias", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(script: ModuleType, bias: float, noise: float, batches: int) -> dict[str, float]:
    """Rows for p = g + bias * u + noise, u a unit vector at right angles to the unit vector g."""
    generator = torch.Generator().manual_seed(0)
    g, u = torch.zeros(200), torch.zeros(200)
    g[0] = u[1] = 1.0
    pruned, dense = script.Means(["w"]), script.Means(["w"])
    for batch in range(batches):
        drawn: Tensor = torch.randn(200, generator=generator) * noise / 200**0.5
        dense.add(batch, {"w": g}, {"w": g})
        pruned.add(batch, {"w": g + bias * u + drawn}, {"w": g})
    (row,) = script.rows(pruned, dense)
    assert row.pop("weight") == "w"
    result: dict[str, float] = row
    return result


def test_a_known_bias_is_found_under_noise(script: ModuleType) -> None:
    row = measured(script, bias=0.5, noise=1.0, batches=256)
    assert row["bias"] == pytest.approx(0.5, abs=0.05)
    assert row["cosine_mean"] == pytest.approx(1 / math.sqrt(1.25), abs=0.03)
    # One step sees the noise too: 1 / sqrt(1 + 0.25 + 1).
    assert row["cosine_step"] == pytest.approx(1 / 1.5, abs=0.03)


def test_noise_alone_is_no_bias(script: ModuleType) -> None:
    row = measured(script, bias=0.0, noise=1.0, batches=256)
    # The noise of the two halves' means is 1 / sqrt(128) each; only their product is left.
    assert row["bias"] < 0.08 and row["cosine_mean"] == pytest.approx(1.0, abs=0.02)
    assert row["cosine_step"] == pytest.approx(1 / math.sqrt(2), abs=0.03)


def test_a_scale_is_a_bias_but_no_angle(script: ModuleType) -> None:
    pruned, dense = script.Means(["w"]), script.Means(["w"])
    for batch in range(4):
        gradient = {"w": torch.full((3, 2), batch + 1.0)}
        dense.add(batch, gradient, gradient)
        pruned.add(batch, {"w": gradient["w"] / 2}, gradient)
    (row,) = script.rows(pruned, dense)
    assert row["bias"] == pytest.approx(0.5) and row["cosine_mean"] == pytest.approx(1.0)


def test_methods_of_a_real_model(script: ModuleType, text_task: Task) -> None:
    spec = RunSpec("code-lm", parse_method("dense"), 0, text_task.recipe, backend="dense")
    trainer = Trainer(spec, text_task, text_task.load())
    trainer.train_step()
    before = [p.clone() for p in trainer.model.parameters()]
    methods = [parse_method(name) for name in ("magnitude", "mvue", "magnitude@4:4")]
    found = script.measure(trainer, methods, num_batches=64)
    assert list(found) == ["dense", "magnitude@2:4", "mvue@2:4", "magnitude@4:4"]
    assert all(map(torch.equal, before, trainer.model.parameters()))
    for untouched in ("dense", "magnitude@4:4"):
        assert all(row["bias"] < 1e-6 for row in found[untouched])
        assert all(row["cosine_step"] > 1 - 1e-6 for row in found[untouched])
    first = {spelling: measured[0] for spelling, measured in found.items()}
    assert first["magnitude@2:4"]["bias"] > 3 * first["mvue@2:4"]["bias"]
    # No pruned gradient passes through what lies above the last converted layer.
    assert {row["weight"]: row["bias"] for row in found["mvue@2:4"]}["lm_head.weight"] == 0.0
