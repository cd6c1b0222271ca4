"""Two tasks small enough to train in a test: real code, a few steps."""

import dataclasses

import pytest
import torch
from torch import nn

from sdgp_cusparselt.training.data import Dataset, Split
from sdgp_cusparselt.training.models import ByteGPT, SmallResNet
from sdgp_cusparselt.training.tasks import TASKS, Task

NUM_TRAIN, NUM_VALIDATION = 24, 10


def images() -> Dataset:
    generator = torch.Generator().manual_seed(1)

    def split(count: int) -> Split:
        pixels = torch.rand(count, 1, 8, 8, generator=generator)
        return Split(pixels, torch.randint(10, (count,), generator=generator))

    return Dataset(split(NUM_TRAIN), split(NUM_VALIDATION), "random images")


def text() -> Dataset:
    generator = torch.Generator().manual_seed(2)

    def split(count: int) -> Split:
        cut = torch.randint(256, (count, 9), generator=generator, dtype=torch.uint8)
        return Split(cut[:, :-1], cut[:, 1:])

    return Dataset(split(NUM_TRAIN), split(NUM_VALIDATION), "random bytes")


def small_resnet() -> nn.Module:
    return SmallResNet(1, (32,), depth=1, num_classes=10)


def small_gpt() -> nn.Module:
    return ByteGPT(8, width=32, num_layers=1, num_heads=2)


@pytest.fixture
def image_task() -> Task:
    """The digits task with random images and one block: SGD, 3 steps an epoch, 9 steps."""
    recipe = TASKS["digits"].recipe.replace(epochs=3, batch_size=8)
    return dataclasses.replace(
        TASKS["digits"], load=images, build_model=small_resnet, recipe=recipe, evaluations=3
    )


@pytest.fixture
def augmented_task(image_task: Task) -> Task:
    """The same with every augmentation, each batch in two parts, and everything decayed."""
    recipe = image_task.recipe.replace(
        flip=True,
        translate=1,
        cutout=2,
        flip_evaluation=True,
        gradient_accumulation=2,
        decay="all",
    )
    return dataclasses.replace(image_task, recipe=recipe)


@pytest.fixture
def text_task() -> Task:
    """The code-lm task with random bytes and one layer: AdamW, 9 steps."""
    recipe = TASKS["code-lm"].recipe.replace(steps=9, batch_size=8)
    return dataclasses.replace(
        TASKS["code-lm"], load=text, build_model=small_gpt, recipe=recipe, evaluations=3
    )
