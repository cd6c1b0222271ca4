"""Files that are whole or absent: checkpoints and JSON, written beside and then moved in place."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from sdgp_cusparselt.cache import write_atomically
from sdgp_cusparselt.errors import SDGPError


class CheckpointError(SDGPError):
    """A checkpoint or result does not belong to the run that asks for it, or cannot be read."""


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as indented JSON, atomically; NaN and Inf are refused, JSON has neither."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain values, loadable with ``weights_only=True``, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint of the run that ``identity`` describes, onto the CPU.

    Args:
        path: what ``save_checkpoint`` wrote.
        identity: what the checkpoint must have under ``identity``.

    Returns:
        The saved state.

    Raises:
        CheckpointError: the file is not a checkpoint, or belongs to another run.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["identity"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        # torch's own message can run over a page; it is in the chain for who wants it.
        raise CheckpointError(
            f"load_checkpoint: {path} must be a checkpoint of sdgp train, got a file that fails "
            f"to load with {type(error).__name__}. "
            "Remove the file, and the run starts anew."
        ) from error
    check_identity(path, saved, identity)
    return state


def check_identity(path: Path, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise CheckpointError that names every field in which two runs differ."""
    differing = [
        f"{key} is {saved.get(key)!r} there and {identity.get(key)!r} here"
        for key in sorted(saved.keys() | identity.keys())
        if saved.get(key) != identity.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"resume: {path} must belong to this run, got another one: {'; '.join(differing)}. "
            "Repeat the first call's options, or choose another --out."
        )
