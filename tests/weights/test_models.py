"""A GPT-2 and a Llama, trained on bytes, exported, saved, loaded, generating the same tokens."""

import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.layers.weight_masks import effective_weight
from sdgp_cusparselt.products import dispatch
from sdgp_cusparselt.weights import packed_linear
from sdgp_cusparselt.weights.packed_linear import PackedLinear

TEXT = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
BYTES = torch.tensor(list(Path(packed_linear.__file__).read_bytes())).clamp(max=127)


def gpt2() -> nn.Module:
    config = hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **TEXT)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return hf.GPT2LMHeadModel(config).bfloat16()


def llama() -> nn.Module:
    config = hf.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **TEXT,
    )
    return hf.LlamaForCausalLM(config).bfloat16()


def batch(step: int) -> Tensor:
    """Return [8, 48] bytes of this project's code."""
    starts = torch.randint(len(BYTES) - 48, (8,), generator=torch.Generator().manual_seed(step))
    return torch.stack([BYTES[start : start + 48] for start in starts])


def trained(build: type) -> nn.Module:
    """Return a model with 2:4 weights after some steps with the magnitude's masks."""
    torch.manual_seed(0)
    model = build()
    sdgp.convert_(model, sdgp.SDGPConfig(prune="none", forward="sparse_weight", backend="dense"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(8):
        ids = batch(step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def masked_dense(model: nn.Module) -> nn.Module:
    """Return torch's own model with the masked weights."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, sdgp.nn.SDGPModule):
            layer.weight.data = effective_weight(layer)
    sdgp.revert_(twin)
    return twin


def generated(model: nn.Module, *, draws: bool = True) -> Tensor:
    """Return a prompt and 8 tokens: drawn, which equal logits alone make equal, or the likeliest."""
    prompt = BYTES[None, 100:116]
    options = {"max_new_tokens": 8, "do_sample": draws, "pad_token_id": 0}
    torch.manual_seed(3)
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_exported_models_generate_the_same_tokens(build: type, tmp_path: Path) -> None:
    model = trained(build)
    dense = masked_dense(model)
    expected = generated(dense)
    assert len(set(expected[0, 16:].tolist())) > 2  # drawn from 128
    likeliest = generated(dense, draws=False)
    report = sdgp.export_(model)
    assert len(report.exported) == sum(isinstance(m, PackedLinear) for m in model.modules())
    assert report.packed_nbytes == report.dense_nbytes * 9 / 16
    assert torch.equal(generated(model), expected)
    sdgp.save_exported(model, tmp_path / "model.safetensors")
    torch.manual_seed(1)
    fresh = build().eval()
    sdgp.load_exported_(fresh, tmp_path / "model.safetensors")
    assert torch.equal(generated(fresh), expected)
    fresh.forward = torch.compile(fresh.forward, backend="aot_eager", dynamic=True)
    assert torch.equal(generated(fresh, draws=False), likeliest)


@pytest.mark.parametrize("dtype", ["same", "int8", "fp8"])
def test_products_of_an_exported_model_in_c(
    emulated: CusparseLtBackend,
    emulator: object,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    """Logits of a whole prompt: the emulator's beside torch's."""
    monkeypatch.setattr(packed_linear, "CONFIG", packed_linear.NARROW)
    emulated.machine.cpu_capability = (8, 9)
    emulator.arch(89)
    model = trained(gpt2)
    sdgp.export_(model, dtype=dtype)
    ids = batch(99)[:1, :16]
    with torch.no_grad():
        logits = model(ids).logits.float()
    records = [m.sdgp_record for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(records) == 8
    assert all(record.calls == {("output", "sparse"): 1} for record in records)
    twin = copy.deepcopy(model)
    emulated.machine.device_type = "cuda"  # which this machine has none of
    dispatch.forget()
    with torch.no_grad():
        plain = twin(ids).logits.float()
    assert (logits - plain).norm() <= 16 * torch.finfo(torch.bfloat16).eps * plain.norm()


def test_int8_costs_little_perplexity() -> None:
    model = trained(gpt2)
    ids = torch.cat([batch(step) for step in range(100, 104)])
    losses = {}
    for dtype in ("same", "int8", "fp8"):
        twin = copy.deepcopy(model)
        sdgp.export_(twin, dtype=dtype)
        with torch.no_grad():
            losses[dtype] = float(twin(input_ids=ids, labels=ids).loss)
    assert abs(losses["int8"] - losses["same"]) < 0.02 * losses["same"]
    assert abs(losses["fp8"] - losses["same"]) < 0.05 * losses["same"]
