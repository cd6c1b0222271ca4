"""Steps to the same loss, from dense runs of several lengths."""

import json
import math
from pathlib import Path

import pytest

from sdgp_cusparselt.commands.parser import main
from sdgp_cusparselt.training import tasks
from sdgp_cusparselt.training.equal_loss import dense_specs, steps_ratios, steps_to_loss
from sdgp_cusparselt.training.methods import parse_methods
from sdgp_cusparselt.training.sweep import plan_runs
from sdgp_cusparselt.training.tasks import Task

DENSE = {500: 3.0, 1000: 2.0}


def test_steps_between_two_lengths_are_interpolated_in_their_logarithm() -> None:
    assert steps_to_loss(DENSE, 3.0) == pytest.approx(500)
    assert steps_to_loss(DENSE, 2.0) == pytest.approx(1000)
    assert steps_to_loss(DENSE, 2.5) == pytest.approx(500 * math.sqrt(2))


@pytest.mark.parametrize("loss", [1.9, 3.1])
def test_a_loss_that_no_dense_run_frames_is_refused(loss: float) -> None:
    with pytest.raises(ValueError, match=r"dense run, 2\.0000 and 3\.0000, got"):
        steps_to_loss(DENSE, loss)


def run(method: str, seed: int, steps: int, metric: float) -> dict[str, object]:
    identity = {"method": method, "seed": seed}
    return {"identity": identity, "label": method, "steps": steps, "metric": metric}


def document(*runs: dict[str, object], higher_is_better: bool = False) -> dict[str, object]:
    metric = {"name": "bits per byte", "higher_is_better": higher_is_better}
    return {"metric": metric, "runs": list(runs)}


def test_ratios_pair_each_seed_with_its_own_dense_runs() -> None:
    short = document(run("dense", 0, 500, 3.0), run("dense", 1, 500, 4.0))
    long = document(
        run("dense", 0, 1000, 2.0),
        run("dense", 1, 1000, 3.0),
        run("mvue", 0, 1000, 2.5),
        run("mvue", 1, 1000, 3.0),
    )
    (found,) = steps_ratios([short, long])
    assert (found.label, found.steps) == ("mvue", 1000)
    assert found.values == pytest.approx((math.sqrt(2), 1.0))
    assert found.gaps == pytest.approx((0.5, 0.0))
    assert found.mean == pytest.approx((math.sqrt(2) + 1) / 2)
    assert found.std == pytest.approx((math.sqrt(2) - 1) / math.sqrt(2))


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dense runs of 1000 steps for every seed, got none"):
        steps_ratios([document(run("mvue", 0, 1000, 2.5))])
    with pytest.raises(ValueError, match="documents must be results with a loss"):
        steps_ratios([document(run("mvue", 0, 1000, 2.5), higher_is_better=True)])


def test_a_loss_that_no_dense_run_frames_is_a_bound() -> None:
    dense = [run("dense", seed, steps, loss) for seed in (0, 1) for steps, loss in DENSE.items()]
    more = [run("worse", 0, 1000, 5.0), run("worse", 1, 1000, 2.5), run("better", 0, 1000, 1.0)]
    diverged = run("diverged", 0, 1000, 0.0) | {"metric": None}
    worse, better, nan = steps_ratios([document(*dense, *more, diverged)])
    assert worse.values == pytest.approx((2.0, math.sqrt(2))) and worse.bound == ">"
    assert worse.text == "> 1.707 ± 0.414"
    assert (better.values, better.bound, better.text) == ((1.0,), "<", "< 1.000")
    assert (nan.values, nan.bound, nan.gaps) == ((2.0,), ">", (math.inf,))


def test_dense_runs_of_other_lengths_are_planned(text_task: Task) -> None:
    methods = parse_methods("dense,mvue")
    specs = plan_runs(text_task, methods, 2, text_task.recipe.replace(steps=100))
    planned = dense_specs("train", text_task, specs, 24)
    assert list(planned) == [70, 80, 90, 110]
    for steps, dense in planned.items():
        assert [(spec.method.is_dense, spec.seed) for spec in dense] == [(True, 0), (True, 1)]
        assert {spec.recipe.steps for spec in dense} == {steps}


def test_equal_loss_is_refused_for_accuracy_and_without_dense(
    text_task: Task, image_task: Task
) -> None:
    specs = plan_runs(image_task, parse_methods("dense,mvue"), 1, image_task.recipe)
    with pytest.raises(
        ValueError, match=r"--equal-loss must be for a task measured by a loss, got"
    ):
        dense_specs("train", image_task, specs, 24)
    for methods in ("mvue", "dense"):
        specs = plan_runs(text_task, parse_methods(methods), 1, text_task.recipe)
        with pytest.raises(ValueError, match="with dense and what is compared with it, got"):
            dense_specs("train", text_task, specs, 24)


def test_the_command_reports_steps_to_equal_loss(
    text_task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(tasks.TASKS, "code-lm", text_task)
    options = ["--methods", "dense,mvue+heavy=0.1", "--seeds", "2", "--steps", "10", "--equal-loss"]
    arguments = ["train", "code-lm", *options, "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "grad_input pruned" in printed and "R is the steps of a method" in printed
    found = json.loads((tmp_path / "results.json").read_text())
    assert "--seeds 2 --equal-loss --steps 10" in found["command"]
    again = found["equal_loss"]
    assert {one["steps"] for one in again["dense_runs"]} == {7, 8, 9, 11}
    (ratio,) = again["ratios"]
    assert (ratio["label"], ratio["steps"]) == ("mvue 2:4, heaviest 0.1 exact", 10)
    dense = {(one["identity"]["seed"], one["steps"]): one["metric"] for one in again["dense_runs"]}
    for one in found["runs"]:
        if one["identity"]["method"] == "dense":
            dense[one["identity"]["seed"], 10] = one["metric"]
    ours = [one for one in found["runs"] if one["identity"]["method"] != "dense"]
    for one, value, gap in zip(ours, ratio["values"], ratio["gaps"], strict=True):
        seed = one["identity"]["seed"]
        assert gap == pytest.approx(one["metric"] - dense[seed, 10])
        curve = {steps: dense[seed, steps] for steps in (7, 8, 9, 10, 11)}
        loss = one["metric"]
        outside = 7 if loss > curve[7] else 11 if loss < curve[11] else None
        assert value == pytest.approx(10 / (outside or steps_to_loss(curve, loss)))
    assert "| mvue 2:4, heaviest 0.1 exact | 10 |" in (tmp_path / "results.md").read_text()
    assert main([*arguments, "--resume", "--quiet"]) == 0
