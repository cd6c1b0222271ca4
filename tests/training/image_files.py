"""Tiny copies of the file formats that recipes read, and recipes that fit them."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from sdgp_cusparselt.training.recipe_file import SHIPPED

CLASSES = ("ant", "bee")


def write_cifar10(folder: Path, records_per_file: int = 4) -> dict[str, list[bytes]]:
    """Write the six files; return the records of each."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(5)
    written = {}
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = []
        for _ in range(records_per_file):
            pixels = generator.integers(256, size=3072, dtype=np.uint8).tobytes()
            records.append(bytes([int(generator.integers(10))]) + pixels)
        (folder / name).write_bytes(b"".join(records))
        written[name] = records
    return written


def write_image_folder(folder: Path, per_class: int = 6) -> None:
    """Write train and val with two classes of small JPEGs of different sizes."""
    generator = np.random.default_rng(6)
    for part in ("train", "val"):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for number in range(per_class):
                shape = (36 + number, 48 - number, 3)
                pixels = generator.integers(256, size=shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.JPEG")


def shipped_text(name: str, **replaced: str) -> str:
    """Return a shipped recipe with the values of some keys replaced."""
    text = (SHIPPED / f"{name}.toml").read_text()
    for key, value in replaced.items():
        text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        assert count == 1, key
    return text


def tiny_imagenet_text(name: str, **replaced: str) -> str:
    """Return an ImageNet recipe for two classes of images of at most 64 pixels, 2 batch parts."""
    sizes = {"image_size": "32", "final_image_size": "64", "ramp": "[0, 1]"}
    sizes |= {"evaluation_size": "48", "num_classes": "2", "gradient_accumulation": "2"}
    return shipped_text(name, **(sizes | {"batch_size": "8", "evaluations": "2"} | replaced))
