"""Python's standard library as text: found on this machine, split by whole files."""

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sdgp_cusparselt.errors import SDGPError

#: Not source in the ordinary sense: installed packages, tests, generated tables.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    | {"encodings", "pydoc_data", "lib2to3"}
)
#: One file in this many is held out for validation.
HOLD_OUT_ONE_IN = 10
MINIMUM_BYTES = 1_000_000


def source_files(root: Path) -> list[Path]:
    """Return the ``.py`` files below ``root``, in the order of their relative POSIX paths."""
    files = (path for path in root.rglob("*.py") if path.is_file())
    kept = [path for path in files if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)]
    return sorted(kept, key=lambda path: path.relative_to(root).as_posix())


def is_held_out(relative_path: str) -> bool:
    """Decide by a hash of the path alone, so that adding a file moves no other one."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HOLD_OUT_ONE_IN == 0


def read_corpus(root: Path | None = None) -> tuple[bytes, bytes]:
    """Read the training and the validation text.

    Args:
        root: folder to read; None means the running interpreter's standard library.

    Returns:
        Training bytes and validation bytes; no file has bytes in both.

    Raises:
        SDGPError: there is too little source to train on, as where the library is a zip file.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    train: list[Path] = []
    validation: list[Path] = []
    for path in source_files(root):
        relative = path.relative_to(root).as_posix()
        (validation if is_held_out(relative) else train).append(path)
    texts = _concatenate(train), _concatenate(validation)
    if min(map(len, texts)) < MINIMUM_BYTES // HOLD_OUT_ONE_IN or len(texts[0]) < MINIMUM_BYTES:
        raise SDGPError(
            f"code-lm: {root} must hold at least {MINIMUM_BYTES} bytes of Python source, got "
            f"{len(texts[0])} to train and {len(texts[1])} to validate on. "
            "Use an interpreter whose standard library is installed as files."
        )
    return texts


def windows(text: bytes, length: int, limit: int | None = None) -> np.ndarray:
    """Cut ``text`` into windows that overlap by the one byte that is a target only.

    Args:
        text: bytes.
        length: inputs per window; a window has ``length + 1`` bytes.
        limit: keep at most this many, evenly spaced; None keeps all.

    Returns:
        [num_windows, length + 1] uint8.
    """
    values = np.frombuffer(text, dtype=np.uint8)
    count = (len(values) - 1) // length
    starts = np.arange(count) * length
    if limit is not None and count > limit:
        starts = starts[np.arange(limit) * count // limit]
    cut: np.ndarray = values[starts[:, None] + np.arange(length + 1)]
    return cut


def _concatenate(paths: Iterable[Path]) -> bytes:
    return b"\n".join(path.read_bytes() for path in paths)
