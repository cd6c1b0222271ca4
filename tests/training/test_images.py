"""Augmentation against a slow loop over pixels, and draws that depend on what they say."""

import numpy as np
import pytest
import torch

from sdgp_cusparselt.training.images import Augmentation, epoch_draws, mirrored, normalise


def test_normalise_by_hand() -> None:
    pixels = torch.tensor([[[[0]], [[255]], [[7]]]], dtype=torch.uint8)
    got = normalise(pixels, (10.0, 20.0, 7.0), (2.0, 5.0, 3.0))
    assert got.flatten().tolist() == [-5.0, 47.0, 0.0]
    images = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
    assert normalise(images, (1,) * 3, (1,) * 3).is_contiguous(memory_format=torch.channels_last)


def test_draws_depend_on_seed_and_epoch_only() -> None:
    first = epoch_draws(1000, 3, 2)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(epoch_draws(1000, 3, 2), first)
    assert not torch.equal(epoch_draws(1000, 3, 1), first)
    assert not torch.equal(epoch_draws(1000, 4, 2), first)
    # Uniform: the mean of 1,000 draws has a standard deviation of 1 / sqrt(12 * 1000) = 0.0091.
    assert (first.mean(dim=0) - 0.5).abs().max() < 5 * 0.0092
    # Another stream than the order of the epoch: the order of the draws is not that order.
    order = np.random.default_rng([3, 2]).permutation(1000)
    assert not np.array_equal(np.argsort(first[:, 0].numpy()), order)


def by_loop(
    image: np.ndarray, draw: np.ndarray, flip: bool, translate: int, cutout: int
) -> np.ndarray:
    """One image [C, H, W], pixel by pixel."""
    _, height, width = image.shape
    if flip and draw[0] < 0.5:
        image = image[:, :, ::-1]
    if translate:
        down, right = (int(np.float32(u) * (2 * translate + 1)) - translate for u in draw[1:3])
        moved = np.zeros_like(image)
        for y in range(height):
            for x in range(width):
                if 0 <= y + down < height and 0 <= x + right < width:
                    moved[:, y, x] = image[:, y + down, x + right]
        image = moved
    if cutout:
        top = int(np.float32(draw[3]) * (height - cutout + 1))
        left = int(np.float32(draw[4]) * (width - cutout + 1))
        image = image.copy()
        image[:, top : top + cutout, left : left + cutout] = 0
    return image


@pytest.mark.parametrize(
    "flip, translate, cutout",
    [(True, 0, 0), (False, 2, 0), (False, 0, 4), (True, 2, 4), (True, 6, 6)],
)
def test_augmentation_equals_a_loop_over_pixels(flip: bool, translate: int, cutout: int) -> None:
    images = torch.rand(40, 3, 6, 9, generator=torch.Generator().manual_seed(0)) + 1
    draws = epoch_draws(40, 0, 0)
    got = Augmentation(flip, translate, cutout).apply(images, draws)
    for image, draw, result in zip(images.numpy(), draws.numpy(), got.numpy(), strict=True):
        assert np.array_equal(result, by_loop(image, draw, flip, translate, cutout))
    assert got.is_contiguous(memory_format=torch.channels_last)
    batch = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(Augmentation(flip, translate, cutout).apply(batch, draws), got)


def test_extreme_draws_stay_inside() -> None:
    images = torch.ones(2, 1, 5, 5)
    draws = torch.tensor([[0.0] * 5, [float(np.nextafter(np.float32(1), np.float32(0)))] * 5])
    low, high = Augmentation(translate=1, cutout=2).apply(images, draws)[:, 0]
    # Shifted by one to either side, the border that came in is blank, and so is a corner.
    assert low[0].sum() == 0 and low[:, 0].sum() == 0 and low[1:, 1:].sum() == 16 - 1
    assert high[4].sum() == 0 and high[:, 4].sum() == 0 and high[:4, :4].sum() == 16 - 1


def test_nothing_to_do_is_falsy() -> None:
    assert not Augmentation()
    assert Augmentation(flip=True) and Augmentation(translate=1) and Augmentation(cutout=1)


def test_text_and_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images must be \[B, C, H, W\] .* got \(4, 8\)"):
        Augmentation(flip=True).apply(torch.zeros(4, 8), torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"got \(4, 3, 8, 2\)"):
        Augmentation(cutout=3).apply(torch.zeros(4, 3, 8, 2), torch.zeros(4, 5))


def test_mirrored_twice_is_the_same() -> None:
    images = torch.rand(2, 3, 4, 5)
    assert torch.equal(mirrored(images)[..., 0], images[..., -1])
    assert torch.equal(mirrored(mirrored(images)), images)
