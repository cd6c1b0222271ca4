"""Where and how every command prints: pipes, narrow and ASCII terminals, --json and --quiet.

Contract: the report goes to stdout, progress and notes to stderr. ``--json PATH`` also writes a
file, ``--json -`` makes stdout that JSON and nothing else, ``--quiet`` leaves errors only.
"""

import argparse
import codecs
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from sdgp_cusparselt.commands.arguments import STDOUT, output_or_stdout

#: Columns of a pipe, unless COLUMNS says otherwise: nobody folds its lines.
PIPE_COLUMNS = 160
#: An ellipsis stays one column wide: bars that are cut to the width count on it.
_ASCII = {"\u00b1": "+-", "\u00d7": "x", "\u2026": ".", "\u2013": "-", "\u00b5": "u"}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the command line end quietly, as for print."""
        raise BrokenPipeError


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --json and --quiet, which mean the same in every command."""
    parser.add_argument(
        "--json",
        type=output_or_stdout,
        metavar="PATH",
        help="also write the result as JSON; - writes it to stdout, and nothing else there",
    )
    parser.add_argument("--quiet", "-q", action="store_true", help="print errors only")


def console(stream: IO[str]) -> Console:
    """Return a console on stdout or stderr that prints words as they are, markup or not."""
    made = _Console(file=stream, highlight=False, markup=False, emoji=False)
    if not made.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        made.width = PIPE_COLUMNS
    return made


class Output:
    """The report of one command.

    Args:
        args: with what ``add_output_arguments`` declared.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.json: Path | str | None = args.json
        self.quiet: bool = args.quiet
        self.console = console(sys.stdout)

    @property
    def width(self) -> int:
        """Columns of stdout."""
        return self.console.width

    def print(self, renderable: Any = "") -> None:
        """Print a string as it is or a table of rich, unless stdout is quiet or JSON's."""
        if self.quiet or self.json == STDOUT:
            return
        if isinstance(renderable, str):
            print(renderable)
        elif self.console.is_terminal:
            self.console.print(renderable)
        else:
            with self.console.capture() as captured:
                self.console.print(renderable)
            # Tables pad their lines, which only a terminal with a background colour needs.
            print("\n".join(line.rstrip() for line in captured.get().splitlines()))

    def prose(self, text: str) -> None:
        """Print sentences, folded at the width; words longer than that stay whole."""
        self.print(folded(text, self.width))

    def note(self, text: str) -> None:
        """Print a line on stderr, unless quiet."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def write_json(self, document: Any) -> None:
        """Write the document where --json says; nowhere without it."""
        if self.json is None:
            return
        text = json.dumps(document, indent=1)
        if isinstance(self.json, str):
            print(text)
            return
        self.json.parent.mkdir(parents=True, exist_ok=True)
        self.json.write_text(text + "\n", encoding="utf-8")


def folded(text: str, width: int, first: str = "", rest: str = "") -> str:
    """Return a paragraph whose lines are at most ``width`` columns, but for words beyond that.

    Args:
        text: words.
        width: columns.
        first: what the first line begins with.
        rest: what the other lines begin with.
    """
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def print_any_text() -> None:
    """Let stdout and stderr print in ASCII what their encoding does not have."""
    codecs.register_error("sdgp", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="sdgp")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in text), error.end


def drop_broken_stdout() -> None:
    """Send to nowhere what is still to be flushed into a pipe that nobody reads."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
