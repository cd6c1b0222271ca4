"""Batches of images: normalisation, and random changes by seed, epoch and index alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdgp_cusparselt.errors import value_error

#: Columns of ``epoch_draws``: mirrored or not, shift down and right, top and left of the blank.
NUM_DRAWS = 5


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (pixels - mean) / std per channel.

    Args:
        pixels: [B, C, H, W] uint8.
        mean: C values in units of a pixel, so 0 to 255.
        std: C values, likewise.

    Returns:
        [B, C, H, W] float32, channels_last.
    """
    shift = torch.tensor(mean, dtype=torch.float32, device=pixels.device).view(1, -1, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32, device=pixels.device).view(1, -1, 1, 1)
    values = (pixels.float() - shift) / scale
    return values.contiguous(memory_format=torch.channels_last)


def epoch_draws(num_examples: int, seed: int, epoch: int) -> Tensor:
    """Return what chance decides about each example in one epoch, a pure function of its arguments.

    Args:
        num_examples: of the training split.
        seed: of the run.
        epoch: 0-based.

    Returns:
        [num_examples, 5] float32, uniform in [0, 1).
    """
    # The third number keeps this stream apart from that of epoch_order, which has two.
    generator = np.random.default_rng([seed, epoch, 1])
    return torch.from_numpy(generator.random((num_examples, NUM_DRAWS), dtype=np.float32))


def mirrored(images: Tensor) -> Tensor:
    """Return images [B, C, H, W] with left and right exchanged, channels_last."""
    return images.flip(3).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images; falsy if there are none.

    Args:
        flip: mirror with probability 1/2.
        translate: largest shift along each axis in pixels; what comes in is 0.
        cutout: side of a square that is set to 0.

    Source: the SDGP paper's CIFAR-10 runs do the three in this order and fill with the mean of the
    data set, which is 0 once images are normalised.
    """

    flip: bool = False
    translate: int = 0
    cutout: int = 0

    def __bool__(self) -> bool:
        return self.flip or self.translate > 0 or self.cutout > 0

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change each image as its row of ``draws`` says.

        Args:
            images: [B, C, H, W], normalised.
            draws: [B, 5], rows of ``epoch_draws``.

        Returns:
            Images of the same shape, channels_last.

        Raises:
            ValueError: the inputs are no images, or smaller than the blank.
        """
        if images.dim() != 4 or min(images.shape[2:]) < max(self.cutout, self.translate):
            rule = "[B, C, H, W] and at least as large as the recipe's cutout and translate"
            fix = "Leave flip, translate and cutout out of this recipe, or make them smaller."
            raise value_error("Augmentation.apply", "images", rule, tuple(images.shape), fix)
        draws = draws.to(images.device)
        if self.flip:
            images = torch.where(draws[:, 0, None, None, None] < 0.5, mirrored(images), images)
        if self.translate:
            images = self._translated(images, draws[:, 1:3])
        if self.cutout:
            images = self._cut_out(images, draws[:, 3:5])
        return images.contiguous(memory_format=torch.channels_last)

    def _translated(self, images: Tensor, draws: Tensor) -> Tensor:
        height, width = images.shape[2:]
        padded = F.pad(images, (self.translate,) * 4)
        first = _choose(draws, 2 * self.translate + 1)
        rows = first[:, :1] + torch.arange(height, device=images.device)
        columns = first[:, 1:] + torch.arange(width, device=images.device)
        which = torch.arange(len(images), device=images.device)[:, None, None]
        # A slice between indices moves the channels last, which is where this layout has them.
        return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def _cut_out(self, images: Tensor, draws: Tensor) -> Tensor:
        inside = []
        for axis, size in enumerate(images.shape[2:]):
            first = _choose(draws[:, axis, None], size - self.cutout + 1)
            position = torch.arange(size, device=images.device)
            inside.append((position >= first) & (position < first + self.cutout))
        blank = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return images.masked_fill(blank, 0.0)


def _choose(draws: Tensor, count: int) -> Tensor:
    """Map uniform draws to whole numbers 0 .. count-1."""
    return (draws * count).long().clamp_(max=count - 1)
