"""The weights sweep: its rows, their learning rates, and runs that stop and go on."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdgp_cusparselt.training.methods import SWEEPS, Method, parse_method
from sdgp_cusparselt.training.recipe import triangular
from sdgp_cusparselt.training.run import RunSpec, Stopped, Trainer
from sdgp_cusparselt.training.sweep import check_methods, load_result, plan_runs, run_sweep
from sdgp_cusparselt.training.tasks import TASKS, Task
from sdgp_cusparselt.training.weight_methods import STRUCTURELESS, WEIGHT_METHODS
from sdgp_cusparselt.weights import FST, MaskDecay, SLoPe
from sdgp_cusparselt.weights.state import recipe_states

ROWS = [*SWEEPS["weights"], *SWEEPS["unstructured"]]


def spec_of(task: Task, row: str) -> RunSpec:
    return RunSpec(task.name, parse_method(row), 0, task.recipe, backend="dense")


def test_both_sweeps_are_spelled_and_read_back() -> None:
    assert {row.removeprefix("weights=") for row in ROWS} == {"dense", *WEIGHT_METHODS}
    for row in (row for row in ROWS if row != "dense"):
        method = parse_method(row)
        assert method.spelling == row and not method.is_dense
        assert method.slug == row.replace("=", "-")
    assert parse_method("weights=fst") == Method("none", weights="fst")
    assert len({parse_method(row).label for row in set(ROWS)}) == len(set(ROWS))
    for wrong in ("weights=none", "weights=", "fst", "mvue+weights=fst"):
        with pytest.raises(ValueError, match="weights= and one of"):
            parse_method(wrong)
    assert set(SWEEPS["unstructured"]) & set(SWEEPS["weights"]) == {"dense", "weights=mishra"}
    assert len(STRUCTURELESS) == 4


@pytest.mark.parametrize("task", ["digits", "mnist-vit", "code-lm"])
def test_every_row_fits_the_tasks_that_it_was_run_on(task: str) -> None:
    check_methods(TASKS[task], [parse_method(row) for row in ROWS])


def test_hyper_parameters_are_what_the_pages_say() -> None:
    steps = 200
    exponential = WEIGHT_METHODS["kao-mask-exponential"].build(steps)
    assert isinstance(exponential, MaskDecay)
    # Dense for 20 steps, the decay over 140, its rest cut off below one percent.
    assert exponential.stage(19).masked is False and exponential.stage(20).beta == 1.0
    assert exponential.stage(159).beta == pytest.approx(math.exp(-5 * 139 / 140))
    assert exponential.stage(160).beta == 0.0
    linear = WEIGHT_METHODS["kao-mask-linear"].build(steps)
    assert linear is not None and linear.stage(90).beta == pytest.approx(0.5)
    geometric = WEIGHT_METHODS["kao-structure-geometric"].build(steps)
    assert geometric is not None
    patterns = [(geometric.stage(s).n, geometric.stage(s).m) for s in (20, 55, 90, 125, 199)]
    assert patterns == [(16, 32), (8, 16), (4, 8), (2, 4), (2, 4)]
    slope, fst = WEIGHT_METHODS["slope"].build(steps), WEIGHT_METHODS["fst"].build(steps)
    assert isinstance(slope, SLoPe) and slope.adapters_from == 180
    assert isinstance(fst, FST) and fst.stage(166).masked and not fst.stage(167).masked
    for name, at in (("one-shot-10", 20), ("one-shot-50", 100), ("prune-only", 200)):
        recipe = WEIGHT_METHODS[name].build(steps)
        assert recipe is not None and not recipe.stage(at - 1).masked and recipe.stage(at).refresh


@pytest.mark.parametrize("row", ["weights=mishra", "weights=dense-twice", "weights=sr-ste"])
def test_learning_rates_are_those_of_the_recipe_anew_in_each_pass(
    row: str, image_task: Task
) -> None:
    trainer = Trainer(spec_of(image_task, row), image_task, image_task.load())
    once = [triangular(step, 9, image_task.recipe.peak_fraction) for step in range(9)]
    passes = 1 if row == "weights=sr-ste" else 2
    assert trainer.total_steps == 9 * passes
    recipe = trainer.spec.weight_recipe(trainer.dataset)
    for step, factor in enumerate(once * passes):
        rate = trainer.optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(factor * image_task.recipe.learning_rate), step
        if recipe is not None:
            assert factor == once[recipe.learning_rate_step(step)]
        trainer.train_step()


@pytest.mark.parametrize("row", ["weights=mishra", "weights=slope", "weights=fst"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_stopped_run_goes_on_bit_for_bit(
    row: str, precision: Any, text_task: Task, tmp_path: Path
) -> None:
    method, data = parse_method(row), text_task.load()
    spec = RunSpec("code-lm", method, 3, text_task.recipe, "cpu", precision, "dense")
    unbroken = Trainer(spec, text_task, data)
    unbroken.train()
    first = Trainer(spec, text_task, data)
    with pytest.raises(Stopped):
        first.train(tmp_path / "run.pt", lambda step: step == 5)
    second = Trainer(spec, text_task, data)
    second.load(tmp_path / "run.pt")
    second.train()
    assert second.history[-1]["metric"] == unbroken.history[-1]["metric"]
    for key, value in unbroken.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], value), key


def test_a_pruned_run_ends_with_two_of_four_and_its_results_are_found_again(
    image_task: Task, tmp_path: Path
) -> None:
    data = image_task.load()
    methods = [parse_method(row) for row in ("dense", "weights=mishra", "weights=unstructured-90")]
    specs = plan_runs(image_task, methods, 1, image_task.recipe, backend="dense")
    results = run_sweep(specs, image_task, data, tmp_path)
    assert [result["steps"] for result in results] == [9, 18, 18]
    for spec, result in zip(specs, results, strict=True):
        assert load_result(tmp_path, spec, data) == result
    assert results[1]["identity"]["weights"]["schedule"]["warmup"] == 9
    trainer = Trainer(specs[1], image_task, data)
    trainer.load(tmp_path / f"{specs[1].name}.pt")
    states = recipe_states(trainer.model)
    assert [state.layer.sdgp_record.name for state in states] == results[1]["converted"]
    for state in states:
        kept = (state.weight != 0).unflatten(1, (-1, 4)).sum(2)
        assert kept.amax() == 2 and state.recipe.name == "mishra"
    conv = nn.Conv2d(32, 32, 3)
    assert states[0].weight.shape == conv.weight.shape
