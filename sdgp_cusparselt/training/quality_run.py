"""Gradient quality of a task's own network: trained densely for a while, then measured."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.telemetry.quality import Converter, GradientQuality, gradient_quality
from sdgp_cusparselt.training.data import Dataset, epoch_order
from sdgp_cusparselt.training.methods import DENSE, Method
from sdgp_cusparselt.training.recipe import Recipe
from sdgp_cusparselt.training.run import RunSpec, Trainer
from sdgp_cusparselt.training.tasks import Task

#: An epoch that no training of a recipe reaches: its order is new to the network.
_UNSEEN_EPOCH = 10_000


def dense_trainer(
    task: Task,
    dataset: Dataset,
    recipe: Recipe,
    at: int,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Trainer:
    """Return a task's trainer after ``at`` dense steps of a recipe.

    Raises:
        ValueError: ``at`` lies outside the recipe.
    """
    trainer = Trainer(
        RunSpec(task.name, Method(DENSE), seed, recipe, model=task.model), task, dataset
    )
    if not 0 <= at <= trainer.total_steps:
        rule = f"a step of the recipe, 0 to {trainer.total_steps}"
        raise value_error(
            "dense_trainer", "at", rule, at, "Lengthen the recipe, or measure earlier."
        )
    while trainer.step < at:
        trainer.train_step()
        on_step()
    return trainer


def measure(
    trainer: Trainer,
    variants: Mapping[str, Converter],
    num_batches: int,
    on_batch: Callable[[], None] = lambda: None,
) -> list[GradientQuality]:
    """Return the quality of each variant on batches as large as the recipe's.

    Args:
        trainer: at the checkpoint of interest.
        variants: name -> function that converts a copy of its model.
        num_batches: at least 2.
        on_batch: called after each batch.
    """
    spec = trainer.spec

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        model.train()
        logits = model(inputs).float().flatten(0, -2)
        return F.cross_entropy(
            logits, targets.flatten(), label_smoothing=spec.recipe.label_smoothing
        )

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        train, size = trainer.dataset.train, spec.recipe.batch_size
        order = epoch_order(len(train), spec.seed, _UNSEEN_EPOCH)
        for index in range(num_batches):
            picked = order[torch.arange(index * size, (index + 1) * size) % len(order)]
            yield train.batch(picked, trainer.device)
            on_batch()

    return gradient_quality(trainer.model, batches(), loss, variants)


def as_rows(found: list[GradientQuality]) -> list[dict[str, Any]]:
    """Return the variants as plain values, with R beside rho; what is not finite is None."""
    return [
        asdict(quality)
        | {
            "steps_ratio": quality.steps_ratio,
            "critical_batches": _finite(quality.critical_batches),
            "signal": _finite(quality.signal),
        }
        for quality in found
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
