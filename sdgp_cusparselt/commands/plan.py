"""``sdgp plan``: every GEMM of a training step and its predicted time on each GPU; needs no GPU."""

import argparse
from pathlib import Path

import torch

from sdgp_cusparselt.cards.gpus import GPUS
from sdgp_cusparselt.commands.arguments import UsageError, integer, number, output_file, sizes
from sdgp_cusparselt.commands.console import Output
from sdgp_cusparselt.errors import SDGPError
from sdgp_cusparselt.planner import report
from sdgp_cusparselt.planner.gemms import Trace, trace_step
from sdgp_cusparselt.planner.models import PRESETS, Problem, load
from sdgp_cusparselt.planner.results import (
    PredictionError,
    measured_efficiency,
    prediction_errors,
    result_files,
)
from sdgp_cusparselt.planner.roofline import Forecast, forecast

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
        "--steps-ratio",
        type=number(0, above=True),
        metavar="R",
        help="steps to the same loss over those of dense training (sdgp quality): adds what the "
        "speedup of a step is worth then",
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
    problem, trace = _traced(args)
    gpus = [GPUS[name] for name in args.gpu]
    forecasts = [forecast(trace, gpu, measured_efficiency(gpu, args.results)) for gpu in gpus]
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
    output.write_json(report.as_json(problem, trace, forecasts, errors, args.steps_ratio))
    _print(output, problem, trace, forecasts, errors, args)
    return 0


def _traced(args: argparse.Namespace) -> tuple[Problem, Trace]:
    try:
        problem = load(
            args.model,
            batch=args.batch,
            sequence=args.sequence,
            resolution=args.resolution,
            shape=args.shape,
            dtype=DTYPES[args.dtype],
        )
        trace = trace_step(
            problem.model, problem.inputs, exclude=args.exclude, include_heads=args.include_heads
        )
    # Building and running a model is somebody else's code, which may raise anything.
    except Exception as error:
        own = isinstance(error, SDGPError) or str(error).startswith("plan: ")
        why = str(error).removeprefix("plan: ") if own else f"{type(error).__name__}: {error}"
        raise UsageError(f"{args.model} cannot be planned: {why}") from error
    if not trace.gemms:
        raise UsageError(f"{args.model} cannot be planned: its forward pass multiplies no matrices")
    return problem, trace


def _print(
    output: Output,
    problem: Problem,
    trace: Trace,
    forecasts: list[Forecast],
    errors: list[PredictionError],
    args: argparse.Namespace,
) -> None:
    """Print a sentence for each card, the tables below, and where the numbers come from."""
    for result in forecasts:
        output.prose(report.verdict(result))
    for result in forecasts if args.steps_ratio else ():
        output.prose(report.time_to_loss(result, args.steps_ratio))
    output.print()
    output.print(report.overview(forecasts))
    output.print()
    for line in (report.COLUMNS_NOTE, *report.summary(problem, trace)):
        output.prose(line)
    output.print()
    if args.details:
        output.print(report.details(trace, forecasts, errors, limit=args.limit))
        output.print()
        for line in report.sources(forecasts):
            output.prose(line)
        output.print()
    output.prose(report.CAVEAT + ("" if args.details else " Every GEMM and source: --details."))
