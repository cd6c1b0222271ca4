"""Values of the command line, checked while they are read; a wrong one ends in one sentence."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sdgp_cusparselt.errors import SDGPError

if TYPE_CHECKING:
    import torch

#: Stands for standard output where a path is asked for.
STDOUT = "-"
LARGEST = 2**31 - 1


class UsageError(SDGPError, ValueError):
    """What the command line asks for cannot be done; the message is the sentence to print."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises its one sentence, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message}; see {self.prog} --help")


def integer(minimum: int, maximum: int = LARGEST) -> Callable[[str], int]:
    """Return a reader of whole numbers from ``minimum`` to ``maximum``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            rule = f"a whole number of at least {minimum}"
            rule += f" and at most {maximum}" if value > maximum else ""
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return read


def number(
    minimum: float, *, above: bool = False, most: float = math.inf
) -> Callable[[str], float]:
    """Return a reader of finite numbers from ``minimum`` on, or above it, and up to ``most``."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low = value < minimum or (above and value == minimum)
        if not math.isfinite(value) or low or value > most:
            rule = f"a number {'above' if above else 'of at least'} {minimum:g}"
            rule += f" and at most {most:g}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return read


def sizes(text: str) -> tuple[int, ...]:
    """Read 3x224x224."""
    try:
        return tuple(integer(1)(part) for part in text.split("x"))
    except argparse.ArgumentTypeError:
        rule = "must be sizes of at least 1 such as 3x224x224"
        raise argparse.ArgumentTypeError(f"{rule}, got {text!r}") from None


def output_file(text: str) -> Path:
    """Read the path of a file that can be written, before any work is done for it."""
    path = Path(text)
    if not text or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be the path of a file, got {text!r}")
    _check_writable(path.parent, text)
    return path


def output_or_stdout(text: str) -> Path | str:
    """Read PATH, or - for standard output."""
    return STDOUT if text == STDOUT else output_file(text)


def output_folder(text: str) -> Path:
    """Read the path of a folder that files can be written to; it need not exist."""
    path = Path(text)
    if not text or (path.exists() and not path.is_dir()):
        raise argparse.ArgumentTypeError(f"must be a folder, got {text!r}")
    _check_writable(path, text)
    return path


def _check_writable(folder: Path, text: str) -> None:
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise argparse.ArgumentTypeError(f"must be in a folder that can be written, got {text!r}")


def device_of(text: str | None) -> "torch.device":
    """Return the device with that name; without one the GPU if there is one, else the CPU.

    Raises:
        UsageError: it is no CPU or CUDA device that torch sees.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text in (None, "auto"):
        return torch.device("cuda" if count else "cpu")
    kind, _, index = str(text).partition(":")
    known = kind == "cuda" and count and (not index or (index.isdigit() and int(index) < count))
    if text != "cpu" and not known:
        seen = f"cpu{', cuda' if count else ''}"
        seen += f" and cuda:0 to cuda:{count - 1}" if count else "; torch sees no CUDA device"
        raise UsageError(f"argument --device: must be one of {seen}, got {text!r}")
    return torch.device(str(text))
