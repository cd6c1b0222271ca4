"""``sdgp quality``: what pruning would cost the weight gradients, and how many steps that is."""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from rich.progress import Progress
from rich.table import Table

from sdgp_cusparselt.commands.arguments import integer, number
from sdgp_cusparselt.commands.console import Output, console
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.config.patterns import METHODS
from sdgp_cusparselt.layers.presets import Preset, configs_of
from sdgp_cusparselt.telemetry.quality import (
    GradientQuality,
    group_variants,
    preset_variants,
    recommend,
)
from sdgp_cusparselt.training.quality_run import as_rows, dense_trainer, measure
from sdgp_cusparselt.training.recipe_file import open_task

#: Times the recipe's batch, for which R is predicted as well.
LARGER = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sdgp quality``."""
    parser.add_argument("task", help="a task or recipe of sdgp train, such as code-lm")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder that the recipe reads")
    parser.add_argument(
        "--steps", type=integer(1), help="length of the recipe (default: the task's)"
    )
    parser.add_argument("--at", type=integer(0), metavar="STEP", help="default: half of them")
    parser.add_argument("--batches", type=integer(2), default=32, metavar="K")
    parser.add_argument("--prune", choices=METHODS, default="mvue")
    parser.add_argument(
        "--budget",
        type=number(1),
        default=1.03,
        metavar="R",
        help="largest R to recommend layers for",
    )
    parser.add_argument("--seed", type=integer(0), default=0)


def run(args: argparse.Namespace) -> int:
    """Train densely, measure, print a recommendation and two tables; return the exit code."""
    output = Output(args)
    task = open_task(args.task, args.data)
    recipe = task.recipe if args.steps is None else task.recipe.replace(steps=args.steps)
    dataset = task.load()
    at = recipe.total_steps(len(dataset.train)) // 2 if args.at is None else args.at
    shown = console(sys.stderr)
    if not shown.is_terminal:
        output.note(f"{at} dense steps, then {args.batches} batches in each way of pruning")
    hidden = output.quiet or not shown.is_terminal
    with Progress(console=shown, transient=True, disable=hidden) as bars:
        steps = bars.add_task("dense steps", total=at)
        trainer = dense_trainer(task, dataset, recipe, at, args.seed, lambda: bars.advance(steps))
        config = SDGPConfig(prune=args.prune, backend="dense")
        presets = preset_variants(config, _presets(trainer.model, config))
        groups = group_variants(trainer.model, config)
        torch.manual_seed(args.seed)
        batches = bars.add_task("batches", total=args.batches)
        found = measure(trainer, presets | groups, args.batches, lambda: bars.advance(batches))
    chosen = recommend(found[len(presets) :], args.budget)
    document: dict[str, Any] = {"task": task.name, "at": at, "batches": args.batches}
    output.write_json(document | {"prune": args.prune, "variants": as_rows(found)})
    _print(output, found[: len(presets)], found[len(presets) :], chosen, args.budget)
    return 0


def _presets(model: torch.nn.Module, config: SDGPConfig) -> tuple[Preset, ...]:
    """Return the presets that find their layers in a model."""
    names: list[Preset] = []
    for preset in get_args(Preset):
        try:
            configs_of(model, preset, config)
        except ValueError:  # no transformer
            continue
        names.append(preset)
    return tuple(names)


def _print(
    output: Output,
    presets: list[GradientQuality],
    groups: list[GradientQuality],
    chosen: list[GradientQuality],
    budget: float,
) -> None:
    names = ", ".join(group.name for group in chosen) or "none"
    share = sum(group.flop_share for group in chosen)
    output.prose(f"Within R = {budget}: {names} ({share:.1%} of the backward FLOPs).")
    for title, rows in (("presets", presets), ("one group of layers at a time", groups)):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column("pruned", overflow="fold")
        for column in ("share of FLOPs", "R = 1 + rho", f"batch x {LARGER}", "bias", "signal"):
            table.add_column(column, justify="right")
        for row in rows:
            ratios = f"{row.steps_ratio:.3f}", f"{row.steps_ratio_at(LARGER):.3f}"
            table.add_row(
                row.name, f"{row.flop_share:.1%}", *ratios, f"{row.bias:.3f}", f"{row.signal:.1f}"
            )
        output.print()
        output.print(table)
    output.prose("R counts steps to the same loss; a bias does not average out and is not in it.")
    critical = (presets + groups)[0].critical_batches
    output.prose(
        f"The critical batch is about {critical:.2g} of these batches: of larger ones noise limits "
        f"the progress less, and R is smaller. signal: the mean gradient over the pruning's noise; "
        "below 1.7, the square root of 3, training in FP4 was seen to stall."
    )
