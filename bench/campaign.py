"""Half an hour on a GPU, in calls of at most nine minutes: prove, measure, train.

    python bench/campaign.py --list
    OUT=build/campaign python bench/campaign.py models

Each stage is one call and writes under $OUT (build/campaign if unset): a log for each of its
commands, and their files. Minutes are estimates until they have been measured. A stage that runs
into its limit is interrupted as by Ctrl-C, which keeps what benchmarks and training have so far.
Set SDGP_PROBE to a script of your own that takes ``--json FILE`` to run it in the first stage.
"""

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET_MINUTES = 30
#: Of one stage: interrupted after the first, killed after the second.
LIMIT_S, GRACE_S = 540.0, 30.0
#: What stages import beyond torch; named before a GPU minute is spent on finding out.
NEEDED = ("triton", "numpy", "filelock", "rich", "cuda.pathfinder", "pytest", "pytest_benchmark")
NEEDED += ("pytest_timeout", "hypothesis")
TAIL_LINES = 60

SDGP = ("python", "-m", "sdgp_cusparselt")
GPU_TESTS = ("python", "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors")
BENCH = (*SDGP, "bench", "--full", "--output", "{out}/results")


@dataclass(frozen=True)
class Stage:
    """One call.

    Attributes:
        name: as on the command line.
        minutes: estimated.
        shows: what it is for.
        commands: run in order; ``{out}`` stands for the folder of results.
    """

    name: str
    minutes: int
    shows: str
    commands: tuple[tuple[str, ...], ...]


STAGES = (
    Stage(
        "probe",
        2,
        "what this card and its library can reach",
        (
            (*SDGP, "info", "--json", "-"),
            (*SDGP, "bench", "--parts", "machine", "--output", "{out}/results"),
        ),
    ),
    Stage(
        "check",
        4,
        "binding, backend, tuner, graphs: the GPU tests, packing aside",
        (
            (*SDGP, "check"),
            (*GPU_TESTS, "--ignore=tests/packing", "--junitxml={out}/check.xml", "tests"),
        ),
    ),
    Stage(
        "check-pack",
        5,
        "layouts learned and certified, kernels bit for bit",
        ((*GPU_TESTS, "--junitxml={out}/check-pack.xml", "tests/packing"),),
    ),
    Stage(
        "pack",
        2,
        "prune and pack in units of a clone, with rivals",
        (
            (
                *(*BENCH, "--parts", "pack", "--models", "llama-3-8b"),
                *("--tokens", "8192", "--time-limit", "240"),
            ),
        ),
    ),
    Stage(
        "gemm",
        4,
        "sparse products alone, and grad_input and grad_weight with packing",
        (
            (
                *(*BENCH, "--parts", "gemm,grads", "--models", "llama-3-8b,gpt-3-6.7b"),
                *("--tokens", "8192", "--time-limit", "400"),
            ),
        ),
    ),
    Stage(
        "models",
        4,
        "whole training steps: a GPT of 355 million parameters and ViT-L/16",
        ((*BENCH, "--parts", "models", "--models", "gpt-350m,vit-l-16", "--time-limit", "300"),),
    ),
    Stage(
        "models-1.3b",
        3,
        "whole training steps of a GPT of 1.3 billion parameters, and of one of its blocks",
        ((*BENCH, "--parts", "steps,models", "--models", "gpt-1.3b", "--time-limit", "300"),),
    ),
    Stage(
        "convergence",
        6,
        "validation loss of a GPT of 55 million parameters, three seeds, over time",
        (
            (*SDGP, "tune", "--shapes", "bench/code-lm-50m.csv", "--json", "{out}/tune.json"),
            (
                *(*SDGP, "train", "code-lm-50m", "--steps", "400", "--seeds", "3"),
                *("--precision", "bf16"),
                *("--methods", "dense,mvue,mvue@2:4+grad_weight=mvue"),
                *("--device", "cuda", "--out", "{out}/code-lm-50m", "--overwrite"),
            ),
        ),
    ),
)


def find_stage(text: str) -> Stage:
    """Return the stage of that name or number, counted from 1.

    Raises:
        argparse.ArgumentTypeError: there is none.
    """
    for number, stage in enumerate(STAGES, start=1):
        if text in (stage.name, str(number)):
            return stage
    names = ", ".join(stage.name for stage in STAGES)
    raise argparse.ArgumentTypeError(f"must be one of {names}, or 1..{len(STAGES)}, got {text!r}")


def commands_of(stage: Stage, out: Path) -> list[list[str]]:
    """Return the stage's commands for this interpreter and folder."""
    commands = [[word.replace("{out}", str(out)) for word in command] for command in stage.commands]
    probe = os.environ.get("SDGP_PROBE")
    if stage is STAGES[0] and probe:
        commands.append(["python", str(Path(probe).resolve()), "--json", f"{out}/probe.json"])
    return [[sys.executable, *words[1:]] for words in commands]


def listing(out: str) -> Iterator[str]:
    """Yield the calls in order, each with its minutes and the commands behind it."""
    total = sum(stage.minutes for stage in STAGES)
    yield f"{len(STAGES)} calls, about {total} of {BUDGET_MINUTES} GPU minutes, by estimate"
    for number, stage in enumerate(STAGES, start=1):
        yield f"\n{number}. about {stage.minutes} minutes: {stage.shows}"
        yield f"   python bench/campaign.py {stage.name}"
        for command in stage.commands:
            yield f"     {shlex.join(word.replace('{out}', out) for word in command)}"


def run_stage(stage: Stage, out: Path) -> int:
    """Run a stage's commands, the later ones even where an earlier one fails.

    Returns:
        The first exit code that is not 0, else 0.
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline, code = time.monotonic() + LIMIT_S, 0
    for number, command in enumerate(commands_of(stage, out), start=1):
        log = out / f"{stage.name}-{number}.log"
        print(f"+ {shlex.join(command)}", flush=True)
        started = time.monotonic()
        found = run_command(command, log, deadline - started)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(lines[-TAIL_LINES:]))
        print(f"= exit code {found} after {time.monotonic() - started:.0f} s, log in {log}")
        code = code or found
    return code


def run_command(command: Sequence[str], log: Path, seconds: float) -> int:
    """Run one command with its output in a file; interrupt it when its time is over."""
    paths = (str(ROOT), str(ROOT / "bindings"), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "SDGP_REQUIRE_GPU": "1",
    }
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=_hear_interrupts,
        )
        for limit, then in ((max(1.0, seconds), signal.SIGINT), (GRACE_S, signal.SIGKILL)):
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                process.send_signal(then)
        return process.wait()


def _hear_interrupts() -> None:
    """Undo that a shell's background jobs, and what they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def missing() -> list[str]:
    """Return which of the modules that stages import are not installed."""
    found = []
    for name in NEEDED:
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            spec = None
        found += [] if spec else [name]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """List the calls, or run one stage and return its exit code."""
    parser = argparse.ArgumentParser(prog="python bench/campaign.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("stage", nargs="?", type=find_stage, help="name or number")
    what.add_argument("--list", action="store_true", help="print the calls; runs anywhere")
    args = parser.parse_args(argv)
    out = os.environ.get("OUT") or "build/campaign"
    if args.list:
        print("\n".join(listing(out)))
        return 0
    for name in missing():
        print(f"campaign: {name} is not installed; what needs it will fail", file=sys.stderr)
    return run_stage(args.stage, Path(out).resolve())


if __name__ == "__main__":
    sys.exit(main())
