"""Real models that nobody here wrote, with random weights: convert, train two steps, revert."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from tests.helpers import in_float64

Build = Callable[[], tuple[nn.Module, dict[str, Tensor]]]
TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def images(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 1])}


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (2, 12))
    return {"input_ids": ids, "labels": ids}


def resnet(layer_type: str) -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = [16, 32] if layer_type == "basic" else [32, 64]
    config = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=sizes, depths=[1, 2], layer_type=layer_type
    )
    return hf.ResNetForImageClassification(config), images()


def regnet() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.RegNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8
    )
    return hf.RegNetForImageClassification(config), images()


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    return hf.ViTForImageClassification(config), images()


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, **TEXT)
    return hf.GPT2LMHeadModel(config), tokens()


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, **TEXT
    )
    return hf.BertForSequenceClassification(config), tokens() | {"labels": torch.tensor([0, 1])}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        **TEXT,
    )
    return hf.LlamaForCausalLM(config), tokens()


#: model -> (builder, layers that must be converted, layers that must stay dense)
MODELS: dict[str, tuple[Build, list[str], list[str]]] = {
    "resnet basic": (
        lambda: resnet("basic"),
        ["resnet.encoder.stages.1.layers.0.shortcut.convolution"],
        ["resnet.embedder.embedder.convolution", "classifier.1"],
    ),
    "resnet bottleneck": (
        lambda: resnet("bottleneck"),
        ["resnet.encoder.stages.0.layers.0.layer.1.convolution"],
        ["resnet.embedder.embedder.convolution", "classifier.1"],
    ),
    "regnet": (
        regnet,
        ["regnet.encoder.stages.1.layers.0.layer.1.convolution"],
        ["regnet.embedder.embedder.convolution", "classifier.1"],
    ),
    "vit": (vit, [], ["vit.embeddings.patch_embeddings.projection", "classifier"]),
    "gpt2": (
        gpt2,
        ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"],
        ["lm_head"],
    ),
    "bert": (bert, ["bert.encoder.layer.0.attention.self.query"], ["classifier"]),
    "llama": (llama, ["model.layers.1.mlp.down_proj"], ["lm_head"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_convert_train_and_revert(name: str) -> None:
    build, expected, dense = MODELS[name]
    model, batch = build()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    kinds = {fqn: type(mod) for fqn, mod in model.named_modules()}

    report = sdgp.convert_(model, preset="all")
    assert set(expected) <= set(report.converted)
    assert set(dense) <= set(report.skipped)
    assert len(report.converted) >= 4
    assert list(model.state_dict()) == keys

    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    for fqn in report.converted:
        layer = model.get_submodule(fqn)
        assert layer.sdgp_record.calls["grad_input", "emulated"] == 2, fqn
        assert layer.weight.grad is not None

    sdgp.revert_(model)
    assert {fqn: type(mod) for fqn, mod in model.named_modules()} == kinds
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[k] is parameters[k] for k in parameters)
    optimizer.step()


@pytest.mark.parametrize("name", MODELS)
def test_without_pruning_a_converted_model_trains_as_the_plain_one(name: str) -> None:
    with in_float64():  # where the order of summation is out of sight
        model, batch = MODELS[name][0]()
    model.eval()  # no dropout
    model(**batch).loss.backward()
    plain = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sdgp.convert_(model, sdgp.SDGPConfig(prune="none"))
    model(**batch).loss.backward()
    for key, parameter in model.named_parameters():
        if key in plain:
            torch.testing.assert_close(parameter.grad, plain[key])


def test_conv1d_gradients_equal_the_formula() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(16, 8)
    plain = Conv1D(16, 8)
    plain.load_state_dict(layer.state_dict())
    sdgp.convert_(layer, sdgp.SDGPConfig(prune="magnitude"))
    assert "nf=16, nx=8" in repr(layer) and "sdgp=" in repr(layer)
    x, y = (torch.ones(3, 5, 8, requires_grad=True) for _ in range(2))
    ours, dense = layer(x), plain(y)
    assert torch.equal(ours, dense)
    grad_output = torch.randn(3, 5, 16)
    ours.backward(grad_output)
    dense.backward(grad_output)
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert torch.equal(layer.bias.grad, plain.bias.grad)
    expected = sdgp.prune(grad_output) @ layer.weight.detach().t()
    torch.testing.assert_close(x.grad, expected)
    sdgp.set_enabled_(layer, False)
    assert torch.equal(layer(x), dense)
