"""What the tables of a recipe file may hold: fields, and what readers and models make of them."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sdgp_cusparselt.training.cifar import NUM_CLASSES, read_cifar10
from sdgp_cusparselt.training.data import Dataset
from sdgp_cusparselt.training.image_folder import Sizes, read_image_folder
from sdgp_cusparselt.training.imagenet_models import build_regnet_x, build_resnet
from sdgp_cusparselt.training.models import ByteGPT, ResNet9, SmallResNet
from sdgp_cusparselt.training.tasks import (
    ACCURACY,
    BITS_PER_BYTE,
    CONTEXT,
    VALIDATION_WINDOWS,
    load_code,
    load_digits,
    load_mnist,
)

Kind = Literal["images", "text"]
METRICS = {metric.name: metric for metric in (ACCURACY, BITS_PER_BYTE)}


class _Required:
    """The default of a field that has none."""


REQUIRED = _Required()


@dataclass(frozen=True)
class Field:
    """One key of a table.

    Args:
        rule: what its value must be, for the error.
        accepts: whether a value is so.
        default: where the key is left out.
    """

    rule: str
    accepts: Callable[[Any], bool]
    default: Any = REQUIRED


Fields = Mapping[str, Field]


def whole(least: int, default: Any = REQUIRED) -> Field:
    """Return the field of a whole number."""
    return Field(f"a whole number of at least {least}", lambda x: _is_whole(x, least), default)


def wholes(count: int | None, least: int, default: Any = REQUIRED) -> Field:
    """Return the field of a list of whole numbers; None takes any count but 0."""
    many = "" if count is None else f"{count} "
    return Field(
        f"a list of {many}whole numbers of at least {least}",
        lambda x: _is_list(x, count, lambda item: _is_whole(item, least)),
        default,
    )


def rgb(above: float) -> Field:
    """Return the field of one number for each of red, green and blue, in units of a pixel."""
    return Field(
        f"three numbers above {above:g} and at most 255, in units of a pixel",
        lambda x: _is_list(x, 3, lambda item: _is_number(item) and above < item <= 255),
    )


def choice(*names: str) -> Field:
    """Return the field of one of some words."""
    return Field(f"one of {', '.join(names)}", lambda x: isinstance(x, str) and x in names)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_whole(x: Any, least: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


def _is_list(x: Any, count: int | None, accepts: Callable[[Any], bool]) -> bool:
    if not isinstance(x, list) or not x or (count is not None and len(x) != count):
        return False
    return all(map(accepts, x))


TASK: Fields = {
    "name": Field(
        "lower-case letters, digits and hyphens",
        lambda x: isinstance(x, str) and re.fullmatch(r"[a-z0-9][a-z0-9-]*", x) is not None,
    ),
    "summary": Field("a line of text", lambda x: isinstance(x, str)),
    "metric": choice(*METRICS),
    "evaluations": whole(1),
}


@dataclass(frozen=True)
class Reader:
    """A value of ``[data] reader``.

    Args:
        kind: of its examples.
        fields: of the table, besides ``reader``.
        folder: what ``--data`` must hold; empty if the data ship with a package.
        load: (options, folder) -> the data set and its number of classes, None for text.
    """

    kind: Kind
    fields: Fields
    folder: str
    load: Callable[[dict[str, Any], Path], tuple[Dataset, int | None]]


def _load_image_folder(options: dict[str, Any], folder: Path) -> tuple[Dataset, int]:
    first = options["image_size"]
    last, ramp = options["final_image_size"] or first, options["ramp"] or (0, 0)
    sizes = Sizes(first, last, (ramp[0], ramp[1]), options["evaluation_size"])
    workers = options["workers"] or os.cpu_count() or 1
    return read_image_folder(folder, sizes, options["mean"], options["std"], workers)


_NORMALISATION = {"mean": rgb(above=-1), "std": rgb(above=0)}
READERS = {
    "digits": Reader("images", {}, "", lambda options, folder: (load_digits(), 10)),
    "mnist": Reader("images", {}, "", lambda options, folder: (load_mnist(), 10)),
    "code": Reader(
        "text",
        {"context": whole(1, CONTEXT), "validation_windows": whole(1, VALIDATION_WINDOWS)},
        "",
        lambda options, folder: (load_code(**options), None),
    ),
    "cifar10-binary": Reader(
        "images",
        _NORMALISATION,
        "the folder of CIFAR-10's binary version",
        lambda options, folder: (read_cifar10(folder, **options), NUM_CLASSES),
    ),
    "image-folder": Reader(
        "images",
        {
            "image_size": whole(1),
            "final_image_size": whole(1, None),
            "ramp": wholes(2, 0, None),
            "evaluation_size": whole(1),
            **_NORMALISATION,
            "workers": whole(1, None),
        },
        "a folder with train/<class>/* and val/<class>/*",
        _load_image_folder,
    ),
}


@dataclass(frozen=True)
class Model:
    """A value of ``[model] name``.

    Args:
        kind: of the examples that it takes.
        fields: of the table, besides ``name``.
        build: takes them by name; returns the model with fresh weights.
    """

    kind: Kind
    fields: Fields
    build: Callable[..., nn.Module]


_STAGES = {"widths": wholes(None, 1), "depths": wholes(None, 1)}
MODELS = {
    "small-resnet": Model(
        "images",
        {"in_channels": whole(1), "num_classes": whole(1), "widths": wholes(None, 1)}
        | {"depth": whole(1)},
        SmallResNet,
    ),
    "resnet9": Model(
        "images",
        {"in_channels": whole(1), "num_classes": whole(1), "scale_down": whole(1, 1)},
        ResNet9,
    ),
    "resnet": Model(
        "images",
        {
            "num_classes": whole(1),
            "layer": choice("basic", "bottleneck"),
            "stem_width": whole(1),
            **_STAGES,
        },
        build_resnet,
    ),
    "regnet-x": Model(
        "images",
        {"num_classes": whole(1), "stem_width": whole(1), **_STAGES, "group_width": whole(1)},
        build_regnet_x,
    ),
    "byte-gpt": Model(
        "text",
        {
            "context": whole(1),
            "width": whole(1),
            "num_layers": whole(1),
            "num_heads": whole(1),
        },
        ByteGPT,
    ),
}
