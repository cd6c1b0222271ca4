"""Products with a 2:4 weight packed ahead, in C and densely, against float64."""

import pytest
import torch
from torch.nn import functional as F

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.config.combinations import COMBINATIONS, Combination
from sdgp_cusparselt.layers.weight_masks import (
    as_outputs_inputs,
    effective_weight,
    groups_along,
    set_weight_mask_,
)
from tests.backends.weight_cases import (
    BOTH,
    INPUTS,
    WEIGHTS,
    check_layer,
    config_of,
    input_of,
    layer_of,
    reference,
    smallest,
)


@pytest.mark.parametrize("row", COMBINATIONS, ids=[row.name for row in COMBINATIONS])
@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
def test_every_combination_in_c(emulated: CusparseLtBackend, kind: str, row: Combination) -> None:
    layer = layer_of(kind, config_of(row, on_unsupported="raise"), torch.bfloat16)
    w, twice = reference(layer)
    if row.output == "dense":
        w = as_outputs_inputs(layer, layer.weight.detach()).flatten(1).double()
    check_layer(kind, layer, input_of(kind, torch.bfloat16), w, twice)
    ways = {product: way for product, way in layer.sdgp_record.calls}
    products = {"output": row.output, "grad_input": row.grad_input, "grad_weight": row.grad_weight}
    assert ways == {name: "sparse" for name, operand in products.items() if operand != "dense"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row", COMBINATIONS[4:], ids=[row.name for row in COMBINATIONS[4:]])
@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
def test_every_combination_densely(kind: str, row: Combination, dtype: torch.dtype) -> None:
    layer = layer_of(kind, config_of(row, backend="dense"), dtype)
    check_layer(kind, layer, input_of(kind, dtype), *reference(layer))
    assert {way for _, way in layer.sdgp_record.calls} == {"emulated"}


@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
def test_float16_in_c(emulated: CusparseLtBackend, kind: str) -> None:
    layer = layer_of(kind, BOTH, torch.float16)
    check_layer(kind, layer, input_of(kind, torch.float16), *reference(layer))
    assert {way for _, way in layer.sdgp_record.calls} == {"sparse"}


@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
@pytest.mark.parametrize("with_second", [False, True])
def test_a_mask_decides_what_is_kept(
    emulated: CusparseLtBackend, kind: str, with_second: bool
) -> None:
    layer = layer_of(kind, BOTH, torch.bfloat16)
    along, across = groups_along(layer)
    mask = smallest(layer.weight, along)
    second = smallest(torch.where(mask, layer.weight, 0), across) if with_second else None
    set_weight_mask_(layer, mask, second)
    kept = torch.where(mask, layer.weight.detach(), 0)
    assert torch.equal(effective_weight(layer), kept)
    w = as_outputs_inputs(layer, kept).flatten(1).double()
    twice = sdgp.prune(w, method="magnitude", dim=0)
    if second is not None:
        twice = as_outputs_inputs(layer, torch.where(second, kept, 0)).flatten(1).double()
    check_layer(kind, layer, input_of(kind, torch.bfloat16), w, twice)
    assert {way for _, way in layer.sdgp_record.calls} == {"sparse"}


def test_one_of_four_runs_on_hardware(emulated: CusparseLtBackend) -> None:
    layer = layer_of("linear", BOTH.replace(weight_n=1), torch.bfloat16)
    w = layer.weight.detach().double()
    once = sdgp.prune(w, method="magnitude", n=1)
    twice = sdgp.prune(once, method="magnitude", n=1, dim=0)
    check_layer("linear", layer, input_of("linear", torch.bfloat16), once, twice)


@pytest.mark.parametrize(
    "changes, words",
    [({"weight_n": 2, "weight_m": 8}, "2:8 weight"), ({"weight_beta": 0.25}, "mask decay")],
)
def test_what_no_hardware_runs_is_multiplied_with_its_zeros(
    emulated: CusparseLtBackend, changes: dict, words: str
) -> None:
    layer = layer_of("linear", WEIGHTS.replace(on_unsupported="plain", **changes), torch.float32)
    x = input_of("linear", torch.float32)
    with pytest.warns(sdgp.SDGPFallbackWarning, match=words):
        y = layer(x)
    n, m = changes.get("weight_n", 2), changes.get("weight_m", 4)
    w = layer.weight.detach()
    kept = sdgp.prune(w, method="magnitude", n=n, m=m)
    kept = kept + changes.get("weight_beta", 0.0) * (w - kept)
    assert torch.allclose(y, F.linear(x, kept, layer.bias), atol=0, rtol=1e-6)


def test_activations_and_results_stay_where_they_are(
    emulated: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No transposed copy: the library reads the input's memory and writes the output's."""
    layer, seen = layer_of("linear", BOTH, torch.bfloat16), []
    x = torch.randn(40, INPUTS, dtype=torch.bfloat16, requires_grad=True)
    layer(x).square().sum().backward()
    for found in emulated.plans._contexts().values():
        for planned in found.plans.values():
            real = planned.plan.matmul
            monkeypatch.setattr(
                planned.plan, "matmul", lambda *a, real=real: (seen.append(a), real(*a))[1]
            )
    from sdgp_cusparselt.products import dispatch

    dispatch.forget()
    layer.bias = None
    x = torch.randn(40, INPUTS, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    (_, _, b, _, _, d, *_), (_, _, b2, *_) = seen
    assert (b, d) == (x.data_ptr(), y.data_ptr()) and y.is_contiguous()
    assert b2 == g.data_ptr() and x.grad.is_contiguous()
