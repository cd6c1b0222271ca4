"""CIFAR-10's binary version: read into memory as bytes, normalised batch by batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.training.data import Dataset, Draw
from sdgp_cusparselt.training.images import normalise

SHAPE = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32
NUM_CLASSES = 10
#: Folder that the archive unpacks to.
FOLDER = "cifar-10-batches-bin"
TRAINING_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"


@dataclass(frozen=True)
class PixelSplit:
    """Images in memory as bytes, and their classes.

    Args:
        pixels: [N, C, H, W] uint8.
        targets: [N] uint8 classes.
        mean: C values in units of a pixel, so 0 to 255.
        std: C values, likewise.
    """

    pixels: Tensor
    targets: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def prepare(self, indices: Tensor, draw: Draw | None = None) -> None:
        """Do nothing: the images are in memory."""

    def batch(
        self, indices: Tensor, device: torch.device, draw: Draw | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return normalised float32 images, channels_last, and int64 targets on ``device``."""
        images = normalise(self.pixels[indices].to(device), self.mean, self.std)
        return images, self.targets[indices].to(device).long()

    def content(self) -> Iterator[bytes]:
        """Yield shape, normalisation and bytes."""
        yield repr((tuple(self.pixels.shape), self.mean, self.std)).encode()
        yield self.pixels.contiguous().numpy().tobytes()
        yield self.targets.contiguous().numpy().tobytes()


def read_cifar10(folder: Path, mean: Sequence[float], std: Sequence[float]) -> Dataset:
    """Read the five training files and the test file.

    Args:
        folder: with ``data_batch_1.bin`` and the others, or with ``cifar-10-batches-bin``.
        mean: of red, green and blue, 0 to 255.
        std: likewise.

    Raises:
        ValueError: a file is missing, has a size that no records have, or labels above 9.
    """
    inner = folder / FOLDER
    root = inner if inner.is_dir() else folder
    train = [_read_records(root / name) for name in TRAINING_FILES]
    test = _read_records(root / TEST_FILE)
    return Dataset(
        train=_split(np.concatenate(train), tuple(mean), tuple(std)),
        validation=_split(test, tuple(mean), tuple(std)),
        source=f"CIFAR-10, {sum(map(len, train)):,} training images",
    )


def _read_records(path: Path) -> np.ndarray:
    """Return [num_records, 3073] uint8: a label, then 1,024 red, green and blue values each."""
    fix = "Download CIFAR-10's binary version anew, not the Python one and not CIFAR-100."
    if not path.is_file():
        raise value_error("read_cifar10", str(path), "a file", "none", fix)
    size = path.stat().st_size
    if size == 0 or size % RECORD_BYTES:
        rule = f"whole records of {RECORD_BYTES} bytes"
        raise value_error("read_cifar10", str(path), rule, f"{size} bytes", fix)
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, RECORD_BYTES)
    wrong = np.flatnonzero(records[:, 0] >= NUM_CLASSES)
    if len(wrong):
        got = f"{records[wrong[0], 0]} in record {wrong[0]}"
        raise value_error("read_cifar10", str(path), "labelled 0 to 9", got, fix)
    return records


def _split(records: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> PixelSplit:
    pixels = np.ascontiguousarray(records[:, 1:]).reshape(-1, *SHAPE)
    targets = np.ascontiguousarray(records[:, 0])
    return PixelSplit(torch.from_numpy(pixels), torch.from_numpy(targets), mean, std)
