"""The conversion report: a screen for any model, every layer with a product, every reason."""

import pytest
import torch
from torch import nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.planner.gemms import trace_step
from sdgp_cusparselt.planner.models import load

LLAMA = """\
SDGP mvue 2:4: 224 converted, 1 plain
pruned
  model.layers.*.self_attn.q_proj x 32  Linear
  model.layers.*.self_attn.k_proj x 32  Linear
  model.layers.*.self_attn.v_proj x 32  Linear
  model.layers.*.self_attn.o_proj x 32  Linear
  model.layers.*.mlp.gate_proj x 32     Linear
  model.layers.*.mlp.up_proj x 32       Linear
  model.layers.*.mlp.down_proj x 32     Linear
plain: makes the model's outputs; include_heads=True converts it
  lm_head                               Linear
every layer: print(report.details())"""


def test_llama_fits_a_screen() -> None:
    report = sdgp.convert_(load("llama-3-8b").model, preset="all")
    assert str(report) == LLAMA
    assert repr(report) == "<ConversionReport SDGP mvue 2:4: 224 converted, 1 plain>"
    every = report.details().splitlines()
    assert len(every) == 1 + 1 + 224 + 1 + 1
    assert ["model.layers.31.mlp.down_proj", "Linear"] in [line.split() for line in every]
    html = report._repr_html_()
    assert "model.layers.*.mlp.up_proj x 32" in html and "model.layers.31.mlp.up_proj" in html


def test_small_models_are_listed_by_name() -> None:
    report = sdgp.convert_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    assert str(report) == "SDGP mvue 2:4: 2 converted, 0 plain\npruned\n  0  Linear\n  2  Linear"


@pytest.mark.parametrize("count", [20, 30, 200])
def test_groups_beyond_a_screen_are_counted(count: int) -> None:
    model = nn.ModuleDict({f"layer{chr(97 + i % 26)}{i}": nn.Linear(8, 8) for i in range(count)})
    report = sdgp.convert_(model)
    lines = str(report).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    listed = sum(line.startswith("  layer") for line in lines)
    left = count - listed
    assert (f"and {left} more layers" in lines[-1]) == (left > 0)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 16))


def test_every_layer_with_a_product_is_listed_with_its_reason() -> None:
    model = nn.ModuleDict(
        {
            "conv1d": nn.Conv1d(8, 8, 3),
            "up": nn.ConvTranspose2d(8, 8, 2),
            "rnn": nn.LSTM(8, 8),
            "experts": Experts(),
            "norm": nn.LayerNorm(8),
            "body": nn.Linear(8, 8),
        }
    )
    model.position = nn.Parameter(torch.zeros(1, 8, 8))
    report = sdgp.convert_(model)
    assert report.converted == ["body"]
    assert report.skipped == {
        "conv1d": "Conv1d has no pruned backward here",
        "up": "ConvTranspose2d has no pruned backward here",
        "rnn": "LSTM has no pruned backward here",
        "experts": "its weights are one parameter of many experts (gate_up_proj, 4 x 8 x 16), "
        "not layers",
    }
    assert "ConvTranspose2d has no pruned backward here" in str(report)


class Speaker(nn.Module):
    """A language model whose head has a name of its own, as GPT-NeoX's embed_out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.to_words = nn.Linear(64, 64), nn.Linear(64, 128)

    def get_output_embeddings(self) -> nn.Module:
        return self.to_words

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_words(self.body(x))


@pytest.mark.parametrize("wrap", [False, True])
def test_output_embeddings_are_heads_whatever_their_name(wrap: bool) -> None:
    model = nn.ModuleDict({"inner": Speaker()}) if wrap else Speaker()
    prefix = "inner." if wrap else ""
    report = sdgp.convert_(model)
    assert report.converted == [f"{prefix}body"]
    assert "makes the model's outputs" in report.skipped[f"{prefix}to_words"]
    sdgp.revert_(model)
    assert len(sdgp.convert_(model, include_heads=True).converted) == 2


def test_the_planner_leaves_the_same_heads_plain() -> None:
    x = torch.randn(32, 64, requires_grad=True)
    for include, prunable in ((False, {"body"}), (True, {"body", "to_words"})):
        trace = trace_step(Speaker(), [x], include_heads=include)
        assert {gemm.fqn for gemm in trace.gemms if gemm.prunable} == prunable


class Adapted(nn.Module):
    """What PEFT makes of a linear layer, by its own contract."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_magnitude_vector")

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(64, 64)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(64, 8, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(8, 64, bias=False)})


def test_adapters_stay_plain() -> None:
    report = sdgp.convert_(nn.ModuleDict({"q_proj": Adapted()}))
    assert report.converted == ["q_proj.base_layer"]
    assert set(report.skipped) == {"q_proj.lora_A.default", "q_proj.lora_B.default"}
    assert "nothing to gain" in report.skipped["q_proj.lora_A.default"]


def test_errors_name_patterns_not_hundreds_of_layers() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(300)))
    with pytest.raises(ValueError) as caught:
        sdgp.convert_(model, filter_fn=lambda module, name: False)
    assert len(str(caught.value)) < 300 and "* x 300: left out by filter_fn" in str(caught.value)
