"""Presets: which layers of real transformers read and which write the residual stream."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.layers.presets import role_of
from tests.layers.test_models import bert, gpt2, llama, vit

CONFIG = sdgp.SDGPConfig(prune="magnitude", grad_weight_prune="magnitude", backend="dense")


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    gated = {"feed_forward_proj": "gated-gelu", "vocab_size": 64, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **gated))


def mixtral() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, **heads, vocab_size=64))


#: model -> (last names of its readers, of its writers)
ROLES = {
    "gpt2": (lambda: gpt2()[0], {"c_attn", "c_fc"}, {"c_proj"}),
    "bert": (lambda: bert()[0], {"query", "key", "value", "intermediate.dense"}, {"output.dense"}),
    "vit": (lambda: vit()[0], set(), set()),
    "llama": (
        lambda: llama()[0],
        {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
        {"o_proj", "down_proj"},
    ),
    "t5": (t5, {"q", "k", "v", "wi_0", "wi_1"}, {"o", "wo"}),
    "mixtral": (mixtral, {"q_proj", "k_proj", "v_proj"}, {"o_proj"}),
    "torch": (lambda: nn.TransformerEncoderLayer(32, 2, 64), {"linear1"}, {"linear2"}),
}


def widths(model: nn.Module, name: str) -> tuple[int, int]:
    module = model.get_submodule(name)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.nx, module.nf


@pytest.mark.parametrize("name", ROLES)
def test_every_known_layer_has_the_role_that_its_widths_allow(name: str) -> None:
    """A reader takes the stream's width, a writer gives it: 32 in every model here."""
    build, readers, writers = ROLES[name]
    model = build()
    report = sdgp.convert_(model, CONFIG, preset="readers")
    assert all(any(c.endswith(r) for c in report.converted) for r in readers)
    assert not any(c.endswith(w) for c in report.converted for w in writers)
    assert all(widths(model, c)[0] == 32 for c in report.converted)
    written = [n for n, why in report.skipped.items() if "it writes the residual stream" in why]
    assert all(widths(model, n)[1] == 32 for n in written)
    assert all(any(n.endswith(w) for n in written) for w in writers)


@pytest.mark.parametrize("name", ["router", "lora_A.default", "pooler.dense", "gate", ""])
def test_names_that_say_nothing_have_no_role(name: str) -> None:
    assert role_of(name) is None


def test_balanced_prunes_grad_weight_everywhere_and_grad_input_of_readers() -> None:
    model = gpt2()[0]
    report = sdgp.convert_(model, CONFIG, preset="balanced")
    for name in report.converted:
        own = report.configs[name]
        assert own.grad_weight == "sparse" and own.prunes == name.endswith(("c_attn", "c_fc"))
    assert any(name.endswith("c_proj") for name in report.converted)


def test_gradients_of_a_block_follow_the_preset() -> None:
    """The reader's grad_input is pruned, the writer's is torch's own."""
    torch.manual_seed(0)
    block = nn.Sequential()
    block.add_module("up", nn.Linear(16, 32, bias=False))
    block.add_module("down", nn.Linear(32, 16, bias=False))
    x, grad_output = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
    report = sdgp.convert_(block, CONFIG, preset="readers")
    assert report.converted == ["up"]
    block(x).backward(grad_output)
    hidden = grad_output @ block.down.weight
    torch.testing.assert_close(x.grad, sdgp.prune(hidden) @ block.up.weight)


def test_a_preset_is_refused_where_it_finds_nothing_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    with pytest.raises(ValueError, match="transformer for preset 'readers'"):
        sdgp.convert_(model, CONFIG, preset="readers")
    with pytest.raises(ValueError, match="preset must be one of all, readers, balanced"):
        sdgp.convert_(model, CONFIG, preset="writers")
    with pytest.raises(ValueError, match="config must be one SDGPConfig with a preset"):
        sdgp.convert_(model, {"*": CONFIG}, preset="readers")
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("name", [name for name in ROLES if name != "vit"])
def test_a_transformer_is_converted_by_its_readers_unless_told_otherwise(name: str) -> None:
    model = ROLES[name][0]()
    chosen = sdgp.convert_(copy.deepcopy(model), CONFIG)
    readers = sdgp.convert_(copy.deepcopy(model), CONFIG, preset="readers")
    assert chosen.configs == readers.configs and chosen.skipped == readers.skipped
    every = sdgp.convert_(copy.deepcopy(model), CONFIG, preset="all")
    assert len(every.converted) > len(chosen.converted)


def test_who_chooses_layers_gets_them_all() -> None:
    model = nn.TransformerEncoderLayer(32, 2, 64)
    every = ["linear1", "linear2"]
    for arguments in (
        {"filter_fn": lambda module, name: isinstance(module, nn.Linear) and "attn" not in name},
        {"include_heads": True},
        {"config": {"linear*": CONFIG}},
        {"config": CONFIG.replace(prune="none", grad_weight="sparse")},
    ):
        report = sdgp.convert_(copy.deepcopy(model), **arguments)
        assert report.converted == every, arguments
    assert sdgp.convert_(model).converted == ["linear1"]


def test_what_has_no_attention_is_converted_whole() -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(32, 64), "fc2": nn.Linear(64, 32)})
    assert sdgp.convert_(model).converted == ["fc1", "fc2"]


def test_an_adapted_layer_keeps_its_role() -> None:
    assert role_of("model.layers.0.self_attn.q_proj.base_layer") == "reader"
    assert role_of("model.layers.0.mlp.down_proj.base_layer") == "writer"


def test_what_keeps_a_layer_dense_anyway_is_said_first() -> None:
    model, _ = llama()
    model.conv, model.odd = nn.Conv2d(8, 8, 3), nn.Linear(32, 30)
    report = sdgp.convert_(model, CONFIG)
    assert "makes the model's outputs" in report.skipped["lm_head"]
    assert "no multiple of m" in report.skipped["odd"]
    assert report.skipped["conv"] == "preset 'readers' prunes linear layers alone"
    assert "it writes the residual stream" in report.skipped["model.layers.0.mlp.down_proj"]
