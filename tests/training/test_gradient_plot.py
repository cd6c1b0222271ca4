"""docs/gradient_plot.py and docs/preset_gain.py: every way in the picture, and what is pruned."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from sdgp_cusparselt.planner.gemms import Gemm, Trace
from sdgp_cusparselt.training.equal_loss import StepsRatio

DOCS = Path(__file__).parents[2] / "docs"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_trained_way_is_predicted_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture")
    plot = load("gradient_plot")
    found = plot.predictions(json.loads((DOCS / "results/gradient-quality.json").read_text()))
    assert set(plot.SAME) <= set(found)
    assert found["mvue"] == sorted(found["mvue"]) and len(found["mvue"]) == 3
    trained = {
        label: StepsRatio(label, 1000, (1.5, 1.6), (0.1, 0.2), ">") for label in plot.SAME.values()
    }
    plot.draw(found, trained, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("all", {("a.q_proj", "grad_input"), ("a.o_proj", "grad_input")}),
        ("readers", {("a.q_proj", "grad_input")}),
        (
            "balanced",
            {("a.q_proj", "grad_input"), ("a.q_proj", "grad_weight"), ("a.o_proj", "grad_weight")},
        ),
    ],
)
def test_a_preset_prunes_its_products(way: str, expected: set[tuple[str, str]]) -> None:
    gemms = tuple(
        Gemm(
            name, "linear", role, 64, 64, 64, 1, (1, 1, 1), role == "grad_input" and "proj" in name
        )
        for name in ("a.q_proj", "a.o_proj", "lm_head")
        for role in ("forward", "grad_input", "grad_weight")
    )
    taken = load("preset_gain").pruned(Trace(gemms, 0, 0), way).gemms
    assert {(gemm.fqn, gemm.role) for gemm in taken if gemm.prunable} == expected
