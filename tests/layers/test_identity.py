"""What a converted layer is to those who ask for its class."""

import copy
import pickle

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.pytorch_utils import Conv1D

import sdgp_cusparselt as sdgp

CONFIG = sdgp.SDGPConfig(prune="magnitude")


@pytest.fixture
def gpt2() -> hf.GPT2LMHeadModel:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(bos_token_id=1, eos_token_id=2, **sizes))
    sdgp.convert_(model, CONFIG)
    return model


def test_a_converted_conv1d_is_one_of_transformers_and_one_of_ours(
    gpt2: hf.GPT2LMHeadModel,
) -> None:
    layer = gpt2.transformer.h[0].attn.c_attn
    assert isinstance(layer, Conv1D) and isinstance(layer, sdgp.nn.SDGPConv1D)
    assert repr(layer) == "SDGPConv1D(nf=96, nx=32, sdgp=magnitude 2:4)"
    twin = sdgp.nn.SDGPConv1D.from_dense(Conv1D(8, 4), CONFIG)
    assert type(twin) is type(layer) and type(twin.to_dense()) is Conv1D
    assert "0.attn.c_attn" in sdgp.revert_(gpt2)[0] and type(layer) is Conv1D


def test_a_converted_conv1d_is_initialised_as_the_plain_one(gpt2: hf.GPT2LMHeadModel) -> None:
    layer = gpt2.transformer.h[0].mlp.c_fc
    nn.init.constant_(layer.weight, 7.0)
    gpt2._init_weights(layer)
    assert 0 < layer.weight.std() < 0.1


def test_a_converted_conv1d_is_copied_and_pickled(gpt2: hf.GPT2LMHeadModel) -> None:
    layer, x = gpt2.transformer.h[0].mlp.c_fc, torch.randn(4, 32, requires_grad=True)
    layer(x).sum().backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        twin.zero_grad()
        twin(x).sum().backward()
        assert torch.equal(twin.weight.grad, layer.weight.grad)
        sdgp.revert_(twin)
        assert type(twin) is Conv1D


def test_other_classes_are_theirs_too() -> None:
    layers = (nn.Linear(8, 8), nn.Conv2d(8, 8, 1))
    for layer in layers:
        kind = type(layer)
        sdgp.convert_(layer, CONFIG)
        assert isinstance(layer, kind) and type(layer) is not kind
