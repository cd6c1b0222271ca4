"""``sdgp tune``: decide sparse or dense for every product of a model, before training needs it."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.gemm import Gemm
from sdgp_cusparselt.commands.arguments import integer, sizes
from sdgp_cusparselt.commands.console import Output
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.config.patterns import METHODS
from sdgp_cusparselt.errors import SDGPError
from sdgp_cusparselt.layers.convert import is_head
from sdgp_cusparselt.layers.modules import SDGPConv1D, sdgp_class_of
from sdgp_cusparselt.planner.gemms import DENSE_MULTIPLE, SPARSE_MULTIPLE, trace_step
from sdgp_cusparselt.planner.gemms import Gemm as TracedGemm
from sdgp_cusparselt.planner.models import PRESETS, load
from sdgp_cusparselt.products import routes
from sdgp_cusparselt.tuning import Decision, default_cache, tune
from sdgp_cusparselt.tuning.child import cusparselt_executor
from sdgp_cusparselt.tuning.decision import MATMUL, RIVALS, Key, describe_candidate
from sdgp_cusparselt.tuning.search import FULL
from sdgp_cusparselt.tuning.shapes import read_shapes
from sdgp_cusparselt.tuning.watchdog import Watchdog

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CANNOT, INTERRUPTED = 2, 130
FOLDED = "k x k convolutions run plain: adding columns up costs more than sparse cores save"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdgp tune``."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model",
        help=f"{', '.join(PRESETS)}; transformers:<model type or config.json>; "
        "or package.module:callable that returns a torch.nn.Module",
    )
    what.add_argument(
        "--shapes",
        type=Path,
        metavar="FILE",
        help="JSON or CSV of m, n, k and optionally dtype, dense_order, method, transpose, such as "
        "sdgp.record_shapes() writes it",
    )
    parser.add_argument("--batch", type=integer(1), help="samples in a step (with --model)")
    parser.add_argument("--sequence", type=integer(1), help="tokens in a sample (with --model)")
    parser.add_argument("--resolution", type=integer(1), help="image edge in pixels (with --model)")
    parser.add_argument("--shape", type=sizes, help="of a sample, such as 3x224x224 (with --model)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="with --model")
    parser.add_argument(
        "--prune", choices=METHODS[1:], default=SDGPConfig().prune, help="with --model"
    )
    parser.add_argument(
        "--grad-weight",
        choices=METHODS[1:],
        metavar="METHOD",
        help="also the grad_weight of linear layers, pruned along tokens (with --model)",
    )
    parser.add_argument("--device", default=None, metavar="DEVICE", help="cuda (default) or cuda:1")
    parser.add_argument("--force", action="store_true", help="tune also what the cache has")
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="search in this process, for GPUs that allow one only: algorithms that may hang are "
        "left out then, instead of tried in a process that is killed",
    )


def run(args: argparse.Namespace) -> int:
    """Tune, print the table; 2 where nothing can be tuned or the arguments name nothing."""
    backend = routes.LIBRARY
    reasons = backend.machine_reasons()
    if reasons:
        return _cannot(f"nothing to tune on this machine: {'; '.join(reasons)}")
    try:
        name = args.device or backend.machine.device_type
        # The index is part of the key, and tensors always have one.
        device = torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else name
        device = torch.device(device)
        keys, skipped = _products(args, device)
    except (ValueError, TypeError, OSError, ImportError, AttributeError, RuntimeError) as error:
        return _cannot(str(error))
    output = Output(args)
    for reason, count in skipped.items():
        output.note(f"sdgp tune: {count} products left out: {reason}")
    if not keys:
        return _cannot("no product to tune")
    decisions: list[Decision] = []
    try:
        _tune(
            keys, backend, decisions, force=args.force, in_process=args.in_process, quiet=args.quiet
        )
    except SDGPError as error:
        return _cannot(f"{error}; {len(decisions)} decisions are stored")
    except KeyboardInterrupt:
        print(f"sdgp tune: interrupted; {len(decisions)} decisions are stored", file=sys.stderr)
        return INTERRUPTED
    document = {
        "machine": backend.machine_key(device),
        "decisions": [decision.as_dict() for decision in decisions],
    }
    output.write_json(document)
    _print(output, decisions)
    return 0


def _cannot(why: str) -> int:
    print(f"sdgp tune: {why}", file=sys.stderr)
    return CANNOT


def _products(args: argparse.Namespace, device: torch.device) -> tuple[list[Key], dict[str, int]]:
    """Return what to tune, and what not with the reason."""
    keys = read_shapes(args.shapes, device) if args.shapes else []
    skipped = {FOLDED: sum(key.rival not in RIVALS for key in keys)}
    keys = [key for key in keys if key.rival in RIVALS]
    if args.model:
        keys, skipped = _of_model(args, device)
    keys = list(dict.fromkeys(key.measured for key in keys))
    return keys, {reason: count for reason, count in skipped.items() if count}


def _of_model(args: argparse.Namespace, device: torch.device) -> tuple[list[Key], dict[str, int]]:
    dtype = DTYPES[args.dtype]
    problem = load(
        args.model,
        batch=args.batch,
        sequence=args.sequence,
        resolution=args.resolution,
        shape=args.shape,
        dtype=dtype,
    )
    keys: dict[Key, None] = {}
    folded = 0
    for product in trace_step(problem.model, problem.inputs).gemms:
        layer = sdgp_class_of(problem.model.get_submodule(product.fqn))
        if product.prunable and product.fold_elements:
            folded += 1
        elif product.prunable:
            order: Literal["row", "col"] = "col" if layer is SDGPConv1D else "row"
            gemm = Gemm(product.m, product.n, product.k, dtype, order, device)
            keys[Key(gemm, args.prune, False, MATMUL.name)] = None
        elif args.grad_weight and layer and _has_sparse_grad_weight(product):
            reduced = product.k - product.k % SPARSE_MULTIPLE
            gemm = Gemm(product.m, product.n, reduced, dtype, "row", device)
            keys[Key(gemm, args.grad_weight, True, MATMUL.name)] = None
    return list(keys), {FOLDED: folded}


def _has_sparse_grad_weight(product: TracedGemm) -> bool:
    fits = not product.m % SPARSE_MULTIPLE and not product.n % DENSE_MULTIPLE
    linear = product.kind == "linear" and product.role == "grad_weight"
    return linear and fits and product.k >= SPARSE_MULTIPLE and not is_head(product.fqn)


def _tune(
    keys: Sequence[Key],
    backend: CusparseLtBackend,
    decisions: list[Decision],
    *,
    force: bool,
    in_process: bool,
    quiet: bool,
) -> None:
    """Tune one product after the other under a progress bar; the cache keeps each at once."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    hidden = quiet or not sys.stderr.isatty()
    with ExitStack() as stack:
        searcher = None
        if not in_process:
            machine = backend.machine
            arguments = (machine.device_type, machine.library().path, machine.cpu_capability)
            watchdog = Watchdog(partial(cusparselt_executor, *arguments))
            searcher = stack.enter_context(watchdog).search
        bar = Progress(*columns, TimeElapsedColumn(), console=console, disable=hidden)
        stack.enter_context(bar)
        task = bar.add_task("tune", total=len(keys))
        for key in keys:

            def show(done: int, total: int, step: str, key: Key = key) -> None:
                bar.update(task, description=f"{key.gemm.describe()}: {step}")

            decision = tune(
                key.gemm,
                backend,
                cache=default_cache(),
                method=key.method,
                transpose=key.transpose,
                rival=RIVALS[key.rival],
                limits=replace(FULL, progress=show),
                force=force,
                searcher=searcher,
            )
            decisions.append(decision)
            bar.advance(task)


def _print(output: Output, decisions: Sequence[Decision]) -> None:
    sparse = sum(d.use == "sparse" for d in decisions)
    stored = f"stored in {default_cache().folder}"
    output.prose(f"{sparse} of {len(decisions)} products run sparse; {stored}")
    table = Table(box=None, pad_edge=False)
    for column in ("product", "pruned by", "use", "algorithm"):
        table.add_column(column, overflow="fold")
    for column in ("pack us", "matmul us", "sparse us", "dense us", "speedup", "rejected"):
        table.add_column(column, justify="right")
    for d in decisions:
        times = (d.pack_us, d.matmul_us, d.sparse_us, d.dense_us)
        table.add_row(
            d.gemm.describe(),
            f"{d.method}{' transposed' if d.transpose else ''}",
            d.use,
            describe_candidate(d.candidate) if d.candidate else "",
            *("" if t is None else f"{t:.1f}" for t in times),
            "" if d.speedup is None else f"{d.speedup:.2f}",
            str(len(d.rejected)),
        )
    output.print()
    output.print(table)
    for d in decisions:
        if d.use == "dense":
            output.prose(f"{d.gemm.describe()} stays dense: {d.reason}")
