"""The ``sdgp`` console script; ``python -m sdgp_cusparselt`` is the same."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from sdgp_cusparselt.commands.arguments import Parser
from sdgp_cusparselt.commands.console import (
    add_output_arguments,
    drop_broken_stdout,
    print_any_text,
)
from sdgp_cusparselt.errors import SDGPError
from sdgp_cusparselt.versions import __version__

#: subcommand -> (module in sdgp_cusparselt.commands, help). Only the chosen module is imported,
#: so that ``sdgp info`` works where another command's dependencies are missing.
COMMANDS: dict[str, tuple[str, str]] = {
    "check": ("check", "compare every backend of this machine with float64; exit code 1 if wrong"),
    "info": ("info", "print an environment report; never fails"),
    "bench": ("bench", "measure prune, pack, products, layers and steps beside their rivals"),
    "plan": ("plan", "predict dense and SDGP time of a model's training step, GEMM by GEMM"),
    "quality": ("quality", "predict from gradients how many more steps pruning costs, and where"),
    "train": ("train", "train dense and pruned networks side by side on real data"),
    "tune": ("tune", "prove and time cuSPARSELt's algorithms on this GPU, ahead of training"),
}
CANNOT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
#: What wrong values and broken environments raise; anything else is a fault of this package.
EXPECTED = (SDGPError, ValueError, TypeError, OSError, ImportError)


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser; only ``command`` gets its own arguments, because only it is imported."""
    parser = Parser(prog="sdgp", description="SDGP on 2:4 sparse tensor cores")
    parser.add_argument("--version", action="version", version=f"sdgp_cusparselt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module_name, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary)
        if name == command:
            module = importlib.import_module(f"sdgp_cusparselt.commands.{module_name}")
            module.add_arguments(sub)
            add_output_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code.

    2 where it cannot be done, with one sentence on stderr; ``SDGP_TRACEBACK=1`` shows where.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((a for a in arguments if not a.startswith("-")), None)
    prefix = f"sdgp {command}" if command in COMMANDS else "sdgp"
    print_any_text()
    try:
        return _run(command, arguments)
    except BrokenPipeError:
        drop_broken_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except EXPECTED as error:
        if os.environ.get("SDGP_TRACEBACK") == "1":
            raise
        print(f"{prefix}: {_sentence(error).removeprefix(f'{command}: ')}", file=sys.stderr)
        return CANNOT


def _run(command: str | None, arguments: Sequence[str]) -> int:
    try:
        args = build_parser(command).parse_args(arguments)
        code: int = args.run(args)
        return code
    finally:
        # Here, so that a pipe that nobody reads is seen; --help comes this way too.
        sys.stdout.flush()


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    return text or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
