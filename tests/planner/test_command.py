"""``sdgp plan`` end to end, on a small model of its own and on transformers configurations."""

import json
from pathlib import Path

import pytest
from PIL import Image
from torch import nn

from sdgp_cusparselt.commands.parser import main
from sdgp_cusparselt.planner.models import load
from sdgp_cusparselt.planner.report import table

TINY = f"{__name__}:tiny"


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 4096))


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_json_lists_every_gemm_on_every_card(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, "--model", TINY, "--shape", "512x64", "--batch", "4", "--json", "-")
    data = json.loads(text)
    assert [card["gpu"] for card in data["gpus"]] == [
        "A100",
        "H100",
        "H200",
        "L40S",
        "RTX4090",
        "B200",
    ]
    gemms = data["gpus"][0]["gemms"]
    assert [(g["fqn"], g["role"]) for g in gemms] == [
        ("0", "forward"),
        ("0", "grad_weight"),
        ("2", "forward"),
        ("2", "grad_input"),
        ("2", "grad_weight"),
    ]
    assert data["flops"]["forward"] == 2 * 2048 * 4096 * (64 + 4096)
    assert data["flops"]["prunable"] == 2 * 2048 * 4096 * 4096
    assert all(card["source"] and card["efficiency_source"] for card in data["gpus"])


def test_text_says_that_it_predicts_and_from_what(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, "--model", TINY, "--shape", "2048x64", "--gpu", "H100", "--details")
    for words in (
        "H100: published efficiencies",
        "Predictions, not measurements",
        "arXiv 2603.05232",
        "16.7%",
        "no result files to compare with",
    ):
        assert words in text


@pytest.mark.parametrize("wins", [True, False])
def test_a_ratio_of_steps_turns_a_faster_step_into_win_or_loss(
    capsys: pytest.CaptureFixture[str], wins: bool
) -> None:
    arguments = ["--model", TINY, "--shape", "2048x64", "--batch", "4", "--gpu", "A100"]
    gain = json.loads(plan(capsys, *arguments, "--json", "-"))["gpus"][0]["step_speedup"]
    ratio = round(gain - 0.01 if wins else gain + 0.01, 3)
    text = " ".join(plan(capsys, *arguments, "--steps-ratio", str(ratio)).split())
    worth = f"{gain / ratio:.3f}x to the same loss: {'a win' if wins else 'a loss'}."
    assert f"A100: with R = {ratio:g}, {worth}" in text
    assert main(["plan", *arguments, "--steps-ratio", "0"]) == 2
    assert "--steps-ratio: must be a number above 0, got '0'" in capsys.readouterr().err


def test_excluded_layers_stay_dense(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", TINY, "--shape", "512x64", "--json", "-", "--gpu", "A100"]
    data = json.loads(plan(capsys, *arguments, "--exclude", "2"))
    assert data["flops"]["prunable"] == 0
    assert data["gpus"][0]["step_speedup"] == 1.0


def test_the_plot_is_a_picture_of_readme_width(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "plan.png"
    plan(capsys, "--model", TINY, "--shape", "2048x64", "--plot", str(path))
    with Image.open(path) as image:
        assert image.width >= 1400
        assert len(image.convert("L").getcolors()) > 50


def test_a_configuration_file_gives_its_model(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}))
    problem = load(f"transformers:{path}", batch=2, sequence=16)
    assert type(problem.model).__name__ == "GPT2LMHeadModel"
    assert problem.inputs["input_ids"].shape == (2, 16)
    assert problem.model.get_input_embeddings().weight.is_meta


@pytest.mark.parametrize(
    "model, words",
    [
        ("resnet50", "one of resnet-50, vit-l-16"),
        ("transformers:no-such-type", "a known model type"),
        (TINY, "--shape"),
        ("no_such_module:f", "no_such_module"),
    ],
)
def test_a_wrong_model_says_what_would_be_right(
    capsys: pytest.CaptureFixture[str], model: str, words: str
) -> None:
    assert main(["plan", "--model", model]) == 2
    assert words in capsys.readouterr().err


def test_tables_are_aligned_markdown() -> None:
    assert table(["a", "n"], [["long", 1], ["b", 100]]).splitlines() == [
        "| a    |   n |",
        "| ---- | --: |",
        "| long |   1 |",
        "| b    | 100 |",
    ]
