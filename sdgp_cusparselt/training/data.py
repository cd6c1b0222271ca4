"""Examples in memory, and the order in which a run sees them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """What random choices about an example depend on, together with its index and nothing else.

    Args:
        seed: of the run.
        epoch: 0-based.
    """

    seed: int
    epoch: int


class Examples(Protocol):
    """Examples of one split, wherever they are."""

    def __len__(self) -> int:
        """Return how many there are."""

    def prepare(self, indices: Tensor, draw: Draw | None = None) -> None:
        """Begin to read what ``batch`` will soon be asked for with the same arguments."""

    def batch(
        self, indices: Tensor, device: torch.device, draw: Draw | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return inputs and int64 targets at ``indices``; no ``draw`` is evaluation."""

    def content(self) -> Iterator[bytes]:
        """Yield what the fingerprint is made of."""


@dataclass(frozen=True)
class Split:
    """Examples in memory and their targets.

    Args:
        inputs: [N, ...] float32 images, or uint8 bytes of text.
        targets: [N] classes, or [N, T] the next byte at each position.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def prepare(self, indices: Tensor, draw: Draw | None = None) -> None:
        """Do nothing: the examples are in memory."""

    def batch(
        self, indices: Tensor, device: torch.device, draw: Draw | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the examples at ``indices`` on ``device``; integers become int64."""
        inputs = self.inputs[indices].to(device)
        if not inputs.is_floating_point():
            inputs = inputs.long()
        elif inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return inputs, self.targets[indices].to(device).long()

    def content(self) -> Iterator[bytes]:
        """Yield shape, dtype and bytes of both tensors."""
        for tensor in (self.inputs, self.targets):
            yield repr((tuple(tensor.shape), str(tensor.dtype))).encode()
            yield tensor.contiguous().numpy().tobytes()


@dataclass(frozen=True)
class Dataset:
    """Training and validation examples of one task, with a line that says where they are from."""

    train: Examples
    validation: Examples
    source: str

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of both splits' content: two runs compare only where it is the same."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            for part in split.content():
                digest.update(part)
        return digest.hexdigest()


def epoch_order(num_examples: int, seed: int, epoch: int) -> Tensor:
    """Return the order of one epoch, a pure function of its arguments.

    Methods compared under one seed therefore see the same batches, and a resumed run needs no
    generator state to go on with the right one.

    Args:
        num_examples: how many to shuffle.
        seed: of the run.
        epoch: 0-based.

    Returns:
        [num_examples] int64, a permutation.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return torch.from_numpy(order)


def shuffled_split(
    inputs: np.ndarray, targets: np.ndarray, num_validation: int, source: str
) -> Dataset:
    """Hold out ``num_validation`` examples, the same ones on every machine and for every seed."""
    order = np.random.default_rng(0).permutation(len(inputs))
    held_out, kept = order[:num_validation], order[num_validation:]
    return Dataset(
        train=_split(inputs[kept], targets[kept]),
        validation=_split(inputs[held_out], targets[held_out]),
        source=source,
    )


def _split(inputs: np.ndarray, targets: np.ndarray) -> Split:
    return Split(torch.from_numpy(inputs), torch.from_numpy(targets))
