"""``sdgp plan``: every GEMM of a training step and its predicted time on each GPU; needs no GPU."""

import argparse
import json
import sys
from pathlib import Path

import torch

from sdgp_cusparselt.cards.gpus import GPUS
from sdgp_cusparselt.planner.gemms import trace_step
from sdgp_cusparselt.planner.models import PRESETS, load
from sdgp_cusparselt.planner.report import as_json, render
from sdgp_cusparselt.planner.results import (
    measured_efficiency,
    prediction_errors,
    result_files,
)
from sdgp_cusparselt.planner.roofline import forecast

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdgp plan``."""
    parser.add_argument(
        "--model",
        required=True,
        help=f"{', '.join(PRESETS)}; transformers:<model type or config.json>; "
        "or package.module:callable that returns a torch.nn.Module",
    )
    parser.add_argument("--batch", type=int, help="samples in a step")
    parser.add_argument("--sequence", type=int, help="tokens in a sample (models that read ids)")
    parser.add_argument("--resolution", type=int, help="image edge in pixels")
    parser.add_argument(
        "--shape",
        type=_shape,
        help="shape of one sample, such as 3x224x224, for module:callable models",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--gpu", nargs="+", choices=GPUS, default=list(GPUS), help="cards (default: all)"
    )
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="names that stay dense"
    )
    parser.add_argument(
        "--include-heads", action="store_true", help="also prune the layers that make the outputs"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("bench/results"),
        help="folder of measured results, one folder a GPU (default: bench/results)",
    )
    parser.add_argument("--limit", type=int, default=12, help="rows of each GEMM table")
    parser.add_argument("--json", metavar="PATH", help="write the plan as JSON; - for stdout")
    parser.add_argument("--plot", metavar="PATH", type=Path, help="write a PNG")


def _shape(text: str) -> tuple[int, ...]:
    """Read 3x224x224; argparse turns the ValueError of a wrong one into its own message."""
    return tuple(int(part) for part in text.split("x"))


def run(args: argparse.Namespace) -> int:
    """Trace, predict, report; 2 when the arguments name no model that can be traced."""
    try:
        problem = load(
            args.model,
            batch=args.batch,
            sequence=args.sequence,
            resolution=args.resolution,
            shape=args.shape,
            dtype=DTYPES[args.dtype],
        )
    except (ValueError, ImportError, AttributeError) as error:
        print(f"sdgp plan: {error}", file=sys.stderr)
        return 2
    trace = trace_step(
        problem.model, problem.inputs, exclude=args.exclude, include_heads=args.include_heads
    )
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
    if args.json:
        text = json.dumps(as_json(problem, trace, forecasts, errors), indent=1)
        if args.json == "-":
            print(text)
            return 0
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    print(render(problem, trace, forecasts, errors, limit=args.limit))
    return 0
