"""Packs that two products share, that activations' backwards make, and that hold heavy tokens."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sdgp_cusparselt.cards.efficiency import Curve, Efficiency
from sdgp_cusparselt.cards.gpus import GPU
from sdgp_cusparselt.planner.gemms import Gemm, Trace, trace_step
from sdgp_cusparselt.planner.models import load
from sdgp_cusparselt.planner.roofline import Packing, forecast, heavy_rows, layer_times

FLAT = Curve(((1.0, 0.5),))
IDEAL = Efficiency(FLAT, FLAT, "by hand", bandwidth=1.0, launch_us=0.0)
#: 50 TFLOP/s dense and 100 sparse, 1 TB/s.
CARD = GPU("X", tflops=100, bandwidth=1000, source="by hand", published=IDEAL)
T, OUT, IN = 8192, 4096, 2048


def layer(*, grad_weight: bool) -> list[Gemm]:
    """Return the backward products of Linear(IN, OUT) over T tokens."""
    g, w, x = T * OUT, OUT * IN, T * IN
    gi = Gemm("up", "linear", "grad_input", T, IN, OUT, 1, (g, w, x), prunable=True)
    gw = Gemm("up", "linear", "grad_weight", OUT, IN, T, 1, (g, x, w), prunable=grad_weight)
    return [gi, gw]


def nbytes(microseconds: float) -> float:
    """Return bytes for each element of the gradient, on CARD."""
    return microseconds * 1e6 / (T * OUT)


@pytest.mark.parametrize(
    "both, fuse, expected",
    # As counted by hand: with the activation's backward, which reads 4 bytes and writes 2, that is
    # 9.125, 7.125, 10.25 and 6.25 bytes an element.
    [(False, False, 3.125), (False, True, 1.125), (True, False, 4.25), (True, True, 0.25)],
)
def test_bytes_of_packing(both: bool, fuse: bool, expected: float) -> None:
    times = layer_times(layer(grad_weight=both), CARD, IDEAL, fused=fuse)
    assert nbytes(sum(t.pack for t in times)) == pytest.approx(expected)
    assert [t.gains for t in times] == [True, both]
    flops = 2 * T * OUT * IN
    sparse = flops / 100e12 * 1e6
    assert times[0].sparse == pytest.approx(sparse)
    saved = sum(t.dense - t.best for t in times)
    assert saved == pytest.approx((1 + both) * sparse - expected * T * OUT / 1e6)


def test_one_product_alone_is_taken_where_both_would_lose() -> None:
    """grad_weight of few tokens is bound by memory: only grad_input pays, packed alone."""
    gi, gw = layer(grad_weight=True)
    slow = replace(gw, k=16, elements=(gw.elements[0], 16 * IN, gw.elements[2]))
    times = layer_times([gi, slow], CARD, IDEAL)
    assert [t.gains for t in times] == [True, False]
    assert nbytes(times[0].pack) == pytest.approx(3.125)
    assert times[1].best == times[1].dense


@pytest.mark.parametrize("inputs, together", [(96, False), (128, True)])
def test_a_second_product_may_pay_where_neither_would_alone(inputs: int, together: bool) -> None:
    """A product of n inputs saves n / 50 bytes an element: 3.125 pay one, 2.125 each pay both."""
    g = T * OUT
    gi = Gemm("", "linear", "grad_input", T, inputs, OUT, 1, (g, 0, 0), prunable=True)
    gw = Gemm("", "linear", "grad_weight", OUT, inputs, T, 1, (g, 0, 0), prunable=True)
    assert not layer_times([gi], CARD, IDEAL)[0].gains
    assert [t.gains for t in layer_times([gi, gw], CARD, IDEAL)] == [together, together]


@pytest.mark.parametrize("share, rows", [(0.0, 0), (0.06, 496), (0.0001, 16), (1.0, 8192)])
def test_heavy_tokens_add_rows_up_to_a_multiple_of_sixteen(share: float, rows: int) -> None:
    assert heavy_rows(T, share) == rows


def test_heavy_tokens_cost_their_rows() -> None:
    (plain, _) = layer_times(layer(grad_weight=False), CARD, IDEAL)
    launch = replace(IDEAL, launch_us=5.0)
    (heavy, _) = layer_times(layer(grad_weight=False), CARD, launch, Packing(heavy=0.06))
    extra = 496
    assert heavy.sparse == pytest.approx(plain.sparse * (T + extra) / T)
    read = 2 * T * OUT
    assert heavy.pack == pytest.approx((3.125 * (T + extra) * OUT + read) / 1e6 + 3 * 5)
    assert heavy.fold == pytest.approx(6 * extra * IN / 1e6 + 5)
    assert heavy.path == pytest.approx(heavy.pack + heavy.sparse + heavy.fold)


def test_with_heavy_tokens_two_products_share_no_pack() -> None:
    times = layer_times(layer(grad_weight=True), CARD, IDEAL, Packing(heavy=0.06))
    assert nbytes(times[1].pack) == pytest.approx(3.125)


class Mlp(nn.Module):
    """One way to write an MLP."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.gate, self.up = nn.Linear(32, 64), nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "gated":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.kind == "gated, up first":
            up = self.up(x)
            return self.down(up * F.silu(self.gate(x)))
        if self.kind == "norm between":
            return self.down(F.relu(F.layer_norm(self.up(x), (64,))))
        if self.kind == "residual":
            return self.down(self.up(x) + self.gate(x))
        hidden = getattr(F, self.kind)(self.up(x))
        return self.down(hidden)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("gelu", {"up": "gelu"}),
        ("relu", {"up": "relu"}),
        ("silu", {"up": "silu"}),
        ("gated", {"gate": "silu", "up": "silu gate"}),
        ("gated, up first", {"gate": "silu", "up": "silu gate"}),
        ("norm between", {}),
        ("residual", {}),
        ("tanh", {}),
    ],
)
def test_layers_before_an_activation_are_found(kind: str, expected: dict[str, str]) -> None:
    with torch.device("meta"):
        model, x = Mlp(kind), torch.empty(16, 32)
    trace = trace_step(model, [x.requires_grad_()])
    names = {gemm.call: gemm.fqn for gemm in trace.gemms}
    assert {names[call]: name for call, name in trace.activations.items()} == expected


@pytest.mark.parametrize(
    "model, layer_name, count",
    [("gpt2", "c_fc", 2), ("llama", "up_proj", 2), ("vit", "fc1", 2), ("resnet", "", 0)],
)
def test_models_of_transformers(model: str, layer_name: str, count: int, tmp_path: object) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100},
        "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100},
        "vit": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_attention_heads": 4, "image_size": 32},
        "resnet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]},
    }[model]  # fmt: skip
    config = transformers.AutoConfig.for_model(model, **sizes)
    path = f"{tmp_path}/config.json"
    config.to_json_file(path)
    problem = load(f"transformers:{path}", batch=2, sequence=16, resolution=32)
    trace = trace_step(problem.model, problem.inputs)
    names = {gemm.call: gemm.fqn.rpartition(".")[2] for gemm in trace.gemms}
    found = [names[call] for call in trace.activations]
    assert sum(name == layer_name or name == "intermediate" for name in found) == count or (
        model == "vit" and len(found) == count
    )
    assert not {"c_proj", "down_proj", "o_proj", "c_attn", "q_proj"} & set(found)


def test_a_preset_chooses_products_as_convert_does() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.other = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.down(F.gelu(self.up(x))))

    with torch.device("meta"):
        model, x = Block(), torch.empty(16, 64, requires_grad=True)
    found = {}
    for preset in ("all", "readers", "balanced"):
        gemms = trace_step(model, [x], preset=preset).gemms
        found[preset] = sorted((g.fqn, g.role) for g in gemms if g.prunable)
    assert found == {
        "all": [(name, "grad_input") for name in ("down", "other", "up")],
        "readers": [("up", "grad_input")],
        "balanced": [("down", "grad_weight"), ("up", "grad_input"), ("up", "grad_weight")],
    }


def test_a_forecast_fuses_only_what_an_activation_follows() -> None:
    gemms = tuple(replace(g, call=call) for call in (1, 2) for g in layer(grad_weight=False))
    trace = Trace(gemms, 0, 0, {2: "gelu"})
    fused = forecast(trace, CARD, IDEAL, Packing(fuse=True))
    packs = [nbytes(t.pack) for t in fused.times if t.gemm.prunable]
    assert packs == pytest.approx([3.125, 1.125])
    assert forecast(trace, CARD, IDEAL).times[2].pack == fused.times[0].pack
