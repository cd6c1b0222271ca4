"""``sdgp bench``: measure this machine with the benchmarks of a checkout."""

import argparse
import contextlib
import importlib
import io
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import sdgp_cusparselt
from sdgp_cusparselt.commands.arguments import UsageError, number, output_folder
from sdgp_cusparselt.commands.console import Output, console
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.versions import version_of

#: What --parts takes -> the file that measures it, in the order in which they run.
PARTS = {
    "machine": "bench_machine.py",
    "gemm": "bench_gemm.py",
    "pack": "bench_parts.py",
    "grads": "bench_grads.py",
    "layers": "bench_layers.py",
    "weights": "bench_weights.py",
    "steps": "bench_steps.py",
    "models": "bench_models.py",
    "unstructured": "bench_unstructured.py",
}
FAILED, INTERRUPTED = 1, 130
PACKAGE = Path(sdgp_cusparselt.__file__).parent
#: Where pyproject.toml puts the benchmarks into a wheel.
PACKAGED = PACKAGE / "_bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sdgp bench``."""
    parser.add_argument(
        "--full", action="store_true", help="every shape, rival and compiled step (default: a few)"
    )
    parser.add_argument(
        "--parts",
        default=",".join(PARTS),
        metavar="LIST",
        help=f"some of {', '.join(PARTS)}, separated by commas (default: all)",
    )
    parser.add_argument(
        "--models", default="", metavar="LIST", help="models of bench/shapes.py (default: all)"
    )
    parser.add_argument(
        "--tokens", default="", metavar="LIST", help="such as 4096,16384 (default: all)"
    )
    parser.add_argument(
        "--time-limit",
        type=number(0),
        default=0.0,
        metavar="SECONDS",
        help="start nothing after this long; what is left is written down as not run",
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="DIR",
        help="folder of results; the card gets a folder in it (default: bench/results of a "
        "checkout, else bench-results)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, write the result file, print the summary; 1 if a result was wrong.

    Raises:
        ValueError: there is no checkout, or --parts, --models or --tokens name nothing in it.
    """
    root = find_checkout()
    parts = _parts(args.parts)
    _need_pytest_benchmark()
    output = Output(args)
    cuda = torch.cuda.is_available()
    if not cuda:
        output.note(
            "No CUDA device: measuring emulation and a stand-in library on this CPU. The times "
            "say that the code runs, nothing about speed."
        )
    with _importable(root):
        machine = _module("bench.machine")
        folder = (args.output or results_folder(root)) / machine.folder_name()
        target = result_path(folder, time.strftime("%Y-%m-%d"), machine.library()[0])
        folder.mkdir(parents=True, exist_ok=True)
        code, log = _measure(_arguments(args, root, parts, target, cuda), output.quiet)
        # pytest-benchmark before 5.3 opens the file at once and leaves it empty.
        if not target.exists() or not target.stat().st_size:
            target.unlink(missing_ok=True)
            print(f"{log}\nsdgp bench: nothing was measured", file=sys.stderr)
            return code or FAILED
        if code:
            print(log[-20_000:], file=sys.stderr)
        _show(target, output)
    output.note(f"wrote {target}")
    if root != PACKAGED:
        output.note(f"tables and plots: python -m bench.report {folder}")
    return code


def find_checkout() -> Path:
    """Return the folder whose benchmarks are run.

    This package's own checkout, or the working directory, or the copy that wheels bring.

    Raises:
        ValueError: there is none of these.
    """
    for root in (PACKAGE.parent, Path.cwd(), PACKAGED):
        if (root / "bench" / "conftest.py").is_file() and (root / "pyproject.toml").is_file():
            return root
    raise value_error(
        "find_checkout",
        "the working directory",
        "a checkout of the sources with its bench folder",
        Path.cwd(),
        "Clone the repository and run sdgp bench inside it.",
    )


def results_folder(root: Path) -> Path:
    """Return where results go by default: into the checkout, or beside the caller."""
    return Path("bench-results") if root == PACKAGED else root / "bench" / "results"


def result_path(folder: Path, date: str, library: str) -> Path:
    """Return <date>-pt<version>-cslt<version>.json; numbered where that exists already."""
    torch_version = torch.__version__.partition("+")[0]
    name = f"{date}-pt{torch_version}-cslt{library}"
    number, path = 1, folder / f"{name}.json"
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.json"
    return path


def _parts(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise value_error("bench", "--parts", f"some of {', '.join(PARTS)}", text, "Pick these.")
    return [name for name in PARTS if name in names]


def _need_pytest_benchmark() -> None:
    if version_of("pytest-benchmark") == "none":
        raise value_error(
            "bench",
            "pytest-benchmark",
            "installed",
            "no such package",
            "Run: pip install pytest pytest-benchmark matplotlib.",
        )


@contextlib.contextmanager
def _importable(root: Path) -> Iterator[None]:
    """Let ``bench`` and ``tests`` of the checkout be imported."""
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _arguments(
    args: argparse.Namespace, root: Path, parts: Sequence[str], target: Path, cuda: bool
) -> list[str]:
    """Return pytest's command line."""
    files = [str(root / "bench" / PARTS[part]) for part in parts]
    shown = ["sdgp", "bench", "--parts", ",".join(parts), "--dtype", args.dtype]
    shown += ["--full"] if args.full else []
    shown += ["--models", args.models] if args.models else []
    shown += ["--tokens", args.tokens] if args.tokens else []
    return [
        *files,
        f"--rootdir={root}",
        f"--config-file={root / 'pyproject.toml'}",
        *("-k", "gpu" if cuda else "cpu"),
        *("-p", "no:cacheprovider", "-p", "no:xdist"),
        # The tests' strictness would stop at the settings of plugins that benchmarks do not need.
        *("-o", "addopts=--strict-markers"),
        *("-q", "-rs", "--tb=short"),
        f"--bench-scope={'full' if args.full else 'quick'}",
        f"--bench-dtype={args.dtype}",
        f"--bench-models={args.models}",
        f"--bench-tokens={args.tokens}",
        f"--bench-time-limit={args.time_limit}",
        f"--bench-command={shlex.join(shown)}",
        f"--benchmark-json={target}",
    ]


class _Bar:
    """A pytest plugin: a progress bar in a terminal, a line for each file elsewhere."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self.console = console
        self.lines = not quiet and not console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.progress = Progress(
            *columns, TimeElapsedColumn(), console=console, disable=quiet or self.lines
        )
        self.task = self.progress.add_task("collecting", total=None)
        self.file = ""

    def pytest_collection_finish(self, session: Any) -> None:
        """Learn how many benchmarks there are."""
        self.progress.update(self.task, total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        """Show the benchmark that starts."""
        file, _, name = nodeid.partition("::")
        self.progress.update(self.task, description=name.partition("[")[2].rstrip("]")[:60])
        if file != self.file and self.lines:
            self.console.print(f"{time.strftime('%H:%M:%S')} {file}")
        self.file = file

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        """Count it."""
        self.progress.advance(self.task)


def _measure(arguments: list[str], quiet: bool) -> tuple[int, str]:
    """Run pytest in this process; return its exit code and what it printed.

    Raises:
        UsageError: it refuses the arguments, which name no model or no number of tokens.
    """
    import pytest

    # pytest captures descriptor 2 while a benchmark runs; the bar draws on a copy of it.
    with os.fdopen(os.dup(2), "w", encoding="utf-8") as stderr:
        bar = _Bar(console(stderr), quiet)
        printed, complained = io.StringIO(), io.StringIO()
        with (
            bar.progress,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(complained),
        ):
            code = int(pytest.main(arguments, plugins=[bar]))
    if code == pytest.ExitCode.USAGE_ERROR:
        raise UsageError(complained.getvalue().removeprefix("ERROR: ").replace("--bench-", "--"))
    if code == pytest.ExitCode.INTERRUPTED:
        return INTERRUPTED, f"{printed.getvalue()}interrupted"
    return (FAILED if code else 0), printed.getvalue()


def _show(target: Path, output: Output) -> None:
    """Print the summary of the file that was just written."""
    report, data = _module("bench.report"), _module("bench.report_data")
    results = data.load([target])
    found = {title: data.summary(results.of(*key)) for title, *key in report.HEADLINES}
    document = {"file": str(target), "measured": len(results.rows), "summary": found}
    output.write_json(document | {"not_run": list(results.not_run)})
    made = (report.summary_table, report.grad_input_table, report.model_table)
    for table in (make(results) for make in made):
        if table:
            output.print(f"{table}\n")
