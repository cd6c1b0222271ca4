"""Models of transformers, fused: the same forward to the bit, the same training."""

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import sdgp_cusparselt as sdgp

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
TEXT |= {"num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = TEXT | {"num_key_value_heads": 1, "head_dim": 16}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
IMAGE = {k: TEXT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
IMAGE |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "num_labels": 4}

#: Family -> (sizes, layers that are fused of each block, what makes their gradient).
FAMILIES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "GPT2": (GPT2, ["mlp.c_fc"], "gelu_tanh"),
    "Bert": (TEXT, ["intermediate.dense"], "gelu"),
    "ViT": (IMAGE, ["mlp.fc1"], "gelu"),
    "Llama": (GROUPED, ["mlp.gate_proj", "mlp.up_proj"], "silu gate"),
    "Qwen2": (GROUPED, ["mlp.gate_proj", "mlp.up_proj"], "silu gate"),
    "Qwen3": (GROUPED, ["mlp.gate_proj", "mlp.up_proj"], "silu gate"),
    "Mistral": (GROUPED, ["mlp.gate_proj", "mlp.up_proj"], "silu gate"),
    "Gemma": (GROUPED, ["mlp.gate_proj", "mlp.up_proj"], "gelu_tanh gate"),
    "Nemotron": (GROUPED, ["mlp.up_proj"], "relu_squared"),
}
HEADS = {"Bert": hf.AutoModelForSequenceClassification, "ViT": hf.AutoModelForImageClassification}
#: The others are of Llama's shape, and slow to import.
FIRST = ("GPT2", "Bert", "ViT", "Llama", "Nemotron")
NAMES = pytest.mark.parametrize(
    "name",
    [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)


def model_of(name: str) -> nn.Module:
    config = getattr(hf, f"{name}Config")(**FAMILIES[name][0])
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model: nn.Module = HEADS.get(name, hf.AutoModelForCausalLM).from_config(config)
    return model


def batch_of(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if name == "ViT":
        images = torch.randn(2, 3, 32, 32).to(dtype)
        return {"pixel_values": images, "labels": torch.tensor([0, 1])}
    ids = torch.randint(3, 64, (2, 12))
    return {"input_ids": ids, "labels": torch.tensor([0, 1]) if name == "Bert" else ids}


def pair(name: str, config: sdgp.SDGPConfig, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Return a fused model and the same unfused."""
    model = model_of(name).to(dtype)
    sdgp.convert_(model, config)
    fused = copy.deepcopy(model)
    sdgp.fuse_(fused)
    return fused, model


def trained(model: nn.Module, batch: dict[str, Tensor], steps: int = 2) -> list[Tensor]:
    """Return the losses, gradients and weights of some steps that always draw the same."""
    torch.manual_seed(2)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), list[Tensor]()
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found += [
            loss.detach(),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]
    return found + [p.detach().clone() for p in model.parameters()]


@NAMES
def test_the_mlps_are_found(name: str) -> None:
    _, layers, producer = FAMILIES[name]
    model = model_of(name)
    sdgp.convert_(model)
    report = sdgp.fuse_(model)
    assert len(report.fused) == 2 * len(layers)
    assert {".".join(layer.split(".")[-2:]) for layer in report.fused} == set(layers)
    assert set(report.fused.values()) == {producer}


@NAMES
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_forward_is_the_same_to_the_bit(name: str, training: bool) -> None:
    plain = model_of(name).train(training)
    fused, converted = pair(name, sdgp.SDGPConfig(prune="magnitude"), torch.float32)
    fused.train(training), converted.train(training)
    batch, outputs = batch_of(name, torch.float32), []
    for model in (plain, converted, fused):
        torch.manual_seed(2)
        outputs.append(model(**batch))
    for output in outputs[1:]:
        assert torch.equal(output.logits, outputs[0].logits)
        assert torch.equal(output.loss, outputs[0].loss)


@NAMES
@pytest.mark.parametrize("method", ["magnitude", "mvue"])
def test_two_steps_beside_the_unfused_model(name: str, method: Any) -> None:
    # In float64, where rounding decides on no element that survives, and dropout draws.
    config = sdgp.SDGPConfig(prune=method, grad_weight="sparse")
    fused, other = pair(name, config, torch.float64)
    fused.train(), other.train()
    batch = batch_of(name, torch.float64)
    for one, two in zip(trained(fused, batch), trained(other, batch), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


@NAMES
def test_two_steps_without_pruning(name: str) -> None:
    schedule = sdgp.Schedule(total_steps=9, warmup=8)
    fused, other = pair(name, sdgp.SDGPConfig(schedule=schedule), torch.float32)
    batch = batch_of(name, torch.float32)
    for one, two in zip(trained(fused, batch), trained(other, batch), strict=True):
        assert torch.equal(one, two)


def test_what_a_gelu_that_is_written_out_keeps() -> None:
    """transformers' gelu_new saves what each of its operations reads."""
    kept = []
    for model in pair("GPT2", sdgp.SDGPConfig(prune="magnitude"), torch.float32):
        mlp, x = model.transformer.h[0].mlp.eval(), torch.randn(40, 32, requires_grad=True)
        seen: dict[int, int] = {}
        held: list[Tensor] = []

        def pack(t: Tensor, seen: Any = seen, held: Any = held) -> Tensor:
            held.append(t)
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            mlp(x)
        kept.append(sum(seen.values()))
    hidden = 40 * 128 * 4
    assert kept[1] - kept[0] == 3 * hidden


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_transformers_own_checkpointing(reentrant: bool) -> None:
    fused, other = pair("Llama", sdgp.SDGPConfig(prune="mvue"), torch.float64)
    fused.train(), other.train()
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    batch = batch_of("Llama", torch.float64)
    for one, two in zip(trained(fused, batch), trained(other, batch), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_saved_and_loaded_by_transformers(name: str, tmp_path: Any) -> None:
    fused, _ = pair(name, sdgp.SDGPConfig(prune="magnitude"), torch.float32)
    fused.save_pretrained(tmp_path)
    loaded = type(fused).from_pretrained(tmp_path)
    assert type(loaded.base_model) is type(model_of(name).base_model)
    for one, two in zip(loaded.parameters(), fused.parameters(), strict=True):
        assert torch.equal(one, two)
