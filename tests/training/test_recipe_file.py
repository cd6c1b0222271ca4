"""Recipe files: those that ship, what is refused, and training from them through the CLI."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdgp_cusparselt.commands.parser import main
from sdgp_cusparselt.layers.convert import convert_
from sdgp_cusparselt.training.methods import parse_method
from sdgp_cusparselt.training.recipe_file import (
    SHIPPED,
    load_recipe,
    open_task,
    shipped_recipes,
)
from sdgp_cusparselt.training.run import RunSpec, Stopped, Trainer
from sdgp_cusparselt.training.tasks import TASKS, Task
from tests.training.image_files import (
    shipped_text,
    tiny_imagenet_text,
    write_cifar10,
    write_image_folder,
)

IMAGENET = ("imagenet-resnet18", "imagenet-resnet50", "imagenet-regnetx-400mf")
#: As published for the ImageNet models by torchvision, and counted by hand for the others.
NUM_PARAMETERS = {
    "imagenet-resnet18": 11_689_512,
    "imagenet-resnet50": 25_557_032,
    "imagenet-regnetx-400mf": 5_495_976,
    # Kernels 3*64*9 + 64*128*25 + 2*128*128*9 + 128*256*9 + 2*256*256*9 + 256*128*9, two vectors
    # per norm of 64 + 3*128 + 3*256 + 128 channels, and 128*10 of the last layer.
    "cifar10": 2_270_912 + 2 * 1_344 + 1_280,
    # 12 w^2 + 13 w in each of 11 blocks (biases and two norms included), two embeddings of
    # 256 + 512 rows, the last norm and the head without a bias.
    "code-lm-50m": 11 * (12 * 640**2 + 13 * 640) + (256 + 512 + 256 + 2) * 640,
}


def write(folder: Path, text: str) -> Path:
    path = folder / "own.toml"
    path.write_text(text)
    return path


def test_these_recipes_ship() -> None:
    assert sorted(NUM_PARAMETERS) == shipped_recipes()
    assert not set(shipped_recipes()) & set(TASKS)


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_a_shipped_recipe_builds_its_model(name: str, tmp_path: Path) -> None:
    task = open_task(name, None if name == "code-lm-50m" else tmp_path)
    assert task.name == name
    with torch.device("meta"):
        model = task.build_model()
    assert sum(p.numel() for p in model.parameters()) == NUM_PARAMETERS[name]
    report = convert_(model, parse_method("magnitude").config(), preset="all")
    kinds = (nn.Linear, nn.Conv2d)
    layers = {fqn: layer for fqn, layer in model.named_modules() if isinstance(layer, kinds)}
    stems = {fqn for fqn, layer in layers.items() if getattr(layer, "in_channels", 0) == 3}
    heads = {fqn for fqn in layers if {"classifier", "fc", "lm_head"} & set(fqn.split("."))}
    assert len(stems) == (name != "code-lm-50m") and len(heads) == 1
    assert set(report.skipped) == stems | heads
    assert set(report.converted) == set(layers) - stems - heads
    if name in IMAGENET:
        sizes = {layers[fqn].kernel_size for fqn in report.converted}
        assert sizes == ({(1, 1), (3, 3)})
    text = " ".join(str(report).split())
    assert f"{len(report.converted)} converted, {len(report.skipped)} plain" in text
    assert ("plain: reads 3 channels" in text) == bool(stems)


def test_regnet_of_the_regnet_paper(tmp_path: Path) -> None:
    text = shipped_text("imagenet-regnetx-400mf", widths="[32, 64, 160, 384]")
    with torch.device("meta"):
        model = load_recipe(write(tmp_path, text), tmp_path).build_model()
    assert sum(p.numel() for p in model.parameters()) == 5_157_512


@pytest.mark.parametrize("name, epoch", [("cifar10", 5), *((name, 2) for name in IMAGENET)])
def test_the_learning_rate_peaks_in_the_published_epoch(
    name: str, epoch: int, tmp_path: Path
) -> None:
    recipe = open_task(name, tmp_path).recipe
    assert recipe.epochs is not None
    assert recipe.peak_fraction * recipe.epochs == pytest.approx(epoch, rel=1e-12)


def test_published_values(tmp_path: Path) -> None:
    rows = {
        name: (r.epochs, r.batch_size, r.learning_rate, r.weight_decay, r.momentum)
        for name in shipped_recipes()
        for r in [open_task(name, None if name == "code-lm-50m" else tmp_path).recipe]
    }
    assert rows["cifar10"] == (150, 512, 0.5, 5e-4, 0.9)
    assert rows["imagenet-resnet18"] == (88, 4 * 1024, 1.0, 5e-5, 0.9)
    assert rows["imagenet-resnet50"] == (88, 4 * 512, 1.7, 1e-4, 0.9)
    assert rows["imagenet-regnetx-400mf"] == (88, 4 * 1024, 1.0, 5e-5, 0.9)


def train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state["model"]


def test_cifar10_through_the_cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_cifar10(data)
    options = ["--steps", 2, "--batch-size", 4, "--gradient-accumulation", 2]
    command = ["cifar10", "--data", data, *options, "--methods", "dense,magnitude", "--out", out]
    assert train(*command) == 0, capsys.readouterr().err
    document = json.loads((out / "results.json").read_text())
    assert document["command"].startswith(f"sdgp train cifar10 --data {data} ")
    assert "--gradient-accumulation 2" in document["command"]
    assert document["data"]["source"] == "CIFAR-10, 20 training images"
    run = document["runs"][1]
    assert json.loads(run["identity"]["model"])["name"] == "resnet9"
    assert len(run["converted"]) == 7 and sorted(run["skipped"]) == ["fc", "stem.0.0"]
    assert capsys.readouterr().out.startswith("cifar10: magnitude 2:4 ends at ")
    assert train(*command, "--resume") == 0
    (data / "test_batch.bin").write_bytes(b"\x00" * 3073)
    assert train(*command, "--resume") == 2
    assert "data is" in capsys.readouterr().err


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_through_the_cli(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image_folder(tmp_path / "data")
    path = write(tmp_path, tiny_imagenet_text(name))
    options = ["--data", tmp_path / "data", "--steps", 2, "--out", tmp_path / "out"]
    assert train(path, *options, "--methods", "magnitude") == 0, capsys.readouterr().err
    run = json.loads((tmp_path / "out" / f"{name}-magnitude-2of4-seed0.json").read_text())
    assert run["steps"] == 2 and len(run["skipped"]) == 2
    assert run["history"][-1]["train_loss"] is not None


def test_code_lm_50m_through_the_cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = {"width": "32", "num_layers": "1", "num_heads": "2", "validation_windows": "4"}
    text = shipped_text("code-lm-50m", **smaller).replace("context = 512", "context = 32")
    path = write(tmp_path, text)
    options = ["--steps", 2, "--batch-size", 4, "--methods", "dense", "--out", tmp_path / "out"]
    assert train(path, *options) == 0, capsys.readouterr().err
    assert "bits per byte" in capsys.readouterr().out


def make(task: Task) -> Trainer:
    spec = RunSpec(task.name, parse_method("random"), 3, task.recipe, backend="dense")
    return Trainer(spec, task, task.load())


def test_resume_from_a_folder_of_images_is_bit_for_bit(tmp_path: Path) -> None:
    """Crops, mirrors, a growing image and two parts per batch, stopped in the second epoch."""
    write_image_folder(tmp_path / "data")
    smaller = {"widths": "[16, 32]", "depths": "[1, 1]", "stem_width": "16"}
    text = tiny_imagenet_text("imagenet-resnet18", **smaller, batch_size="4")
    task = load_recipe(write(tmp_path, text), tmp_path / "data")
    task = dataclasses.replace(task, recipe=task.recipe.replace(steps=6))
    unbroken = make(task)
    shapes: list[int] = []
    unbroken.model.register_forward_pre_hook(
        lambda module, inputs: shapes.append(inputs[0].shape[-1]) if module.training else None
    )
    unbroken.train()
    # Three steps per epoch of two parts each; the size grows after the first epoch.
    assert shapes == [32] * 6 + [64] * 6
    with pytest.raises(Stopped):
        make(task).train(tmp_path / "run.pt", should_stop=lambda step: step == 4)
    torch.rand(10)
    second = make(task)
    second.load(tmp_path / "run.pt")
    assert second.step == 4
    second.train()
    expected, got = unbroken.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(value, got[key]) for key, value in expected.items())


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("[task]", "[task", "must be a TOML file, got "),
        ("[model]", "[models]", "must be the four tables task, data, model, recipe, got task"),
        ('name = "cifar10"', 'name = "CIFAR 10"', "[task] name must be lower-case letters"),
        ('metric = "accuracy"', 'metric = "f1"', "[task] metric must be one of accuracy, bits"),
        ("evaluations = 30", "evaluations = 0", "[task] evaluations must be a whole number of at"),
        ("evaluations = 30", "", "[task] evaluations must be a whole number of at least 1, got no"),
        ('reader = "cifar10-binary"', "", "[data] reader must be one of digits, mnist, code, cif"),
        ("mean = [125.307,", "mean = [", "[data] mean must be three numbers above -1 and at most"),
        ("std = [51.5865,", "std = [0,", "[data] std must be three numbers above 0 and at most"),
        ("std = [", "sdt = [", "[data] sdt must be among mean, std, got an unknown key"),
        ('"resnet9"', '"resnet10"', "[model] name must be one of small-resnet, resnet9, resnet"),
        ('"resnet9"', '"byte-gpt"', "[model] in_channels must be among context, width"),
        ("num_classes = 10", "num_classes = true", "[model] num_classes must be a whole number"),
        ("batch_size = 512", "batchsize = 512", "[recipe] batchsize must be among optimizer"),
        ("epochs = 150", "epochs = 0", "[recipe]: Recipe: epochs must be at least 1, got 0"),
        ("flip = true", "flip = 1", "[recipe]: Recipe: flip must be a bool, got 1"),
    ],
)
def test_wrong_files_are_named(old: str, new: str, words: str, tmp_path: Path) -> None:
    text = (SHIPPED / "cifar10.toml").read_text()
    assert f"\n{old}" in text or old in text
    path = write(tmp_path, text.replace(old, new, 1))
    with pytest.raises(ValueError) as caught:
        load_recipe(path, tmp_path)
    assert str(caught.value).startswith(f"load_recipe: {path}") and words in str(caught.value)


@pytest.mark.parametrize(
    "name, replaced, words",
    [
        ("imagenet-resnet18", {"depths": "[2, 2]"}, "[model] depths must be as many as [model]"),
        ("imagenet-resnet18", {"final_image_size": "128"}, "at least image_size = 160, got 128"),
        ("imagenet-resnet18", {"ramp": "[0, 1]\nworkers = 0"}, "[data] workers must be a whole"),
        ("imagenet-resnet18", {"ramp": "[65]"}, "[data] ramp must be a list of 2 whole numbers"),
        ("imagenet-resnet18", {"layer": '"deep"'}, "[model] layer must be one of basic, bottlenec"),
        ("cifar10", {"reader": '"code"', "mean": "1"}, "[data] mean must be among context"),
    ],
)
def test_what_does_not_fit_is_named(
    name: str, replaced: dict[str, str], words: str, tmp_path: Path
) -> None:
    path = write(tmp_path, shipped_text(name, **replaced))
    with pytest.raises(ValueError) as caught:
        load_recipe(path, tmp_path)
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_a_growing_image_needs_its_ramp(tmp_path: Path) -> None:
    text = shipped_text("imagenet-resnet18")
    for line in ("ramp = [65, 76]\n", "final_image_size = 192\n"):
        assert line in text
        path = write(tmp_path, text.replace(line, ""))
        with pytest.raises(ValueError, match=r"\[data\] ramp must be given together with"):
            load_recipe(path, tmp_path)
    both = text.replace("ramp = [65, 76]\n", "").replace("final_image_size = 192\n", "")
    assert load_recipe(write(tmp_path, both), tmp_path).name == "imagenet-resnet18"


def test_text_and_images_do_not_mix(tmp_path: Path) -> None:
    text = (SHIPPED / "code-lm-50m.toml").read_text()
    longer = write(tmp_path, text.replace("context = 512", "context = 513", 1))
    with pytest.raises(ValueError, match=r"context must be at least the 513 of \[data\], got 512"):
        load_recipe(longer)
    images = text.replace('"code"', '"digits"').replace("context = 512\nvalidation", "#", 1)
    with pytest.raises(ValueError, match="name must be a model of images, got one of text"):
        load_recipe(write(tmp_path, images))


def test_a_digits_recipe_of_ones_own(tmp_path: Path) -> None:
    text = """
    task = { name = "mine", summary = "", metric = "accuracy", evaluations = 1 }
    data = { reader = "digits" }
    recipe = { epochs = 1, flip = true }
    [model]
    name = "small-resnet"
    in_channels = 1
    num_classes = 9
    widths = [32]
    depth = 1
    """
    task = load_recipe(write(tmp_path, text))
    assert task.recipe.flip is True and task.recipe.epochs == 1
    with pytest.raises(ValueError, match="num_classes must be 10, the classes in the data, got 9"):
        task.load()
    text = text.replace("num_classes = 9", "num_classes = 10")
    assert len(load_recipe(write(tmp_path, text)).load().train) == 1200


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["cifar10"], "--data must be the folder of CIFAR-10's binary version for cifar10.toml"),
        (["cifar10", "--data", "nowhere"], "got nowhere. Pass the folder of your data."),
        (["imagenet-resnet50"], "--data must be a folder with train/<class>/* and val/<class>/*"),
        (["digits", "--data", "."], "--data must be left out for digits"),
        (["code-lm-50m", "--data", "."], "--data must be left out for code-lm-50m.toml"),
        (["nowhere.toml"], "nowhere.toml: No such file or directory"),
    ],
)
def test_wrong_calls_are_named(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*arguments, "--out", tmp_path / "new") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("sdgp train: ") and words in captured.err
    assert not (tmp_path / "new").exists()


def test_a_run_of_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar10(tmp_path / "data")
    options = ["--data", tmp_path / "data", "--steps", 1, "--batch-size", 2, "--methods", "dense"]
    text = shipped_text("cifar10").replace("num_classes = 10", "num_classes = 10\nscale_down = 4")
    assert train(write(tmp_path, text), *options, "--out", tmp_path / "out") == 0
    text = text.replace("scale_down = 4", "scale_down = 2")
    assert train(write(tmp_path, text), *options, "--out", tmp_path / "out", "--resume") == 2
    assert "model is" in capsys.readouterr().err
