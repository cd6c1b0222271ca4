"""Data, its order and its split do not depend on anything but what they say."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from sdgp_cusparselt import extras
from sdgp_cusparselt.errors import SDGPError
from sdgp_cusparselt.training import corpus
from sdgp_cusparselt.training.data import Dataset, Split, epoch_order, shuffled_split
from sdgp_cusparselt.training.tasks import TASKS


def test_each_epoch_is_another_permutation() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(50))
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_order_ignores_torchs_generator() -> None:
    first = epoch_order(50, 3, 2)
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(epoch_order(50, 3, 2), first)


def test_split_keeps_every_example_once() -> None:
    inputs = np.arange(30, dtype=np.float32).reshape(30, 1)
    data = shuffled_split(inputs, np.arange(30), 10, "counted")
    assert len(data.train) == 20 and len(data.validation) == 10
    for split in (data.train, data.validation):
        assert torch.equal(split.inputs[:, 0].long(), split.targets)
    together = torch.cat([data.train.targets, data.validation.targets])
    assert sorted(together.tolist()) == list(range(30))


def test_fingerprint_sees_one_changed_value() -> None:
    def dataset(last: float) -> Dataset:
        split = Split(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1]))
        return Dataset(split, Split(torch.tensor([[last]]), torch.tensor([0])), "made here")

    assert dataset(3.0).fingerprint == dataset(3.0).fingerprint
    assert dataset(3.0).fingerprint != dataset(3.5).fingerprint


@pytest.mark.parametrize(
    "name, num_train, num_validation, shape",
    [("digits", 1200, 597, (1, 8, 8)), ("mnist", 4000, 1000, (1, 28, 28))],
)
def test_image_tasks_have_all_classes_on_both_sides(
    name: str, num_train: int, num_validation: int, shape: tuple[int, ...]
) -> None:
    data = TASKS[name].load()
    assert (len(data.train), len(data.validation)) == (num_train, num_validation)
    for split in (data.train, data.validation):
        assert tuple(split.inputs.shape[1:]) == shape
        counts = torch.bincount(split.targets.long(), minlength=10)
        # Ten about equal classes: none is below half its share.
        assert len(counts) == 10 and int(counts.min()) * 20 > len(split)


def test_batch_is_channels_last_and_integers_are_int64() -> None:
    images = Split(torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.uint8))
    inputs, targets = images.batch(torch.tensor([2, 0]), torch.device("cpu"))
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(inputs, images.inputs[[2, 0]]) and targets.dtype == torch.int64


def test_windows_overlap_by_one_byte() -> None:
    cut = corpus.windows(bytes(range(11)), 3)
    assert cut.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert corpus.windows(bytes(range(100)), 3, limit=3)[:, 0].tolist() == [0, 33, 66]


def test_code_targets_are_the_next_byte() -> None:
    data = TASKS["code-lm"].load()
    for split in (data.train, data.validation):
        assert torch.equal(split.inputs[:, 1:], split.targets[:, :-1])


def write_library(root: Path) -> None:
    for index in range(60):
        folder = root / ("a" if index % 2 else "b")
        folder.mkdir(exist_ok=True, parents=True)
        (folder / f"m{index}.py").write_text(f"# file {index}\n" + f"x = {index}\n" * 5000)
    for folder in ("site-packages", "test"):
        (root / folder).mkdir()
        (root / folder / "other.py").write_text("SKIPPED = 1\n" * 100)


def test_corpus_holds_out_whole_files(tmp_path: Path) -> None:
    write_library(tmp_path)
    train, validation = corpus.read_corpus(tmp_path)
    assert corpus.read_corpus(tmp_path) == (train, validation)
    assert b"SKIPPED" not in train + validation
    for index in range(60):
        relative = f"{'a' if index % 2 else 'b'}/m{index}.py"
        digest = hashlib.sha256(relative.encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") % 10 == 0
        mark = f"# file {index}\n".encode()
        assert (mark in validation, mark in train) == (held_out, not held_out)


def test_too_little_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("x = 1\n")
    with pytest.raises(SDGPError, match="at least 1000000 bytes of Python source"):
        corpus.read_corpus(tmp_path)


def test_a_missing_package_names_the_pip_command() -> None:
    with pytest.raises(extras.MissingPackageError) as caught:
        extras.require("no_such_package.part", package="some-package", purpose="the x task")
    assert "the x task needs the package some-package" in str(caught.value)
    assert "pip install some-package" in str(caught.value)


def test_a_fault_inside_a_package_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import its_own_missing_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_own_missing_dependency") as caught:
        extras.require("half_installed", package="half-installed", purpose="the x task")
    assert not isinstance(caught.value, extras.MissingPackageError)
