"""sdgp quality: from the command line to a table, a recommendation and JSON."""

import json
import math
from pathlib import Path

import pytest
import torch

from sdgp_cusparselt.commands.parser import main
from sdgp_cusparselt.training.quality_run import dense_trainer, measure
from sdgp_cusparselt.training.tasks import TASKS


def test_the_table_names_groups_and_what_fits_the_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "quality.json"
    code = ["quality", "code-lm", "--steps", "4", "--batches", "2", "--json", str(path)]
    assert main(code) == 0
    out = capsys.readouterr().out
    assert "readers" in out and "blocks.*.down" in out and "Within R = 1.03:" in out
    assert "batch x 4" in out and "signal" in out
    document = json.loads(path.read_text())
    assert (document["at"], document["batches"]) == (2, 2)
    names = [row["name"] for row in document["variants"]]
    assert names[:3] == ["all", "readers", "balanced"]
    for row in document["variants"]:
        assert row["steps_ratio"] == 1 + row["rho"] >= 1
    critical = {row["critical_batches"] for row in document["variants"]}
    assert len(critical) == 1, "it is the dense gradient's"
    assert f"critical batch is about {(critical.pop() or math.inf):.2g} of these" in out


def test_a_model_without_a_residual_stream_has_no_presets_but_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["quality", "digits", "--steps", "2", "--at", "0", "--batches", "2"]) == 0
    out = capsys.readouterr().out
    assert "readers" not in out and "all" in out


def test_wrong_values_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", "code-lm", "--steps", "4", "--at", "5"]) == 2
    assert "at must be a step of the recipe, 0 to 4, got 5" in capsys.readouterr().err
    assert main(["quality", "code-lm", "--steps", "4", "--batches", "1"]) == 2
    assert "--batches: must be a whole number of at least 2" in capsys.readouterr().err


def test_measuring_leaves_weights_statistics_and_the_next_step_alone() -> None:
    task = TASKS["digits"]
    dataset, recipe = task.load(), task.recipe.replace(steps=4)
    trainer = dense_trainer(task, dataset, recipe, 2)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    measure(trainer, {}, 2)
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    other = dense_trainer(task, dataset, recipe, 2)
    for each in (trainer, other):
        each.train_step()
    ours, expected = trainer.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(ours[k], expected[k]) for k in expected)
