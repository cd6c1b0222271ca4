"""Thirty-eight architectures of transformers with random weights and random small sizes."""

import random
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tests.foreign.models import check_model, floats
from tests.foreign.tally import Tally

pytestmark = pytest.mark.foreign

CAUSAL = "GPT2 GPTNeoX GPTJ Llama Mistral Mixtral Qwen2 Qwen3 Gemma Phi Phi3 OPT Bloom Falcon"
CAUSAL += " Olmo2 Cohere StableLm Starcoder2 CodeGen"
CLASSIFIERS = "Bert Roberta Electra DistilBert Albert DebertaV2"
TRANSLATORS = "T5 Bart Pegasus"
IMAGES = "ViT Beit Swin ConvNext ConvNextV2 ResNet RegNet MobileNetV2 Dinov2 Segformer"
TASKS = (
    (CAUSAL, hf.AutoModelForCausalLM),
    (CLASSIFIERS, hf.AutoModelForSequenceClassification),
    (TRANSLATORS, hf.AutoModelForSeq2SeqLM),
    (IMAGES, hf.AutoModelForImageClassification),
)
ARCHITECTURES = [(name, auto) for names, auto in TASKS for name in names.split()]


def sizes(name: str) -> dict[str, Any]:
    """Return the arguments of a small configuration; each family reads those that it knows."""
    draw = random.Random(name)
    width, heads = draw.choice([32, 48, 64]), draw.choice([2, 4])
    inner = width * draw.choice([2, 4])
    text = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, 2]),
        "head_dim": width // heads,
        "intermediate_size": inner,
        "max_position_embeddings": 32,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "rotary_dim": 8,
        "num_labels": 4,
    }
    named = {
        "GPT2": {"n_embd": width, "n_layer": 2, "n_head": heads, "n_positions": 32},
        "GPTJ": {"n_embd": width, "n_layer": 2, "n_head": heads, "n_positions": 32},
        "CodeGen": {"hidden_size": 64, "num_attention_heads": 4, "n_positions": 32, "n_ctx": 32},
        "OPT": {"ffn_dim": inner, "word_embed_proj_dim": width},
        "Bloom": {"n_layer": 2, "n_head": heads},
        "Mixtral": {"num_local_experts": 4},
        "DistilBert": {"dim": width, "hidden_dim": inner, "n_layers": 2, "n_heads": heads},
        "Albert": {"embedding_size": 16},
        "Electra": {"embedding_size": 16},
        "T5": {"d_model": width, "d_kv": 16, "d_ff": inner, "num_layers": 2, "num_heads": heads},
    }
    coders = {"d_model": width, "encoder_layers": 2, "decoder_layers": 2}
    coders |= {f"{side}_attention_heads": heads for side in ("encoder", "decoder")}
    coders |= {f"{side}_ffn_dim": inner for side in ("encoder", "decoder")}
    image = {"image_size": 32, "patch_size": 8, "num_labels": 4}
    stages = {
        "Swin": {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1]},
        "ConvNext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
        "ConvNextV2": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
        "ResNet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2]},
        "RegNet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
        "MobileNetV2": {"depth_multiplier": 0.35, "image_size": 32},
        "Segformer": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    }
    stages["Swin"] |= {"num_heads": [2, 4], "window_size": 4, "num_labels": 4}
    stages["RegNet"] |= {"groups_width": 8}
    if name in stages:
        return {"num_labels": 4} | stages[name]
    if name in IMAGES.split():
        return {k: text[k] for k in list(text)[:3] if k in text} | {
            "intermediate_size": inner,
            **image,
        }
    if name == "Falcon":  # works it out
        del text["head_dim"]
    return text | named.get(name, {}) | (coders if name in ("Bart", "Pegasus") else {})


def batch_of(name: str) -> dict[str, Tensor]:
    """Return what the model reads, with labels, so that it makes its own loss."""
    if name in IMAGES.split():
        return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    ids = torch.randint(3, 64, (2, 12))
    if name in CLASSIFIERS.split():
        return {"input_ids": ids, "labels": torch.tensor([0, 1])}
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("name, auto", ARCHITECTURES, ids=[name for name, _ in ARCHITECTURES])
def test_architecture(name: str, auto: Any, tally: Tally) -> None:
    config = getattr(hf, f"{name}Config")(**sizes(name))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # grouped products take no float64
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(config).double()
    batch = batch_of(name)

    def loss(model: nn.Module) -> Tensor:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        value: Tensor = model(**floats(batch, dtype)).loss
        return value

    check_model(tally, f"transformers {name}", model, loss)
