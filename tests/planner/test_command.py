"""``sdgp plan`` end to end, on a small model of its own and on transformers configurations."""

import json
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor, nn

from sdgp_cusparselt.commands.parser import main
from sdgp_cusparselt.layers.convert import convert_
from sdgp_cusparselt.planner.models import load
from sdgp_cusparselt.planner.report import table
from sdgp_cusparselt.planner.steps_ratios import MEASURED
from sdgp_cusparselt.training.equal_loss import steps_ratios

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
    word = "a win" if wins else "a loss"
    worth = f"{gain / ratio:.3f}x to the same loss: {word} of {abs(gain / ratio - 1):.1%}."
    assert f"A100: with R = {ratio:g}, {worth}" in text
    assert main(["plan", *arguments, "--steps-ratio", "0"]) == 2
    assert "--steps-ratio/--r: must be a number above 0, got '0'" in capsys.readouterr().err


def block() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.up = nn.Linear(64, 4096), nn.Linear(4096, 8192)
            self.down = nn.Linear(8192, 4096)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(nn.functional.gelu(self.up(self.first(x))))

    return Block()


BLOCK = [f"{__name__}:block", "--shape", "2048x64", "--batch", "4", "--gpu", "A100"]


@pytest.mark.parametrize("preset", ["readers", "balanced"])
def test_a_preset_is_worth_its_measured_ratio(
    capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    arguments = ["--model", *BLOCK, "--preset", preset]
    data = json.loads(plan(capsys, *arguments, "--json", "-"))
    taken = {(g["fqn"], g["role"]) for g in data["gpus"][0]["gemms"] if g["gains"]}
    weights = {("up", "grad_weight"), ("down", "grad_weight")}
    assert taken == {("up", "grad_input"), *(weights if preset == "balanced" else ())}
    ratio, gain = MEASURED[preset].mean, data["gpus"][0]["step_speedup"]
    assert data["steps_ratio"] == ratio
    text = " ".join(plan(capsys, *arguments).split())
    given = f"with R = {ratio:g} ({preset}: code-lm, 2,000 steps, 3 seeds)"
    assert f"A100: {given}, {gain / ratio:.3f}x to the same loss: a win of" in text
    assert "with R = 1.5, " in " ".join(plan(capsys, *arguments, "--r", "1.5").split())


def test_ratios_of_presets_are_those_of_the_result_files() -> None:
    """After a new measurement, write its numbers into planner/steps_ratios.py."""
    folder = Path(__file__).parents[2] / "docs" / "results"
    files = ["presets-2000", *(f"dense-{steps}" for steps in (1600, 1800))]
    documents = [json.loads((folder / f"code-lm-{name}.json").read_text()) for name in files]
    found = {r.label: r for r in steps_ratios(documents) if r.steps == 2000}
    for ratio in MEASURED.values():
        measured = found[ratio.label]
        assert (round(measured.mean, 3), round(measured.std, 3)) == (ratio.mean, ratio.std)
        assert (len(measured.values), measured.steps) == (ratio.seeds, ratio.steps)


def test_fused_packs_are_compared_with_passes_of_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", *BLOCK, "--fuse"]
    card = json.loads(plan(capsys, *arguments, "--json", "-"))["gpus"][0]
    assert card["step_speedup"] > card["unfused_speedup"] > 1
    text = " ".join(plan(capsys, *arguments).split())
    assert "Fused: 1 of 2 layers, 1 behind gelu: packing adds 1.125 bytes" in text
    assert "unfused fused" in text
    assert main(["plan", *arguments, "--heavy", "0.06"]) == 2
    assert "--fuse and --heavy exclude each other" in capsys.readouterr().err


def test_heavy_tokens_cost_time_and_have_no_measured_ratio(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", *BLOCK, "--preset", "readers"]
    plain = json.loads(plan(capsys, *arguments, "--json", "-"))["gpus"][0]["step_speedup"]
    heavy = plan(capsys, *arguments, "--heavy", "0.06", "--json", "-")
    assert json.loads(heavy)["gpus"][0]["step_speedup"] < plain
    text = " ".join(plan(capsys, *arguments, "--heavy", "0.06").split())
    assert "496 of 8192 tokens take a second row" in text
    assert "R of a preset with heavy tokens was not measured: give it with --r." in text
    assert main(["plan", *arguments, "--heavy", "1.5"]) == 2
    assert "must be a number of at least 0 and at most 1, got '1.5'" in capsys.readouterr().err


def test_weights_are_planned_for_steps_and_inference(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", *BLOCK, "--weights"]
    data = json.loads(plan(capsys, *arguments, "--json", "-"))["weights"]
    (card,) = data["gpus"]
    assert card["fastest"] == "double+mvue" and card["decode"] is None
    assert card["steps"]["double+mvue"] == max(card["steps"].values())
    saved = data["memory_bytes"]["dense"] - data["memory_bytes"]["packed"]
    assert saved == 2 * 7 / 16 * 2 * 4096 * 8192
    text = plan(capsys, *arguments)
    assert "A100: double+mvue wins" in text and "weights+sdgp+mvue" in text


def a_gpt2(folder: Path, **sizes: int) -> list[str]:
    """Return what plans a GPT-2 of these sizes on an A100, at its longest sequence."""
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "vocab_size": 512, **sizes}))
    sequence = str(sizes["n_positions"])
    return ["--model", f"transformers:{path}", "--sequence", sequence, "--gpu", "A100"]


def test_a_language_model_is_planned_for_decoding(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = a_gpt2(tmp_path, n_embd=4096, n_layer=1, n_head=32, n_positions=64)
    data = json.loads(plan(capsys, *arguments, "--weights", "--json", "-"))["weights"]
    assert 1.3 < data["gpus"][0]["decode"] < 16 / 9


def test_a_preset_that_finds_no_reader_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", TINY, "--shape", "512x64", "--preset", "readers"]) == 2
    assert "no layer of it is known to read a residual stream" in capsys.readouterr().err


def test_without_a_preset_it_plans_what_convert_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = a_gpt2(tmp_path, n_embd=64, n_layer=2, n_head=4, n_positions=32)
    data = json.loads(plan(capsys, *arguments, "--json", "-"))
    gemms = data["gpus"][0]["gemms"]
    planned = {g["fqn"] for g in gemms if g["prunable"]}
    assert planned == set(convert_(load(arguments[1]).model).converted)
    assert data["preset"] == "readers" and all(name.endswith(("attn", "fc")) for name in planned)
    line = "Planned as convert_ prunes a transformer by itself"
    assert line in plan(capsys, *arguments)
    for preset in ("readers", "all"):
        assert line not in plan(capsys, *arguments, "--preset", preset)
    # A model that is no transformer is pruned whole, by both, with nothing to add.
    tiny_model = ["--model", TINY, "--shape", "512x64", "--gpu", "A100"]
    assert line not in plan(capsys, *tiny_model)
    assert json.loads(plan(capsys, *tiny_model, "--json", "-"))["preset"] == "all"


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
