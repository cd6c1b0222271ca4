"""The traced GEMMs, against torch's flop counter and against layers counted by hand."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdgp_cusparselt.errors import NotSupportedError
from sdgp_cusparselt.planner.gemms import Gemm, trace_step
from sdgp_cusparselt.planner.models import PRESETS, load


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def by_role(gemms: tuple[Gemm, ...]) -> dict[str, Gemm]:
    assert len({g.role for g in gemms}) == len(gemms)
    return {g.role: g for g in gemms}


@pytest.mark.parametrize("name", PRESETS)
def test_total_flops_equal_torchs_own_count(name: str) -> None:
    problem = load(name)
    counted = sum(g.flops for g in trace_step(problem.model, problem.inputs).gemms)
    with FlopCounterMode(display=False) as counter:
        problem.model(**problem.inputs).logits.sum().backward()
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert {g.role for g in trace_step(problem.model, problem.inputs).gemms} == {
        "forward",
        "grad_input",
        "grad_weight",
    }


@pytest.mark.parametrize(
    "conv, image",
    [
        (nn.Conv2d(16, 32, 3, stride=2, padding=1, device="meta"), (4, 16, 15, 17)),
        (nn.Conv2d(16, 32, (1, 3), dilation=2, device="meta"), (4, 16, 15, 17)),
        (nn.Conv1d(16, 32, 3, device="meta"), (4, 16, 15)),
        (nn.Conv3d(16, 32, 3, device="meta"), (2, 16, 5, 6, 7)),
        (nn.ConvTranspose2d(16, 32, 3, stride=2, device="meta"), (4, 16, 5, 7)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_convolution_flops_equal_torchs_own_count(conv: nn.Module, image: tuple[int, ...]) -> None:
    x = meta(*image).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        conv(x).sum().backward()
    assert sum(g.flops for g in trace_step(conv, [x]).gemms) == counter.get_total_flops()


def test_the_three_gemms_of_a_linear_layer() -> None:
    layer = nn.Sequential(nn.Linear(48, 64, device="meta"), nn.Linear(64, 32, device="meta"))
    second = by_role(tuple(g for g in trace_step(layer, [meta(2, 5, 48)]).gemms if g.fqn == "1"))
    sizes = {role: (g.m, g.n, g.k) for role, g in second.items()}
    assert sizes == {
        "forward": (10, 32, 64),
        "grad_input": (10, 64, 32),
        "grad_weight": (32, 64, 10),
    }
    assert [role for role, g in second.items() if g.prunable] == ["grad_input"]
    assert second["grad_input"].elements == (10 * 32, 32 * 64, 10 * 64)


def test_the_first_layer_has_no_grad_input_and_a_frozen_one_no_grad_weight() -> None:
    frozen = nn.Linear(64, 64, device="meta").requires_grad_(False)
    model = nn.Sequential(nn.Linear(64, 64, device="meta"), frozen)
    roles = [(g.fqn, g.role) for g in trace_step(model, [meta(16, 64)]).gemms]
    assert roles == [
        ("0", "forward"),
        ("0", "grad_weight"),
        ("1", "forward"),
        ("1", "grad_input"),
    ]


def test_a_strided_convolution_spreads_its_pixels() -> None:
    image = meta(2, 16, 8, 8).requires_grad_()
    point = nn.Conv2d(16, 32, 1, device="meta")
    strided = nn.Conv2d(16, 32, 1, stride=2, device="meta")
    folds = [by_role(trace_step(c, [image]).gemms)["grad_input"] for c in (point, strided)]
    assert [g.fold_elements for g in folds] == [0, 2 * 4 * 4 * 16]
    assert [(g.m, g.n, g.k) for g in folds] == [(128, 16, 32), (32, 16, 32)]


@pytest.mark.parametrize(
    "layer, shape, words",
    [
        (nn.Linear(64, 40, device="meta"), (16, 64), "out 40 must divide by 16"),
        (nn.Conv2d(32, 32, 3, groups=2, device="meta"), (2, 32, 8, 8), "2 groups"),
        (nn.Conv2d(32, 32, 3, padding=1, device="meta"), (2, 32, 8, 8), "only an unpadded 1x1"),
        (nn.Conv2d(32, 32, 1, padding=1, device="meta"), (2, 32, 8, 8), "only an unpadded 1x1"),
        (nn.Conv1d(32, 32, 3, device="meta"), (2, 32, 8), "Conv1d is not a layer"),
        (nn.Linear(64, 64, device="meta"), (16, 64), "excluded by b*"),
    ],
)
def test_a_layer_that_stays_dense_says_why(
    layer: nn.Module, shape: tuple[int, ...], words: str
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    gemms = trace_step(Model(), [meta(*shape).requires_grad_()], exclude=["b*"][: "b*" in words])
    grad_input = by_role(gemms.gemms)["grad_input"]
    assert not grad_input.prunable
    assert words in grad_input.reason


def test_heads_stay_dense_unless_asked_for_as_in_convert() -> None:
    model = nn.Module()
    model.head = nn.Linear(64, 64, device="meta")
    x = [meta(16, 64).requires_grad_()]
    model.forward = lambda x: model.head(x)
    assert [g.prunable for g in trace_step(model, x).gemms] == [False, False, False]
    gemms = trace_step(model, x, include_heads=True).gemms
    assert [g.role for g in gemms if g.prunable] == ["grad_input"]


def test_attention_is_not_prunable_and_its_interior_moves_no_bytes() -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q)

    trace = trace_step(Attention(), [meta(2, 4, 128, 16).requires_grad_()])
    assert {g.kind for g in trace.gemms} == {"attention"}
    assert not any(g.prunable for g in trace.gemms)
    assert sum(g.flops for g in trace.gemms) == 6 * 2 * (2 * 4) * 128 * 128 * 16
    assert trace.other_bytes == 0


def test_an_op_that_the_planner_does_not_know_is_named() -> None:
    class Fused(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)[0]

    with pytest.raises(NotSupportedError, match="_scaled_dot_product_flash_attention"):
        trace_step(Fused(), [meta(2, 4, 128, 16)])
