"""Adapters of PEFT, quantized layers of bitsandbytes and torchao, and torchtitan's small Llama."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sdgp_cusparselt as sdgp
from tests.loops.examples import load

pytestmark = pytest.mark.foreign
tiny_gpt = load("tiny_gpt")


def llama() -> tuple[nn.Module, list[str]]:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)), ["q_proj", "up_proj"]


def gpt2() -> tuple[nn.Module, list[str]]:
    return tiny_gpt.build_model(), ["c_attn", "c_fc"]


@pytest.mark.parametrize(
    "first, build, layers", [("convert", llama, 14), ("adapt", llama, 14), ("adapt", gpt2, 8)]
)
def test_peft_in_either_order(first: str, build: Any, layers: int) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, targets = build()
    lora = peft.LoraConfig(target_modules=targets, r=8, task_type="CAUSAL_LM")
    config = sdgp.SDGPConfig(prune="magnitude", backend="dense")
    if first == "convert":
        report = sdgp.convert_(model, config, preset="all")
        model = peft.get_peft_model(model, lora)
    else:
        model = peft.get_peft_model(model, lora)
        report = sdgp.convert_(model, config, preset="all")
        assert any("an adapter" in reason for reason in report.skipped.values())
    assert len(report.converted) == layers
    pruned = [name for name, m in model.named_modules() if isinstance(m, sdgp.nn.SDGPModule)]
    assert len(pruned) == layers and not any("lora_" in name for name in pruned)
    ids = torch.randint(0, 128, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert grads and all(grad is not None and grad.isfinite().all() for grad in grads)


def test_bitsandbytes_layers_stay_plain() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = nn.ModuleDict({"four": bitsandbytes.nn.Linear4bit(64, 64), "plain": nn.Linear(64, 64)})
    report = sdgp.convert_(model)
    assert report.converted == ["plain"]
    assert report.skipped == {"four": "Linear4bit holds its weight quantized"}


@pytest.mark.parametrize("first", ["convert", "quantize"])
def test_torchao_weights_stay_plain(first: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    if first == "convert":
        sdgp.convert_(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    words = "which only its own class can multiply"
    if first == "quantize":
        with pytest.raises(ValueError, match=f"x 2: its weight is a Int8Tensor, {words}"):
            sdgp.convert_(model)
        return
    x = torch.randn(8, 64, requires_grad=True)
    with pytest.warns(sdgp.SDGPFallbackWarning, match=words):
        model(x).sum().backward()
    dense = model[1].weight.dequantize().sum(0) @ model[0].weight.dequantize()
    # Sums of 64 products of float32, twice; the kernel scales in another order.
    torch.testing.assert_close(x.grad, dense.expand(8, 64), rtol=2 * 64 * 2**-23, atol=64 * 2**-23)


def test_the_converter_builds_pruned_layers_and_follows_the_optimizers() -> None:
    pytest.importorskip("torchtitan", reason="torchtitan is not installed")
    from torchtitan.models.llama3 import model_registry

    from sdgp_cusparselt.integrations.torchtitan import SDGPConverter, follow

    config = sdgp.SDGPConfig(backend="dense", schedule=sdgp.Schedule(warmup=1))
    plain = model_registry("debugmodel").model.build()
    spec = model_registry("debugmodel", converters=[SDGPConverter.Config(config=config)])
    model = spec.model.build()
    layers = [mod for mod in model.modules() if isinstance(mod, sdgp.nn.SDGPModule)]
    linears = [mod for mod in plain.modules() if isinstance(mod, torch.nn.Linear)]
    assert len(layers) == len(linears) - 1, "all but the head"
    keys = [key for key in model.state_dict() if "sdgp_schedule" not in key]
    assert keys == list(plain.state_dict())
    model.verify_module_protocol()
    x = torch.randn(4, layers[0].in_features, requires_grad=True)
    follow(spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    spec.post_optimizer_build_fn(optimizer, [model], None)
    optimizer.step()
    assert sdgp.schedule_state(model) == {"step": 1}
    layers[0](x).sum().backward()
    assert layers[0].sdgp_record.calls, "pruned after the warm-up"
