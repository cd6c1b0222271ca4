"""``sdgp plan``: every GEMM of a training step and its predicted time on each GPU; needs no GPU."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from sdgp_cusparselt.cards.gpus import GPUS
from sdgp_cusparselt.commands.arguments import UsageError, integer, number, output_file, sizes
from sdgp_cusparselt.commands.console import Output
from sdgp_cusparselt.errors import SDGPError
from sdgp_cusparselt.layers.presets import Preset, default_preset
from sdgp_cusparselt.planner import report, weights_report
from sdgp_cusparselt.planner.gemms import Trace, trace_step
from sdgp_cusparselt.planner.models import PRESETS, Problem, load
from sdgp_cusparselt.planner.results import (
    PredictionError,
    measured_efficiency,
    prediction_errors,
    result_files,
)
from sdgp_cusparselt.planner.roofline import Forecast, Packing, forecast
from sdgp_cusparselt.planner.steps_ratios import MEASURED
from sdgp_cusparselt.planner.weights import memory

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_DEFAULT_PRESET = (
    "Planned as convert_ prunes a transformer by itself, the layers that read the residual stream: "
    "preset readers. Every layer: --preset all."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdgp plan``."""
    parser.add_argument(
        "--model",
        required=True,
        help=f"{', '.join(PRESETS)}; transformers:<model type or config.json>; "
        "or package.module:callable that returns a torch.nn.Module",
    )
    parser.add_argument("--batch", type=integer(1), help="samples in a step")
    parser.add_argument(
        "--sequence", type=integer(1), help="tokens in a sample (models that read ids)"
    )
    parser.add_argument("--resolution", type=integer(1), help="image edge in pixels")
    parser.add_argument(
        "--shape",
        type=sizes,
        help="shape of one sample, such as 3x224x224, for module:callable models",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--gpu",
        nargs="+",
        choices=GPUS,
        default=list(GPUS),
        metavar="GPU",
        help=f"some of {', '.join(GPUS)} (default: all)",
    )
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="names that stay dense"
    )
    parser.add_argument(
        "--include-heads", action="store_true", help="also prune the layers that make the outputs"
    )
    parser.add_argument(
        "--preset",
        choices=MEASURED,
        help="which products of a transformer are pruned, as convert_ has it, and what that is "
        "worth with the R that was measured for it (default: readers of a transformer that "
        "convert_ knows, otherwise all; without R)",
    )
    parser.add_argument(
        "--steps-ratio",
        "--r",
        type=number(0, above=True),
        metavar="R",
        help="steps to the same loss over those of dense training (sdgp quality): adds what the "
        "speedup of a step is worth then, in place of the preset's R",
    )
    parser.add_argument(
        "--fuse",
        action="store_true",
        help="let the backward of an activation pack the gradient that it makes, and compare",
    )
    parser.add_argument(
        "--heavy",
        type=number(0, most=1),
        default=0.0,
        metavar="SHARE",
        help="of the tokens that grad_input takes exactly, such as 0.06: counts their rows",
    )
    parser.add_argument(
        "--weights",
        action="store_true",
        help="also 2:4 weights: a step with each combination of 2:4 operands, and inference",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("bench/results"),
        help="folder of measured results, one folder a GPU (default: bench/results)",
    )
    parser.add_argument(
        "--details", action="store_true", help="also every GEMM, each assumption, and the sources"
    )
    parser.add_argument(
        "--limit", type=integer(0), default=12, help="rows of each GEMM table of --details"
    )
    parser.add_argument("--plot", metavar="PATH", type=output_file, help="write a PNG")


def run(args: argparse.Namespace) -> int:
    """Trace, predict, report.

    Raises:
        UsageError: the arguments name no model that can be traced.
    """
    if args.fuse and args.heavy:
        raise UsageError("--fuse and --heavy exclude each other: which tokens are heavy is known "
                         "only when their gradient is")  # fmt: skip
    problem, trace, preset = _traced(args)
    gpus = [GPUS[name] for name in args.gpu]
    efficiencies = [measured_efficiency(gpu, args.results) for gpu in gpus]
    how = Packing(args.fuse, args.heavy)
    forecasts = [forecast(trace, *card, how) for card in zip(gpus, efficiencies, strict=True)]
    unfused = [forecast(trace, *card) for card in zip(gpus, efficiencies, strict=True)]
    before = unfused if args.fuse else None
    ratio = report.steps_ratio(args.preset, args.steps_ratio, args.heavy)
    errors = [
        error
        for gpu, path in result_files(args.results)
        if gpu in gpus
        for error in prediction_errors(gpu, path)
    ]
    if args.plot:
        from sdgp_cusparselt.planner.plot import plot

        plot(args.plot, problem, forecasts)
    output = Output(args)
    data = report.as_json(problem, trace, forecasts, errors, ratio, before) | {"preset": preset}
    plans = None
    if args.weights:
        whole = trace if preset == "all" else _traced(args, preset="all")[1]
        plans = weights_report.card_plans(whole, _decoding(args), forecasts)
        data["weights"] = weights_report.as_json(whole, plans)
    output.write_json(data)
    _print(output, problem, trace, preset, forecasts, errors, args, ratio, before)
    if plans is not None:
        _print_weights(output, whole, plans)
    return 0


def _decoding(args: argparse.Namespace) -> Trace | None:
    """Return the trace of one token a sequence; None for a model that reads no tokens."""
    problem, trace, _ = _traced(args, sequence=None if args.shape else 1, preset="all")
    inputs = problem.inputs.values() if isinstance(problem.inputs, Mapping) else problem.inputs
    return trace if all(not x.is_floating_point() for x in inputs) else None


def _traced(
    args: argparse.Namespace, sequence: int | None = None, preset: Preset | None = None
) -> tuple[Problem, Trace, Preset]:
    """Return the problem, its step, and the preset: given, asked for, or convert_'s own."""
    asked = preset or args.preset
    try:
        problem = load(
            args.model,
            batch=args.batch,
            sequence=sequence or args.sequence,
            resolution=args.resolution,
            shape=args.shape,
            dtype=DTYPES[args.dtype],
        )
        chosen = asked or default_preset(problem.model)
        trace = trace_step(
            problem.model,
            problem.inputs,
            exclude=args.exclude,
            include_heads=args.include_heads,
            preset=chosen,
        )
    # Building and running a model is somebody else's code, which may raise anything.
    except Exception as error:
        own = isinstance(error, SDGPError) or str(error).startswith("plan: ")
        why = str(error).removeprefix("plan: ") if own else f"{type(error).__name__}: {error}"
        raise UsageError(f"{args.model} cannot be planned: {why}") from error
    if not trace.gemms:
        raise UsageError(f"{args.model} cannot be planned: its forward pass multiplies no matrices")
    if asked not in (None, "all") and not any(g.prunable for g in trace.gemms):
        raise UsageError(
            f"{args.model} cannot be planned with --preset {asked}: no layer of it is known "
            "to read a residual stream"
        )
    return problem, trace, chosen


def _print_weights(output: Output, trace: Trace, plans: list[weights_report.CardPlan]) -> None:
    """Print who wins with 2:4 weights, the two tables, and what is in them."""
    output.print()
    for line in weights_report.verdicts(plans):
        output.prose(line)
    output.print()
    output.print(weights_report.steps_table(plans))
    output.print()
    output.print(weights_report.inference_table(plans))
    output.print()
    for line in (*weights_report.NOTES, weights_report.memory_note(memory(trace))):
        output.prose(line)


def _print(
    output: Output,
    problem: Problem,
    trace: Trace,
    preset: Preset,
    forecasts: list[Forecast],
    errors: list[PredictionError],
    args: argparse.Namespace,
    ratio: report.StepsRatio | None,
    before: list[Forecast] | None,
) -> None:
    """Print a sentence for each card, the tables below, and where the numbers come from."""
    for result in forecasts:
        output.prose(report.verdict(result))
    if ratio is not None:
        for result in forecasts:
            output.prose(report.time_to_loss(result, ratio))
    output.print()
    output.print(report.overview(forecasts, before))
    output.print()
    notes = [*report.summary(problem, trace), *report.packing_notes(trace, forecasts, args.heavy)]
    if args.preset and ratio is None:
        notes.append("R of a preset with heavy tokens was not measured: give it with --r.")
    if args.preset is None and preset != "all":
        notes.append(_DEFAULT_PRESET)
    for line in notes if before else (report.COLUMNS_NOTE, *notes):
        output.prose(line)
    output.print()
    if args.details:
        output.print(report.details(trace, forecasts, errors, limit=args.limit))
        output.print()
        for line in report.sources(forecasts):
            output.prose(line)
        output.print()
    output.prose(report.CAVEAT + ("" if args.details else " Every GEMM and source: --details."))
