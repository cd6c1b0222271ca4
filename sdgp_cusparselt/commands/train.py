"""``sdgp train``: dense beside pruned networks, from the same seeds, on real data."""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from sdgp_cusparselt.cache import write_atomically
from sdgp_cusparselt.commands.arguments import (
    UsageError,
    device_of,
    integer,
    number,
    output_file,
    output_folder,
)
from sdgp_cusparselt.commands.console import Output, console
from sdgp_cusparselt.config.choices import BackendName
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.products import routes
from sdgp_cusparselt.training.checkpoint import write_json
from sdgp_cusparselt.training.data import Dataset
from sdgp_cusparselt.training.equal_loss import SHARES, dense_specs, equal_loss_document
from sdgp_cusparselt.training.interrupts import StopSignal
from sdgp_cusparselt.training.methods import SWEEPS, Method, parse_method, parse_methods
from sdgp_cusparselt.training.plots import check_matplotlib, plot_curves, plot_rows
from sdgp_cusparselt.training.progress import SweepProgress
from sdgp_cusparselt.training.recipe import Recipe
from sdgp_cusparselt.training.recipe_file import is_task, open_task, shipped_recipes
from sdgp_cusparselt.training.report import (
    STEPS_TO_EQUAL_LOSS,
    aligned_rows,
    markdown_rows,
    markdown_table,
    terminal_table,
    verdict,
)
from sdgp_cusparselt.training.run import Precision, RunSpec, Stopped
from sdgp_cusparselt.training.sweep import check_methods, plan_runs, report_document, run_sweep
from sdgp_cusparselt.training.tasks import TASKS, Task

DEFAULT_METHODS = "dense,mvue,magnitude,random"
#: Options of the command line that replace one field of the task's recipe.
RECIPE_OPTIONS = ("epochs", "steps", "batch_size", "gradient_accumulation", "learning_rate")
#: More than this is a slip of the hand.
LARGEST_SWEEP = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sdgp train``."""
    names = "; ".join(f"{task.name}: {task.summary}" for task in TASKS.values())
    recipes = f"recipes for --data: {', '.join(shipped_recipes())}; or the path of a .toml file"
    parser.add_argument("task", type=_task_word, metavar="task", help=f"{names}; {recipes}")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder that the recipe reads")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--methods",
        default=DEFAULT_METHODS,
        metavar="LIST",
        help="dense, or a prune method with an optional n:m such as magnitude@1:4, an optional "
        "share of heavy tokens such as mvue+heavy=0.06, of steps that are dense such as "
        "mvue+warmup=0.2+tail=0.1, and an optional method for grad_weight such as "
        "none+grad_weight=mvue, after an optional preset such as readers:mvue, separated by commas "
        "(default: %(default)s)",
    )
    what.add_argument(
        "--sweep",
        choices=list(SWEEPS),
        help="table1: all rows of the paper's CIFAR-10 table; gradient-bias: biased and unbiased "
        "methods for grad_input and for grad_weight; presets: which layers of a transformer; "
        "weights: recipes for 2:4 weights; unstructured: 50 to 95 %% of the weights anywhere",
    )
    parser.add_argument(
        "--seeds", type=integer(1, LARGEST_SWEEP), default=1, metavar="K", help="how many seeds"
    )
    parser.add_argument(
        "--first-seed",
        type=integer(0),
        default=0,
        metavar="S",
        help="seeds S .. S+K-1; take fresh ones to judge what was chosen by looking at others",
    )
    parser.add_argument(
        "--equal-loss",
        action="store_true",
        help="also train dense at "
        + ", ".join(f"{share:.0%}" for share in SHARES).replace("%", "%%")
        + " of the steps, and say how many more steps than dense each method takes to its loss",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=integer(1), help="passes over the data (default: the task's)"
    )
    length.add_argument("--steps", type=integer(1), help="optimizer steps (default: the task's)")
    parser.add_argument(
        "--evaluations", type=integer(1), metavar="N", help="in a run (default: the task's)"
    )
    parser.add_argument("--batch-size", type=integer(1), metavar="N")
    parser.add_argument(
        "--gradient-accumulation",
        type=integer(1),
        metavar="PARTS",
        help="of a batch, one after another",
    )
    parser.add_argument("--learning-rate", type=number(0, above=True), metavar="LR")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--backend", choices=get_args(BackendName), default="auto")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32")
    parser.add_argument(
        "--out",
        type=output_folder,
        metavar="DIR",
        help="checkpoints, results.json, results.md and curves.png (default: runs/<task>)",
    )
    parser.add_argument(
        "--markdown", type=output_file, metavar="PATH", help="default: DIR/results.md"
    )
    parser.add_argument("--plot", type=output_file, metavar="PATH", help="default: DIR/curves.png")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with what DIR holds")
    again.add_argument("--overwrite", action="store_true", help="do the runs in DIR anew")


def run(args: argparse.Namespace) -> int:
    """Train, print verdict and table, write JSON, Markdown and plot; return the exit code."""
    output = Output(args)
    task = open_task(args.task, args.data)
    if args.evaluations is not None:
        task = replace(task, evaluations=args.evaluations)
    out = args.out if args.out is not None else Path("runs") / task.name
    methods, recipe, device = _methods(args), _recipe(args, task), str(device_of(args.device))
    backend = _backend(args, device)
    specs = plan_runs(
        task, methods, args.seeds, recipe, device, args.precision, backend, args.first_seed
    )
    check_methods(task, methods)
    check_matplotlib()
    dataset = task.load()
    sweeps = {out: specs}
    if args.equal_loss:
        others = dense_specs("train", task, specs, len(dataset.train))
        sweeps |= {out / f"dense-{steps}": dense for steps, dense in others.items()}
    for folder, planned in sweeps.items():
        _prepare(folder, planned, resume=args.resume, overwrite=args.overwrite)
    return _train(args, task, dataset, sweeps, output)


def _train(
    args: argparse.Namespace,
    task: Task,
    dataset: Dataset,
    sweeps: dict[Path, list[RunSpec]],
    output: Output,
) -> int:
    stop, (out, *others) = StopSignal(), sweeps
    count = sum(len(specs) for specs in sweeps.values())
    progress = SweepProgress(count, console(sys.stderr), quiet=output.quiet)
    try:
        with stop, progress as bars:
            results = {
                folder: run_sweep(specs, task, dataset, folder, stop, bars.on_run, bars.on_step)
                for folder, specs in sweeps.items()
            }
    except Stopped as stopped:
        print(f"sdgp train: {stopped}. To go on: {_resume_command(args, out)}", file=sys.stderr)
        return stop.exit_code
    document = report_document(task, dataset, sweeps[out], results[out])
    if others:
        document["equal_loss"] = equal_loss_document(
            document, [run for folder in others for run in results[folder]]
        )
    document["command"] = _command(args)
    _publish(args, task, document, out, output)
    return 0


def _publish(
    args: argparse.Namespace, task: Task, document: dict[str, Any], out: Path, output: Output
) -> None:
    """Print verdict and table, write the three files and say where they are."""
    paths = {
        "JSON": out / "results.json",
        "Markdown": args.markdown or out / "results.md",
        "plot": args.plot or out / "curves.png",
    }
    write_json(paths["JSON"], document)
    output.write_json(document)
    ratios = document.get("equal_loss", {}).get("table")
    more = f"\n{markdown_rows(ratios)}\n\n{STEPS_TO_EQUAL_LOSS}\n" if ratios else ""
    text = f"{markdown_table(document, task.metric)}{more}\nMade by `{document['command']}`.\n"
    # Paths of another encoding than the terminal's come as surrogates.
    encoded = text.encode("utf-8", "surrogateescape")
    write_atomically(paths["Markdown"], lambda file: file.write(encoded))
    draw = plot_rows if args.sweep else plot_curves
    draw(document, task.metric, paths["plot"])
    output.prose(verdict(document, task.metric))
    output.print()
    output.print(terminal_table(document, task.metric, output.width))
    output.print()
    if ratios:
        output.print(aligned_rows(ratios))
        output.prose(STEPS_TO_EQUAL_LOSS)
        output.print()
    for name, path in paths.items():
        output.print(f"{name}: {path}")


def _task_word(text: str) -> str:
    if not is_task(text):
        names = ", ".join([*TASKS, *shipped_recipes()])
        raise argparse.ArgumentTypeError(f"must be one of {names}, or a .toml file, got {text!r}")
    return text


def _methods(args: argparse.Namespace) -> tuple[Method, ...]:
    if args.sweep:
        return tuple(parse_method(entry) for entry in SWEEPS[args.sweep])
    return parse_methods(args.methods)


def _recipe(args: argparse.Namespace, task: Task) -> Recipe:
    given = {name: getattr(args, name) for name in RECIPE_OPTIONS}
    return task.recipe.replace(**{name: v for name, v in given.items() if v is not None})


def _backend(args: argparse.Namespace, device: str) -> BackendName:
    """Return the backend; a forced one that cannot run here ends the command before any training.

    Raises:
        UsageError: it cannot.
    """
    on_cpu = device == "cpu"
    for status in routes.backend_status():
        if status.name == args.backend and not status.available:
            raise UsageError(f"argument --backend: {args.backend} cannot run: {status.reason}")
    if on_cpu and args.backend == "cusparselt":
        raise UsageError("argument --backend: cusparselt cannot run on --device cpu")
    # On a CPU nothing else can run, and no layer needs to announce that it is so.
    backend: BackendName = "dense" if on_cpu and args.backend == "auto" else args.backend
    return backend


def _prepare(out: Path, specs: list[RunSpec], *, resume: bool, overwrite: bool) -> None:
    """Keep an earlier call's runs unless told to go on with them or to do them anew."""
    if out.exists() and not out.is_dir():
        raise value_error("train", "--out", "a folder", out, "Choose another --out.")
    files = [out / f"{spec.name}{suffix}" for spec in specs for suffix in (".pt", ".json")]
    earlier = [path for path in files if path.exists()]
    if earlier and not (resume or overwrite):
        rule = "a folder without these runs"
        fix = "Pass --resume to go on with them, --overwrite to do them anew, or another --out."
        raise value_error("train", "--out", rule, f"{out} with {earlier[0].name}", fix)
    for path in earlier if overwrite else ():
        path.unlink()


def _command(args: argparse.Namespace, *, without: tuple[str, ...] = ()) -> str:
    """Return the call as a shell would read it."""
    words = ["sdgp", "train", args.task]
    if args.data is not None:
        words += ["--data", str(args.data)]
    if args.sweep or args.methods != DEFAULT_METHODS:
        words += ["--sweep", args.sweep] if args.sweep else ["--methods", args.methods]
    words += ["--seeds", str(args.seeds)]
    words += ["--equal-loss"] if args.equal_loss else []
    if args.first_seed:
        words += ["--first-seed", str(args.first_seed)]
    for name in (
        *RECIPE_OPTIONS,
        "evaluations",
        "device",
        "precision",
        "backend",
        "out",
        "json",
        "markdown",
        "plot",
    ):
        value = getattr(args, name)
        if value is not None and name not in without:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _resume_command(args: argparse.Namespace, out: Path) -> str:
    return f"{_command(args, without=('out',))} --out {shlex.quote(str(out))} --resume"
