"""Folders of images, one per class, decoded in threads a batch ahead of the model."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdgp_cusparselt.errors import SDGPError, value_error
from sdgp_cusparselt.extras import require
from sdgp_cusparselt.training.data import Dataset, Draw
from sdgp_cusparselt.training.images import normalise

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
#: A random crop has this share of the area and this width / height, as in Inception's training.
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
#: Side of the centre crop as a share of the shorter side.
CENTRE_SHARE = 224 / 256
#: Sizes between the first and the last are multiples of this.
SIZE_STEP = 32

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Sizes:
    """Sides in pixels of the square images that a run sees.

    Args:
        first: in training at the start.
        last: in training at the end; equals ``first`` where there is no ramp.
        ramp: epochs from which and until which the size grows from first to last.
        evaluation: in evaluation.
    """

    first: int
    last: int
    ramp: tuple[int, int]
    evaluation: int

    def at(self, epoch: int) -> int:
        """Return the training size of one epoch; between the ends a multiple of 32.

        Source: the SDGP paper's ImageNet script, which takes it from ffcv's.
        """
        start, end = self.ramp
        if epoch <= start:
            return self.first
        if epoch >= end:
            return self.last
        exact = self.first + (self.last - self.first) * (epoch - start) / (end - start)
        return min(max(round(exact / SIZE_STEP) * SIZE_STEP, self.first), self.last)


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images of one split, read when they are asked for.

    Args:
        root: folder of the class folders.
        paths: of the images below ``root``, sorted by class and name.
        targets: [N] int64 classes.
        byte_sizes: of the files.
        sizes: of the images that ``batch`` returns.
        mean: of red, green and blue, 0 to 255.
        std: likewise.
        pool: decodes.
    """

    root: Path
    paths: tuple[str, ...]
    targets: Tensor
    byte_sizes: tuple[int, ...]
    sizes: Sizes
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pool: ThreadPoolExecutor
    _ahead: dict[object, list["Future[np.ndarray]"]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def prepare(self, indices: Tensor, draw: Draw | None = None) -> None:
        """Begin to decode a batch; what was prepared before and never asked for is dropped."""
        for future in (f for futures in self._ahead.values() for f in futures):
            future.cancel()
        self._ahead.clear()
        self._ahead[_key(indices, draw)] = self._submit(indices, draw)

    def batch(
        self, indices: Tensor, device: torch.device, draw: Draw | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return normalised images, channels_last, and int64 targets on ``device``.

        Args:
            indices: [B] int64.
            device: of the result.
            draw: with it, each image is a random crop; without, the centre, resized.

        Raises:
            SDGPError: a file is no image.
        """
        futures = self._ahead.pop(_key(indices, draw), None) or self._submit(indices, draw)
        pixels = torch.from_numpy(np.stack([future.result() for future in futures]))
        images = normalise(pixels.permute(0, 3, 1, 2).to(device), self.mean, self.std)
        return images, self.targets[indices].to(device)

    def content(self) -> Iterator[bytes]:
        """Yield names and sizes of the files and what is done to them, not their bytes."""
        yield repr((len(self.paths), self.sizes, self.mean, self.std)).encode()
        for path, size in zip(self.paths, self.byte_sizes, strict=True):
            yield f"{path}\0{size}\n".encode()

    def _submit(self, indices: Tensor, draw: Draw | None) -> list["Future[np.ndarray]"]:
        return [self.pool.submit(self._decode, index, draw) for index in indices.tolist()]

    def _decode(self, index: int, draw: Draw | None) -> np.ndarray:
        """Return [size, size, 3] uint8."""
        path = self.root / self.paths[index]
        if draw is None:
            return read_square(path, self.sizes.evaluation, centre_box)
        # The third number keeps this stream apart from those of epoch_order and epoch_draws.
        generator = np.random.default_rng([draw.seed, draw.epoch, 2, index])
        return read_square(
            path, self.sizes.at(draw.epoch), lambda w, h: random_box(w, h, generator)
        )


def _key(indices: Tensor, draw: Draw | None) -> object:
    return draw, tuple(indices.tolist())


def read_square(path: Path, size: int, choose: Callable[[int, int], Box]) -> np.ndarray:
    """Decode an image, crop it and resize the crop with bilinear filtering.

    Args:
        path: of the file.
        size: side of the result in pixels.
        choose: (width, height) -> left, top, right, bottom of the crop.

    Returns:
        [size, size, 3] uint8.

    Raises:
        SDGPError: the file is no image that Pillow reads whole.
    """
    pillow = pillow_image()
    broken = (OSError, SyntaxError, ValueError, pillow.DecompressionBombError)
    try:
        with pillow.open(path) as image:
            box = choose(*image.size)
            square = image.convert("RGB").resize((size, size), pillow.Resampling.BILINEAR, box=box)
    except broken as error:
        raise SDGPError(
            f"image-folder: {path} must be an image that Pillow reads, got {error!r}. "
            "Replace the file, or remove it and start the runs anew."
        ) from error
    return np.asarray(square)


def pillow_image() -> Any:
    """Return ``PIL.Image``.

    Raises:
        MissingPackageError: Pillow is not installed.
    """
    return require("PIL.Image", package="pillow", purpose="the reader image-folder")


def centre_box(width: int, height: int) -> Box:
    """Return the square in the middle that has 7/8 of the shorter side."""
    side = CENTRE_SHARE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, generator: np.random.Generator) -> Box:
    """Return a crop of random area, ratio and place, or the middle if ten attempts do not fit.

    Args:
        width: of the image.
        height: likewise.
        generator: draws.
    """
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    for _ in range(CROP_ATTEMPTS):
        area = width * height * generator.uniform(*CROP_AREA)
        ratio = math.exp(generator.uniform(low, high))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(generator.integers(width - crop_width + 1))
            top = int(generator.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def read_image_folder(
    folder: Path, sizes: Sizes, mean: Sequence[float], std: Sequence[float], workers: int
) -> tuple[Dataset, int]:
    """List ``folder``/train/<class>/* and ``folder``/val/<class>/*; classes count in sorted order.

    Args:
        folder: with the folders train and val.
        sizes: of the images that a run sees.
        mean: of red, green and blue, 0 to 255.
        std: likewise.
        workers: threads that decode, at least 1.

    Returns:
        The data set, and how many classes it has.

    Raises:
        ValueError: a folder is missing or has no images, or the two have different classes.
        MissingPackageError: Pillow is not installed.
    """
    pillow_image()
    classes = [_class_names(folder / part) for part in ("train", "val")]
    if classes[0] != classes[1]:
        got = ", ".join(sorted(set(classes[0]) ^ set(classes[1]))[:5]) + " in one of them only"
        fix = "Sort the validation images into folders named as those of the training images."
        rule = "sorted into the same classes"
        raise value_error("read_image_folder", f"{folder}/train and val", rule, got, fix)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def split(part: str) -> ImageFolder:
        paths, targets, byte_sizes = _list_images(folder / part, classes[0])
        return ImageFolder(
            folder / part, paths, targets, byte_sizes, sizes, tuple(mean), tuple(std), pool
        )

    train, validation = split("train"), split("val")
    source = f"{folder.name}, {len(train):,} training images in {len(classes[0])} classes"
    return Dataset(train, validation, source), len(classes[0])


def _class_names(root: Path) -> list[str]:
    fix = "Pass the folder that has train/<class>/*.JPEG and val/<class>/*.JPEG as --data."
    if not root.is_dir():
        raise value_error("read_image_folder", str(root), "a folder", "none", fix)
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not names:
        rule = "a folder of class folders"
        raise value_error("read_image_folder", str(root), rule, "one without folders", fix)
    return names


def _list_images(
    root: Path, classes: Sequence[str]
) -> tuple[tuple[str, ...], Tensor, tuple[int, ...]]:
    """Return relative paths, classes and file sizes; every class has images."""
    paths, targets, byte_sizes = [], [], []
    for target, name in enumerate(classes):
        files = (path for path in (root / name).iterdir() if path.suffix.lower() in SUFFIXES)
        found = sorted((path.name, path.stat().st_size) for path in files)
        if not found:
            rule, fix = "a folder of images", f"Images end in {', '.join(sorted(SUFFIXES))}."
            raise value_error("read_image_folder", str(root / name), rule, "none in it", fix)
        paths += [f"{name}/{file}" for file, _ in found]
        byte_sizes += [size for _, size in found]
        targets += [target] * len(found)
    return tuple(paths), torch.tensor(targets), tuple(byte_sizes)
