"""A pruned weight is packed once for each version of it, whatever changes it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.layers.weight_masks import (
    set_weight_mask_,
)
from sdgp_cusparselt.products import packed_weights
from tests.backends.weight_cases import (
    BOTH,
    INPUTS,
    OUTPUTS,
    WEIGHTS,
    close,
    layer_of,
    smallest,
)


def test_a_weight_is_packed_once_per_version(
    emulated: CusparseLtBackend, packs: list[bool]
) -> None:
    layer = layer_of("linear", BOTH, torch.bfloat16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    tokens = iter((64, 64, 32))
    for step in range(3):
        count = next(tokens)
        for _ in range(3):  # gradients are accumulated, and one forward is checkpointed
            x = torch.randn(count, INPUTS, dtype=torch.bfloat16, requires_grad=True)
            checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        assert len(packs) == 2 * (step + 1)
        with torch.no_grad():
            y = layer(x)
        w = layer.weight.detach().double()
        close(y, x.detach().double(), sdgp.prune(w).t(), x.dtype, layer.bias.detach().double())
        optimizer.step()
    assert sorted(packs) == [False] * 3 + [True] * 3


def test_a_new_mask_is_a_new_version(emulated: CusparseLtBackend, packs: list[bool]) -> None:
    layer = layer_of("linear", WEIGHTS, torch.bfloat16)
    x = torch.randn(16, INPUTS, dtype=torch.bfloat16)
    for dim in (1, 1):
        mask = smallest(layer.weight, dim)
        set_weight_mask_(layer, mask)
        held = layer.weight_mask
        layer(x)
        layer(x)
    assert len(packs) == 2
    held.copy_(sdgp.prune(layer.weight.detach()) != 0)
    y = layer(x)
    assert len(packs) == 3
    w = sdgp.prune(layer.weight.detach()).double()
    close(y, x.double(), w.t(), x.dtype, layer.bias.detach().double())


def test_memory_that_another_weight_gets_is_no_old_version(
    emulated: CusparseLtBackend, packs: list[bool]
) -> None:
    x = torch.randn(16, INPUTS, dtype=torch.bfloat16)
    for _ in range(4):
        layer = layer_of("linear", WEIGHTS, torch.bfloat16)
        w = sdgp.prune(layer.weight.detach()).double()
        close(layer(x), x.double(), w.t(), x.dtype, layer.bias.detach().double())
        del layer
    assert len(packs) == 4
    twin = layer_of("linear", WEIGHTS, torch.bfloat16)
    twin(x)
    copied = copy.deepcopy(twin)
    with torch.no_grad():
        copied.weight.neg_()
    difference = twin(x) + copied(x) - 2 * twin.bias
    assert difference.abs().max() <= 4 * torch.finfo(x.dtype).eps * twin(x).abs().max()
    assert packed_weights.kept_nbytes() > 0
    packed_weights.forget()
    assert packed_weights.kept_nbytes() == 0


def test_a_weight_that_something_fills_anew_is_never_kept(
    emulated: CusparseLtBackend, packs: list[bool]
) -> None:
    """As FSDP does it: another Parameter in its place, its version as it was."""
    layer = layer_of("linear", BOTH, torch.bfloat16)
    gathered = nn.Parameter(layer.weight.detach().clone())
    layer.weight = gathered
    x = torch.randn(16, INPUTS, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        with torch.autograd._unsafe_preserve_version_counter(gathered), torch.no_grad():
            gathered.normal_()
        y = layer(x)
        w = sdgp.prune(gathered.detach()).double()
        close(y.detach(), x.detach().double(), w.t(), x.dtype, layer.bias.detach().double())
        y.square().sum().backward()
    assert len(packs) == 4


def test_writes_through_data_are_seen_by_checks_and_after_forget(
    emulated: CusparseLtBackend,
) -> None:
    layer = layer_of("linear", WEIGHTS.replace(check_every=2), torch.bfloat16)
    x = torch.randn(16, INPUTS, dtype=torch.bfloat16)
    layer(x)
    layer.weight.data.normal_()  # no version
    layer(x)
    with pytest.raises(sdgp.EquivalenceError, match="output is not used: it failed a check"):
        layer(x)
    packed_weights.forget()
    layer.sdgp_record.broken.clear()
    w = sdgp.prune(layer.weight.detach()).double()
    close(layer(x), x.double(), w.t(), x.dtype, layer.bias.detach().double())


def test_autocast_prunes_the_copy_that_is_multiplied(
    emulated: CusparseLtBackend, packs: list[bool]
) -> None:
    layer = layer_of("linear", BOTH, torch.float32)
    x = torch.randn(32, INPUTS, requires_grad=True)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    assert len(packs) == 2
    w = sdgp.prune(layer.weight.detach().bfloat16()).double()
    rows = x.detach().bfloat16().double()
    close(y, rows, w.t(), y.dtype, layer.bias.detach().bfloat16().double())


@pytest.mark.parametrize(
    "config",
    [WEIGHTS, BOTH, WEIGHTS.replace(prune="magnitude")],
    ids=["weights", "double", "weights+sdgp"],
)
def test_compiled_layers_compute_the_same(
    emulated: CusparseLtBackend, packs: list[bool], config: sdgp.SDGPConfig
) -> None:
    model = nn.Sequential(
        nn.Linear(INPUTS, OUTPUTS), nn.GELU(), nn.Linear(OUTPUTS, INPUTS)
    ).bfloat16()
    sdgp.convert_(model, config)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(24, INPUTS, dtype=torch.bfloat16)
        found = []
        for run in (model, compiled):
            mine = x.clone().requires_grad_()
            y = run(mine)
            y.square().sum().backward()
            found.append([y.detach(), mine.grad])
        found[0] += [p.grad for p in model.parameters()]
        found[1] += [p.grad for p in twin.parameters()]
        for a, b in zip(*found, strict=True):
            assert (a - b).float().norm() <= 8 * torch.finfo(a.dtype).eps * a.float().norm()
    ways = 2 if config.grad_input == "weight" else 1
    assert len(packs) == 2 * 2 * ways  # two layers in two models
