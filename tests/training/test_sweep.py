"""Sweeps: finished runs are kept, and the summary is the arithmetic that it says it is."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from sdgp_cusparselt.training import plots
from sdgp_cusparselt.training.checkpoint import CheckpointError, write_json
from sdgp_cusparselt.training.methods import parse_methods
from sdgp_cusparselt.training.plots import plot_curves, plot_rows
from sdgp_cusparselt.training.report import header, markdown_table, rows
from sdgp_cusparselt.training.run import RunSpec, Stopped
from sdgp_cusparselt.training.sweep import plan_runs, report_document, run_sweep, summarise
from sdgp_cusparselt.training.tasks import ACCURACY, BITS_PER_BYTE, Task


def specs_of(task: Task, methods: str, seeds: int = 2) -> list[RunSpec]:
    return plan_runs(task, parse_methods(methods), seeds, task.recipe, backend="dense")


def test_runs_go_seed_by_seed(image_task: Task) -> None:
    specs = specs_of(image_task, "dense,magnitude")
    order = [(spec.seed, spec.method.spelling) for spec in specs]
    assert order == [(0, "dense"), (0, "magnitude@2:4"), (1, "dense"), (1, "magnitude@2:4")]
    assert len({spec.name for spec in specs}) == 4
    with pytest.raises(ValueError, match="num_seeds must be at least 1, got 0"):
        plan_runs(image_task, parse_methods("dense"), 0, image_task.recipe)


def test_fresh_seeds(image_task: Task) -> None:
    methods = parse_methods("dense")
    specs = plan_runs(image_task, methods, 2, image_task.recipe, first_seed=10)
    assert [spec.seed for spec in specs] == [10, 11]
    with pytest.raises(ValueError, match="first_seed must be at least 0, got -1"):
        plan_runs(image_task, methods, 2, image_task.recipe, first_seed=-1)


def test_finished_runs_are_read_back_and_broken_ones_go_on(
    image_task: Task, tmp_path: Path
) -> None:
    data, specs = image_task.load(), specs_of(image_task, "dense,random")
    unbroken = run_sweep(specs, image_task, data, tmp_path / "unbroken")

    steps_done: list[int] = []

    def stop_in_the_second_run(step: int) -> bool:
        steps_done.append(step)
        return len([s for s in steps_done if s > 0]) == 8 + 5

    out = tmp_path / "broken"
    with pytest.raises(Stopped):
        run_sweep(specs, image_task, data, out, stop_in_the_second_run)
    assert sorted(path.name for path in out.iterdir()) == [
        "digits-dense-seed0.json",
        "digits-dense-seed0.pt",
        "digits-random-2of4-seed0.pt",
    ]
    begun: list[tuple[str, int]] = []
    resumed = run_sweep(
        specs,
        image_task,
        data,
        out,
        on_run=lambda spec, step, total: begun.append((spec.name, step)),
    )
    assert begun[:3] == [
        ("digits-dense-seed0", 9),
        ("digits-random-2of4-seed0", 5),
        ("digits-dense-seed1", 0),
    ]
    assert [strip_time(r) for r in resumed] == [strip_time(r) for r in unbroken]


def strip_time(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: strip_time(v) for k, v in value.items() if k != "ms_per_step"}
    return [strip_time(v) for v in value] if isinstance(value, list) else value


def test_results_of_another_recipe_are_refused(image_task: Task, tmp_path: Path) -> None:
    data = image_task.load()
    run_sweep(specs_of(image_task, "dense", 1), image_task, data, tmp_path)
    longer = plan_runs(
        image_task, parse_methods("dense"), 1, image_task.recipe.replace(epochs=9), backend="dense"
    )
    with pytest.raises(CheckpointError, match="recipe is"):
        run_sweep(longer, image_task, data, tmp_path)
    (tmp_path / "digits-dense-seed0.json").write_text("{")
    with pytest.raises(CheckpointError, match="must be a result of sdgp train"):
        run_sweep(specs_of(image_task, "dense", 1), image_task, data, tmp_path)


def fake(method: str, seed: int, metric: float | None) -> dict[str, Any]:
    loss = None if metric is None else 0.5 + seed / 2
    history = [{"step": 1, "train_loss": loss, "metric": metric, "ms_per_step": 2.0 + seed}]
    return {
        "identity": {"method": method, "seed": seed, "recipe": {}},
        "label": method.replace("@", " "),
        "metric": metric,
        "steps": 1,
        "ms_per_step": 2.0 + seed,
        "pruned_flop_share": 0.0 if method == "dense" else 0.75,
        "backends": ["dense"],
        "history": history,
    }


FAKES = [
    *[fake("dense", seed, value) for seed, value in enumerate([90.0, 92.0, 97.0])],
    *[fake("random@2:4", seed, value) for seed, value in enumerate([89.0, 90.0, 90.0])],
]


def test_summary_pairs_the_seeds() -> None:
    dense, random = summarise(FAKES)
    assert dense["mean"] == 93.0 and dense["std"] == pytest.approx(13**0.5)
    assert (dense["min"], dense["max"], dense["seeds"]) == (90.0, 97.0, [0, 1, 2])
    # Differences seed by seed: -1, -2, -7.
    assert random["difference_mean"] == pytest.approx(-10 / 3)
    assert random["difference_std"] == pytest.approx(statistics.stdev([-1, -2, -7]))
    assert random["ms_per_step"] == 3.0
    assert random["train_loss"] == 1.0


def test_summary_without_dense_or_spread_or_finite_values() -> None:
    (only,) = summarise([fake("magnitude@2:4", 0, 50.0)])
    assert only["difference_mean"] is None and only["std"] is None
    dense, lost = summarise([fake("dense", 0, 50.0), fake("random@2:4", 0, None)])
    assert lost["num_not_finite"] == 1 and lost["mean"] is None
    assert lost["difference_mean"] is None and dense["num_not_finite"] == 0


def test_table_cells() -> None:
    assert header(ACCURACY, 3)[1] == "accuracy, % ± std (3 seeds)"
    assert header(BITS_PER_BYTE, 1)[1] == "bits per byte, bits (1 seed)"
    dense, random = rows(summarise(FAKES), ACCURACY)
    assert dense == [
        "dense",
        "93.00 ± 3.61",
        "90.00 to 97.00",
        "",
        "1.0000",
        "3.0",
        "0.0 %",
        "dense",
    ]
    assert random[0] == "random 2:4" and random[3] == "-3.33 ± 3.21" and random[6] == "75.0 %"
    (lost,) = rows(summarise([fake("random@2:4", 0, None)]), ACCURACY)
    assert lost[1:5] == ["- (1 not finite)", "- to -", "", "-"]


@pytest.fixture
def document(image_task: Task, tmp_path: Path) -> dict[str, Any]:
    data, specs = image_task.load(), specs_of(image_task, "dense,magnitude@1:4")
    results = run_sweep(specs, image_task, data, tmp_path)
    return report_document(image_task, data, specs, results)


def test_document_has_its_schema(document: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", document)
    read = json.loads((tmp_path / "results.json").read_text())
    assert read == document
    assert read["schema"] == 1 and read["task"] == "digits"
    assert read["metric"] == {"name": "accuracy", "unit": "%", "higher_is_better": True}
    assert read["recipe"]["epochs"] == 3 and len(read["data"]["sha256"]) == 64
    assert read["environment"]["device_type"] == "cpu"
    assert [entry["method"] for entry in read["summary"]] == ["dense", "magnitude@1:4"]
    dense, pruned = read["runs"][:2]
    assert dense["converted"] == [] and dense["backends"] == ["torch autograd"]
    assert dense["pruned_flop_share"] == 0.0
    assert pruned["converted"] == ["blocks.0.conv1.0", "blocks.0.conv2.0"]
    assert set(pruned["skipped"]) == {"stem.0", "fc"} and pruned["backends"] == ["emulated"]
    assert [point["step"] for point in pruned["history"]] == [3, 6, 9]
    for run in read["runs"]:
        assert run["metric"] == run["history"][-1]["metric"] and run["steps"] == 9
        assert all(point["ms_per_step"] > 0 for point in run["history"])


def test_markdown_says_what_it_was_run_on(document: dict[str, Any]) -> None:
    lines = markdown_table(document, ACCURACY).splitlines()
    assert lines[0].startswith("| method | accuracy, % ± std (2 seeds) |")
    assert {line.count("|") for line in lines[:4]} == {9}
    assert lines[2].startswith("| dense | ") and lines[3].startswith("| magnitude 1:4 | ")
    assert "9 steps, fp32, cpu" in lines[5] and document["environment"]["torch"] in lines[5]


@pytest.mark.parametrize("draw", [plot_curves, plot_rows])
@pytest.mark.parametrize("metric", [ACCURACY, BITS_PER_BYTE])
def test_plots_are_images(draw: Any, metric: Any, document: dict[str, Any], tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is optional")
    document["runs"][0]["history"][1]["metric"] = None
    draw(document, metric, tmp_path / "new" / "plot.png")
    pixels = image.imread(tmp_path / "new" / "plot.png")
    assert pixels.shape[0] > 200 and pixels.shape[1] > 800
    # Axes, text and at least two colours of lines on white.
    assert pixels[..., :3].min() < 0.1 and pixels[..., :3].max() == 1.0


def test_curves_over_time_are_for_a_gpu(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    for device in ("cpu", "cuda"):
        document["environment"]["device_type"] = device
        for run in document["runs"]:
            for point, milliseconds in zip(run["history"], (10.0, 20.0, 30.0), strict=True):
                point["ms_per_step"] = milliseconds
        plot_curves(document, ACCURACY, tmp_path / "plot.png")
    assert [len(figure.axes) for figure in figures] == [2, 3]
    by_steps, _, by_time = figures[1].axes
    # Steps 3, 6 and 9, at 10, 20 and 30 ms each.
    assert by_steps.lines[0].get_xdata().tolist() == [3, 6, 9]
    assert by_time.lines[0].get_xdata() == pytest.approx([0.03, 0.09, 0.18])
    assert by_time.lines[0].get_ydata().tolist() == by_steps.lines[0].get_ydata().tolist()


def test_a_plot_without_matplotlib_says_so(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    real = importlib.import_module

    def refuse(name: str, package: str | None = None) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        plot_curves(document, ACCURACY, tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()
