"""Measure what pruning a language model's head costs in loss: python docs/head_pruning.py

Trains the task code-lm with everything dense but the gradient of the logits, which
``sdgp.functional.linear_cross_entropy`` prunes; docs/results/code-lm-head.json gets the losses.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.functional import linear_cross_entropy
from sdgp_cusparselt.planner.report import table as markdown
from sdgp_cusparselt.training.methods import DENSE, parse_method
from sdgp_cusparselt.training.run import RunSpec, Trainer
from sdgp_cusparselt.training.sweep import environment
from sdgp_cusparselt.training.tasks import get_task

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "code-lm-head.json"
TASK = "code-lm"
#: Methods of the head alone, as ``sdgp train --methods`` spells them.
METHODS = (DENSE, "mvue@2:4", "none@2:4+grad_weight=mvue")
STEPS = 200
SEEDS = (30, 31, 32)


class _Head(nn.Linear):
    """Hands the loss its own input while training, so that no logits are made."""

    def forward(self, input: Tensor) -> Tensor:
        return input if self.training else super().forward(input)


class HeadTrainer(Trainer):
    """Trains densely, but for the gradient of the logits."""

    head: SDGPConfig | None = None

    def prune_head(self, config: SDGPConfig | None) -> None:
        """Have the loss make and prune the gradient of the logits."""
        self.head = config
        self.model.lm_head.__class__ = _Head  # type: ignore[assignment]

    def _loss(  # type: ignore[override]
        self, logits: Tensor, targets: Tensor, smoothing: float = 0.0, reduce: str = "mean"
    ) -> Any:
        if not self.model.training:
            return Trainer._loss(logits, targets, smoothing, reduce)
        weight = cast(Tensor, self.model.lm_head.weight)
        options: dict[str, Any] = {"config": self.head, "label_smoothing": smoothing}
        return linear_cross_entropy(logits, weight, targets, reduction=reduce, **options)


def spec_of(seed: int, steps: int) -> RunSpec:
    """Return the run that the head's method is added to."""
    task = get_task(TASK)
    recipe = task.recipe.replace(steps=steps)
    return RunSpec(task.name, parse_method(DENSE), seed, recipe)


def train(method: str, seed: int, steps: int) -> dict[str, float]:
    """Return validation loss in bits per byte and training loss in nats at the end."""
    task, spec = get_task(TASK), spec_of(seed, steps)
    trainer = HeadTrainer(spec, task, task.load())
    trainer.prune_head(parse_method(method).config())
    trainer.train()
    last = trainer.history[-1]
    return {"metric": last["metric"], "train_loss": last["train_loss"]}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each method its mean, its spread, and the difference to dense of the same seed."""
    dense = {run["seed"]: run["metric"] for run in runs if run["method"] == DENSE}
    found = []
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = {r["seed"]: r["metric"] for r in runs if r["method"] == method}
        differences = [mine[seed] - dense[seed] for seed in mine if seed in dense]
        found.append(
            {
                "method": method,
                "seeds": list(mine),
                "mean": statistics.fmean(mine.values()),
                "difference_mean": statistics.fmean(differences),
                "difference_std": statistics.stdev(differences) if len(differences) > 1 else None,
            }
        )
    return found


def table(document: dict[str, Any]) -> str:
    """Return the table of docs/head.md."""
    header = ["head", "seeds", "bits per byte", "minus dense of the same seed"]
    rows = []
    for row in document["summary"]:
        spread = row["difference_std"]
        difference = f"{row['difference_mean']:+.4f}"
        if spread is not None:
            difference += f" ± {spread:.4f}"
        label = parse_method(row["method"]).label
        difference = "" if row["method"] == DENSE else difference
        rows.append([label, len(row["seeds"]), f"{row['mean']:.4f}", difference])
    return markdown(header, rows)


def main() -> None:
    """Train every method with every seed; go on with what the result file holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python docs/head_pruning.py --steps {args.steps} --seeds "
    document: dict[str, Any] = {
        "schema": 1,
        "task": TASK,
        "steps": args.steps,
        "command": command + " ".join(map(str, args.seeds)),
        "environment": environment(spec_of(0, args.steps)),
        "runs": [],
    }
    if args.out.exists():
        document["runs"] = json.loads(args.out.read_text(encoding="utf-8"))["runs"]
    runs = document["runs"]
    for seed in args.seeds:
        for method in METHODS:
            if any((r["method"], r["seed"]) == (method, seed) for r in runs):
                continue
            runs.append({"method": method, "seed": seed, **train(method, seed, args.steps)})
            document["summary"] = summary(runs)
            args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            print(runs[-1], flush=True)


if __name__ == "__main__":
    main()
