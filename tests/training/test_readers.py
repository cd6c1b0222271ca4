"""CIFAR-10's binary files and folders of images, against independent readings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdgp_cusparselt.errors import SDGPError
from sdgp_cusparselt.training.cifar import read_cifar10
from sdgp_cusparselt.training.data import Draw
from sdgp_cusparselt.training.image_folder import (
    Sizes,
    centre_box,
    random_box,
    read_image_folder,
    read_square,
)
from tests.training.image_files import CLASSES, write_cifar10, write_image_folder

CPU = torch.device("cpu")
MEAN, STD = (125.0, 120.0, 110.0), (50.0, 40.0, 32.0)
SIZES = Sizes(16, 32, (1, 3), 20)


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar_values(below: str, tmp_path: Path) -> None:
    written = write_cifar10(tmp_path / below)
    data = read_cifar10(tmp_path, MEAN, STD)
    records = [r for name in sorted(written) if name != "test_batch.bin" for r in written[name]]
    assert len(data.train) == 20 and len(data.validation) == 4
    for split, expected in ((data.train, records), (data.validation, written["test_batch.bin"])):
        order = torch.arange(len(expected)).flip(0)
        images, targets = split.batch(order, CPU)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.dtype == torch.float32 and targets.dtype == torch.int64
        for image, target, record in zip(images, targets, reversed(expected), strict=True):
            assert int(target) == record[0]
            for channel, row, column in [(0, 0, 0), (1, 3, 30), (2, 31, 31), (2, 17, 4)]:
                byte = record[1 + 1024 * channel + 32 * row + column]
                # Sizes of a power of two times small numbers: one rounding of the quotient.
                value = np.float32(byte - MEAN[channel]) / np.float32(STD[channel])
                assert float(image[channel, row, column]) == value


def test_cifar_fingerprint_sees_bytes_labels_and_normalisation(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    seen = {read_cifar10(tmp_path, MEAN, STD).fingerprint}
    assert read_cifar10(tmp_path, MEAN, STD).fingerprint in seen
    seen.add(read_cifar10(tmp_path, MEAN, MEAN).fingerprint)
    for position in (0, 3072):
        content = bytearray((tmp_path / "test_batch.bin").read_bytes())
        content[position] = (content[position] + 1) % 10
        (tmp_path / "test_batch.bin").write_bytes(content)
        seen.add(read_cifar10(tmp_path, MEAN, STD).fingerprint)
    assert len(seen) == 4


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "must be a file, got none"),
        (b"", "must be whole records of 3073 bytes, got 0 bytes"),
        (b"\x00" * 3072, "must be whole records of 3073 bytes, got 3072 bytes"),
        (b"\x00" * 3074 * 2, "must be whole records of 3073 bytes, got 6148 bytes"),
        (b"\x09" + b"\x00" * 3072 + b"\x0a" * 3073, "labelled 0 to 9, got 10 in record 1"),
    ],
)
def test_wrong_cifar_files_are_named(content: bytes | None, words: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_cifar10(tmp_path, MEAN, STD)
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_sizes_are_those_of_the_published_ramp() -> None:
    sizes = Sizes(160, 192, (65, 76), 256)
    # Linear from 65 to 76 in multiples of 32 passes the middle between epochs 70 and 71.
    assert [sizes.at(epoch) for epoch in (0, 65, 70, 71, 76, 87)] == [160] * 3 + [192] * 3
    wide = Sizes(128, 256, (0, 8), 256)
    assert [wide.at(epoch) for epoch in range(9)] == [
        *(128, 128, 160, 192, 192, 192, 224, 256, 256),
    ]
    assert [Sizes(20, 24, (0, 2), 24).at(epoch) for epoch in range(3)] == [20, 24, 24]


def test_image_folder_lists_sorted_and_reads_the_centre(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "train" / "bee" / "notes.txt").write_text("no image")
    data, num_classes = read_image_folder(tmp_path, SIZES, MEAN, STD, workers=2)
    assert num_classes == 2 and len(data.train) == len(data.validation) == 12
    assert data.train.paths == tuple(f"{c}/{i}.JPEG" for c in CLASSES for i in range(6))
    indices = torch.tensor([7, 2])
    images, targets = data.validation.batch(indices, CPU)
    assert targets.tolist() == [1, 0] and images.shape == (2, 3, 20, 20)
    assert images.is_contiguous(memory_format=torch.channels_last)
    for image, name in zip(images, ("bee/1.JPEG", "ant/2.JPEG"), strict=True):
        original = Image.open(tmp_path / "val" / name)
        side = 0.875 * min(original.size)
        x, y = (original.width - side) / 2, (original.height - side) / 2
        square = original.resize((20, 20), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
        expected = (np.asarray(square, np.float32) - np.float32(MEAN)) / np.float32(STD)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_a_crop_of_a_gradient_is_where_it_says(tmp_path: Path) -> None:
    """Red is the column and green the row, so the crop's own pixels say where it was cut."""
    rows, columns = np.mgrid[0:100, 0:120]
    pixels = np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "gradient.png")
    for seed in range(20):
        box = random_box(120, 100, np.random.default_rng(seed))
        left, top, right, bottom = box
        got = read_square(tmp_path / "gradient.png", 10, lambda width, height, box=box: box)
        # Output pixel i has its middle (i + 1/2) / 10 of the way; pixel x has its own at x + 1/2.
        # Bilinear filtering keeps a gradient except at the borders; rounding moves it by 1/2.
        inner = (np.arange(10) + 0.5)[1:-1] / 10
        assert np.abs(got[5, 1:-1, 0] - (left + (right - left) * inner - 0.5)).max() <= 1
        assert np.abs(got[1:-1, 5, 1] - (top + (bottom - top) * inner - 0.5)).max() <= 1


def test_random_boxes_have_the_area_and_ratio_that_they_should() -> None:
    generator = np.random.default_rng(0)
    boxes = np.array([random_box(200, 150, generator) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 200 and boxes[:, 3].max() <= 150
    area, ratio = width * height / 30_000, width / height
    # Sides are rounded to whole pixels, at least 42 of them: 0.5 in 42 moves a ratio by 2.5 %.
    assert area.min() > 0.08 * 0.97 and ratio.min() > 0.75 * 0.97 and ratio.max() < 4 / 3 * 1.03
    assert area.min() < 0.1 and area.max() > 0.9 and ratio.min() < 0.78 and ratio.max() > 1.28
    # What no attempt fits is cut from the middle.
    assert random_box(1000, 1, generator) == (499, 0, 500, 1)
    assert centre_box(256, 512) == (16, 144, 240, 368)


def test_training_images_depend_on_seed_epoch_and_index_only(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (first, _), (second, _) = (
        read_image_folder(tmp_path, SIZES, MEAN, STD, workers) for workers in (1, 3)
    )
    draw, indices = Draw(4, 1), torch.tensor([3, 8, 5])
    expected, _ = first.train.batch(indices, CPU, draw)
    assert expected.shape == (3, 3, 16, 16)
    for other, prepared in [(draw, [3, 8, 6]), (Draw(4, 0), [3, 8, 5]), (draw, [3, 8, 5])]:
        second.train.prepare(torch.tensor(prepared), other)
        assert torch.equal(second.train.batch(indices, CPU, draw)[0], expected)
    assert not second.train._ahead  # the last one was asked for as it was prepared
    alone, _ = second.train.batch(indices[1:2], CPU, draw)
    assert torch.equal(alone[0], expected[1])
    for other in (Draw(5, 1), Draw(4, 0)):
        assert not torch.equal(first.train.batch(indices, CPU, other)[0], expected)
    assert first.train.batch(indices, CPU, Draw(4, 3))[0].shape == (3, 3, 32, 32)
    assert first.fingerprint == second.fingerprint


def test_image_folder_fingerprint_sees_names_sizes_and_options(tmp_path: Path) -> None:
    write_image_folder(tmp_path)

    def fingerprint(sizes: Sizes = SIZES, std: tuple[float, ...] = STD) -> str:
        return read_image_folder(tmp_path, sizes, MEAN, std, 1)[0].fingerprint

    seen = [fingerprint(), fingerprint(Sizes(16, 32, (1, 3), 24)), fingerprint(std=MEAN)]
    (tmp_path / "train" / "ant" / "0.JPEG").rename(tmp_path / "train" / "ant" / "zero.JPEG")
    seen.append(fingerprint())
    with open(tmp_path / "val" / "bee" / "0.JPEG", "ab") as file:
        file.write(b"\x00")
    seen.append(fingerprint())
    assert len(set(seen)) == 5 and fingerprint() == seen[-1]


@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
def test_a_broken_image_is_named(content: bytes | str, tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    path = tmp_path / "train" / "bee" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:300] if isinstance(content, str) else content)
    data, _ = read_image_folder(tmp_path, SIZES, MEAN, STD, workers=2)
    data.train.prepare(torch.tensor([7]), Draw(0, 0))
    with pytest.raises(SDGPError, match=r"bee/1\.JPEG must be an image that Pillow reads, got"):
        data.train.batch(torch.tensor([7]), CPU, Draw(0, 0))
    with pytest.raises(SDGPError, match=r"bee/1\.JPEG"):
        data.train.batch(torch.tensor([0, 7]), CPU, Draw(0, 0))


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    def refused() -> str:
        with pytest.raises(ValueError) as caught:
            read_image_folder(tmp_path, SIZES, MEAN, STD, 1)
        return str(caught.value)

    assert "train must be a folder, got none" in refused()
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert "train must be a folder of class folders" in refused()
    for folder in ("train/ant", "train/bee", "val/ant"):
        (tmp_path / folder).mkdir()
    (tmp_path / "val" / "cow").mkdir()
    assert "the same classes, got bee, cow in one of them only" in refused()
    (tmp_path / "val" / "cow").rename(tmp_path / "val" / "bee")
    assert "train/ant must be a folder of images, got none in it" in refused()


def test_grey_and_palette_images_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (30, 40), 77).save(tmp_path / "grey.png")
    Image.new("P", (30, 40), 0).save(tmp_path / "palette.png")
    for name in ("grey.png", "palette.png"):
        square = read_square(tmp_path / name, 8, centre_box)
        assert square.shape == (8, 8, 3) and square.dtype == np.uint8
        assert (square == square[0, 0]).all()
    assert read_square(tmp_path / "grey.png", 8, centre_box)[0, 0].tolist() == [77] * 3
