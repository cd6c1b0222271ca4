"""Measure what pruning does to the gradient of every weight: python docs/gradient_bias.py

A pruned grad_input goes on to the layers below, so its error reaches every earlier weight gradient.
One step's error matters little if it averages out over steps; what remains of it matters. Both are
measured here, on weights that trained densely for a while; docs/results and docs/img get them.
"""

import argparse
import copy
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.progress import track
from torch import Tensor, nn

from sdgp_cusparselt.layers.convert import convert_
from sdgp_cusparselt.telemetry.colours import COLOURS
from sdgp_cusparselt.training.data import epoch_order
from sdgp_cusparselt.training.methods import Method, parse_method
from sdgp_cusparselt.training.run import RunSpec, Trainer
from sdgp_cusparselt.training.sweep import environment
from sdgp_cusparselt.training.tasks import get_task

ROOT = Path(__file__).parents[1]
#: A CNN, a ViT and a GPT, and the dense steps after which their gradients are measured.
MEASURED_AT = {"digits": 60, "mnist-vit": 200, "code-lm": 200}
METHODS = ("magnitude", "rescaled_magnitude", "mvue", "random")
NUM_BATCHES = 128
SEED = 20


class Means:
    """Sums of one contender's weight gradients over the even and over the odd batches.

    The product of two means over different batches has no noise in its expectation, where the
    square of one mean has the whole variance of a batch.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.halves: list[dict[str, Tensor]] = [{}, {}]
        self.cosines: dict[str, list[float]] = {name: [] for name in names}

    def add(self, batch: int, gradients: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
        """Take the gradients of one batch, and their cosine with the dense ones."""
        half = self.halves[batch % 2]
        for name, gradient in gradients.items():
            half[name] = half.get(name, 0) + gradient.double()
            cosine = nn.functional.cosine_similarity(gradient.flatten(), dense[name].flatten(), 0)
            self.cosines[name].append(float(cosine))


def rows(means: Means, dense: Means) -> list[dict[str, Any]]:
    """Return one row a weight.

        cosine_step = mean over batches of cos(p, g)
        cosine_mean = cos(E p, E g)
        bias        = |E p - E g| / |E g|

    Args:
        means: of the pruned gradients p.
        dense: of the dense ones, g, over the same batches.

    Returns:
        Rows in the order of the model; a square that noise made negative counts as 0.
    """
    found = []
    for name, cosines in means.cosines.items():
        p, g = ([half[name].flatten() for half in side.halves] for side in (means, dense))
        square_g = _cross(g, g)
        square_p = _cross(p, p)
        error = [a - b for a, b in zip(p, g, strict=True)]
        bias = max(0.0, _cross(error, error)) / square_g if square_g > 0 else float("nan")
        scale = max(0.0, square_p * square_g) ** 0.5
        found.append(
            {
                "weight": name,
                "cosine_step": sum(cosines) / len(cosines),
                "cosine_mean": _cross(p, g) / scale if scale else float("nan"),
                "bias": bias**0.5,
            }
        )
    return found


def _cross(a: list[Tensor], b: list[Tensor]) -> float:
    return float(a[0] @ b[1] + a[1] @ b[0]) / 2


def measure(
    trainer: Trainer, methods: Iterable[Method], num_batches: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each method, on the next batches and the weights of ``trainer``."""
    contenders = {"dense": trainer.model}
    for method in methods:
        model = copy.deepcopy(trainer.model)
        convert_(model, method.config("dense"), preset="all")
        contenders[method.spelling] = model
    names = [name for name, p in trainer.model.named_parameters() if p.dim() > 1]
    means = {spelling: Means(names) for spelling in contenders}
    order = epoch_order(len(trainer.dataset.train), SEED, epoch=10_000)
    size = trainer.spec.recipe.batch_size
    for index in track(range(num_batches), trainer.task.name):
        picked = order[torch.arange(index * size, (index + 1) * size) % len(order)]
        gradients: dict[str, dict[str, Tensor]] = {}
        for spelling, model in contenders.items():
            gradients[spelling] = _gradients(trainer, model, picked, names)
            means[spelling].add(index, gradients[spelling], gradients["dense"])
    return {spelling: rows(mean, means["dense"]) for spelling, mean in means.items()}


def _gradients(
    trainer: Trainer, model: nn.Module, picked: Tensor, names: list[str]
) -> dict[str, Tensor]:
    inputs, targets = trainer.dataset.train.batch(picked, torch.device("cpu"))
    model.train()
    logits = model(inputs).flatten(0, -2)
    smoothing = trainer.spec.recipe.label_smoothing
    loss = nn.functional.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, [parameters[name] for name in names])
    return dict(zip(names, found, strict=True))


def document(num_batches: int) -> dict[str, Any]:
    """Train each task densely for a while, measure it, and return everything as plain values."""
    tasks: dict[str, Any] = {}
    for name, steps in MEASURED_AT.items():
        task = get_task(name)
        spec = RunSpec(name, parse_method("dense"), SEED, task.recipe, backend="dense")
        trainer = Trainer(spec, task, task.load())
        for _ in range(steps):
            trainer.train_step()
        measured = measure(trainer, map(parse_method, METHODS), num_batches)
        tasks[name] = {"step": steps, "data": trainer.dataset.source, "methods": measured}
    return {"num_batches": num_batches, "environment": environment(spec), "tasks": tasks}


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw the angle between the mean gradients over the depth of the weight, a panel a task."""
    figure = Figure(figsize=(12, 3.9), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(content["tasks"]), sharey=True)
    for panel, (name, task) in zip(panels, content["tasks"].items(), strict=True):
        for index, (spelling, measured) in enumerate(task["methods"].items()):
            if spelling == "dense":
                continue
            style = {
                "color": COLOURS[index - 1],
                "marker": "o",
                "label": spelling.partition("@")[0],
            }
            angles = [_angle(row["cosine_mean"]) for row in measured]
            panel.plot(range(len(angles)), angles, markersize=3.5, linewidth=1.4, **style)
        panel.set_title(f"{name}, after {task['step']} dense steps", fontsize=10)
        panel.set_xlabel("weight, from input to output")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("degrees between the mean gradients\nover batches, pruned and dense")
    panels[0].legend(fontsize=8)
    figure.savefig(path)


def _angle(cosine: float) -> float:
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine))))


def main() -> None:
    """Write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, default=NUM_BATCHES)
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results/gradient-bias.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/img/gradient-bias.png")
    args = parser.parse_args()
    content = document(args.batches)
    args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(content, args.plot)


if __name__ == "__main__":
    main()
