"""A sweep is a list of runs; finished ones are read back, started ones go on."""

import copy
import json
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdgp_cusparselt.config.choices import BackendName
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.layers.convert import convert_
from sdgp_cusparselt.training.checkpoint import CheckpointError, check_identity, write_json
from sdgp_cusparselt.training.data import Dataset
from sdgp_cusparselt.training.methods import Method
from sdgp_cusparselt.training.recipe import Recipe
from sdgp_cusparselt.training.run import OnStep, Precision, RunSpec, Stopped, Trainer
from sdgp_cusparselt.training.tasks import Task
from sdgp_cusparselt.versions import __version__
from sdgp_cusparselt.weights import sparsify_

#: Told before a run (with its spec and its first and last step) and after each of its steps.
OnRun = Callable[[RunSpec, int, int], None]


def plan_runs(
    task: Task,
    methods: Sequence[Method],
    num_seeds: int,
    recipe: Recipe,
    device: str = "cpu",
    precision: Precision = "fp32",
    backend: BackendName = "auto",
    first_seed: int = 0,
) -> list[RunSpec]:
    """Return the runs of a sweep, seed by seed, so that a broken-off sweep still compares methods.

    Raises:
        ValueError: ``num_seeds`` is below 1 or ``first_seed`` below 0.
    """
    if num_seeds < 1:
        raise value_error("plan_runs", "num_seeds", "at least 1", num_seeds, "Ask for more seeds.")
    if first_seed < 0:
        raise value_error("plan_runs", "first_seed", "at least 0", first_seed, "Pass 0 or more.")
    return [
        RunSpec(task.name, method, seed, recipe, device, precision, backend, task.model)
        for seed in range(first_seed, first_seed + num_seeds)
        for method in methods
    ]


def check_methods(task: Task, methods: Sequence[Method]) -> None:
    """Raise ValueError before any training if a method fits no layer of the task's model."""
    with torch.device("meta"):
        model = task.build_model()
    for method in methods:
        config = method.config()
        weights = method.weight_recipe(task.recipe.steps or 100)
        if weights is not None:
            sparsify_(copy.deepcopy(model), weights, config=config)
        elif config is not None and not method.weights:
            convert_(copy.deepcopy(model), config, preset=method.preset)


def run_sweep(
    specs: Sequence[RunSpec],
    task: Task,
    dataset: Dataset,
    out: Path,
    should_stop: Callable[[int], bool] = lambda step: False,
    on_run: OnRun = lambda spec, step, total: None,
    on_step: OnStep = lambda loss: None,
) -> list[dict[str, Any]]:
    """Carry out every run that has no result in ``out`` yet.

    Args:
        specs: the runs, all of ``task``.
        task: what is trained.
        dataset: its data.
        out: folder of ``<run>.pt`` (checkpoint) and ``<run>.json`` (result).
        should_stop: asked after each step and between runs.
        on_run: told when a run starts or goes on.
        on_step: called after each step, with its loss.

    Returns:
        The results in the order of ``specs``.

    Raises:
        Stopped: ``should_stop`` said so; what was done is in ``out``.
        CheckpointError: a file in ``out`` belongs to another run.
    """
    results = []
    for spec in specs:
        result = load_result(out, spec, dataset)
        if result is None:
            if should_stop(0):
                raise Stopped(f"stopped before {spec.name}")
            result = execute(spec, task, dataset, out, should_stop, on_run, on_step)
        else:
            on_run(spec, result["steps"], result["steps"])
        results.append(result)
    return results


def execute(
    spec: RunSpec,
    task: Task,
    dataset: Dataset,
    out: Path,
    should_stop: Callable[[int], bool],
    on_run: OnRun,
    on_step: OnStep,
) -> dict[str, Any]:
    """Carry out one run, from its checkpoint where there is one, and write its result."""
    checkpoint = out / f"{spec.name}.pt"
    device = torch.device(spec.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trainer = Trainer(spec, task, dataset)
        if checkpoint.exists():
            trainer.load(checkpoint)
        on_run(spec, trainer.step, trainer.total_steps)
        trainer.train(checkpoint, should_stop, on_step)
    result = describe(trainer)
    write_json(out / f"{spec.name}.json", result)
    return result


def describe(trainer: Trainer) -> dict[str, Any]:
    """Return the result of a finished run as plain values."""
    history = trainer.history
    return {
        "identity": trainer.spec.identity(trainer.dataset),
        "label": trainer.spec.method.label,
        "metric": history[-1]["metric"],
        "steps": trainer.step,
        "ms_per_step": statistics.median(point["ms_per_step"] for point in history),
        "num_parameters": sum(p.numel() for p in trainer.model.parameters()),
        "converted": trainer.converted,
        "skipped": trainer.skipped,
        "grad_input_flops": trainer.flops.by_layer,
        "pruned_flop_share": trainer.flops.share(trainer.pruned) * trainer.spec.method.pruned_share,
        "backends": trainer.backends,
        "history": history,
    }


def load_result(out: Path, spec: RunSpec, dataset: Dataset) -> dict[str, Any] | None:
    """Return the result of an earlier call, or None.

    Raises:
        CheckpointError: the file is not a result, or is that of another run.
    """
    path = out / f"{spec.name}.json"
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        saved = result["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"load_result: {path} must be a result of sdgp train, got {error!r}. "
            "Remove the file, and the run is done again."
        ) from error
    check_identity(path, saved, spec.identity(dataset))
    return result


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per method: mean and spread over seeds, and the difference to dense.

    Args:
        results: of ``run_sweep``.

    Returns:
        Rows in the order in which the methods first appear. ``std`` is the sample standard
        deviation (None for one seed); ``difference`` pairs each seed with dense of that seed;
        ``train_loss`` is the mean since the evaluation before the last, in nats.
    """
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        identity = result["identity"]
        by_method.setdefault(identity["method"], {})[identity["seed"]] = result
    dense = by_method.get("dense", {})
    return [_summary(method, runs, dense) for method, runs in by_method.items()]


def _summary(
    method: str, runs: dict[int, dict[str, Any]], dense: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    values = [run["metric"] for run in runs.values()]
    valid = _finite(values)
    differences = [
        run["metric"] - dense[seed]["metric"]
        for seed, run in runs.items()
        if seed in dense and None not in (run["metric"], dense[seed]["metric"])
    ]
    first = next(iter(runs.values()))
    return {
        "method": method,
        "label": first["label"],
        "seeds": sorted(runs),
        "values": values,
        "mean": _mean(valid),
        "std": _std(valid),
        "min": min(valid, default=None),
        "max": max(valid, default=None),
        "difference_mean": _mean(differences),
        "difference_std": _std(differences),
        "train_loss": _mean(_finite(run["history"][-1]["train_loss"] for run in runs.values())),
        "num_not_finite": len(values) - len(valid),
        "ms_per_step": statistics.median(run["ms_per_step"] for run in runs.values()),
        "pruned_flop_share": first["pruned_flop_share"],
        "backends": sorted({backend for run in runs.values() for backend in run["backends"]}),
    }


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def report_document(
    task: Task, dataset: Dataset, specs: Sequence[RunSpec], results: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the content of ``--json``: what was run where, one row per method, every run."""
    return {
        "schema": 1,
        "task": task.name,
        "metric": {
            "name": task.metric.name,
            "unit": task.metric.unit,
            "higher_is_better": task.metric.higher_is_better,
        },
        "data": {"source": dataset.source, "sha256": dataset.fingerprint},
        "recipe": results[0]["identity"]["recipe"],
        "environment": environment(specs[0]),
        "summary": summarise(results),
        "runs": list(results),
    }


def environment(spec: RunSpec) -> dict[str, Any]:
    """Return the versions and the device that the numbers belong to."""
    device = torch.device(spec.device)
    on_gpu = device.type == "cuda"
    return {
        "sdgp_cusparselt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "precision": spec.precision,
    }
