"""Products with a 2:4 weight packed ahead, in C and densely, against float64."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends import masking
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.masking import masked
from sdgp_cusparselt.config.combinations import COMBINATIONS, Combination
from sdgp_cusparselt.layers.weight_masks import (
    as_outputs_inputs,
    effective_weight,
    groups_along,
    set_weight_mask_,
)
from sdgp_cusparselt.products import packed_weights, routes
from sdgp_cusparselt.tuning import store, timing
from tests.emulator.control import Bad, Emulator
from tests.helpers import product_bound

WEIGHTS = sdgp.SDGPConfig(
    prune="none", forward="sparse_weight", tune="never", on_unsupported="raise"
)
BOTH = WEIGHTS.replace(grad_input="weight")
INPUTS, OUTPUTS = 32, 48


@pytest.fixture
def emulated(
    backend: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> CusparseLtBackend:
    """The backend as dispatch sees it on a machine with a GPU, with a decision cache of its own."""
    monkeypatch.setattr(routes, "LIBRARY", backend)
    monkeypatch.setattr(store, "_default", store.TuningCache(tmp_path / "decisions"))
    packed_weights.forget()
    return backend


@pytest.fixture
def packs(emulated: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each weight that was packed was packed along its outputs."""
    found: list[bool] = []
    real = packed_weights.PrunedWeight._packed

    def counting(weight: packed_weights.PrunedWeight, along: int, pack: object) -> Tensor:
        found.append(along == masking.OUTPUTS)
        return real(weight, along, pack)

    monkeypatch.setattr(packed_weights.PrunedWeight, "_packed", counting)
    return found


def config_of(row: Combination, **changes) -> sdgp.SDGPConfig:
    return sdgp.SDGPConfig(
        prune="magnitude" if row.grad_input == "grad_output" else "none",
        forward="sparse_weight" if row.output == "weight" else "dense",
        grad_input="weight" if row.grad_input == "weight" else "grad_output",
        grad_weight="sparse" if row.grad_weight == "grad_output" else "dense",
        grad_weight_prune="magnitude",
        tune="never",
        **changes,
    )


def layer_of(kind: str, config: sdgp.SDGPConfig, dtype: torch.dtype) -> nn.Module:
    layers = {
        "linear": nn.Linear(INPUTS, OUTPUTS),
        "conv": nn.Conv2d(INPUTS, OUTPUTS, 1),
        "conv1d": Conv1D(OUTPUTS, INPUTS),
    }
    layer = layers[kind].to(dtype).to(memory_format=torch.channels_last)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    sdgp.convert_(layer, config)
    return layer


def input_of(kind: str, dtype: torch.dtype) -> Tensor:
    if kind != "conv":
        return torch.randn(3, 16, INPUTS, dtype=dtype, requires_grad=True)
    x = torch.randn(2, INPUTS, 6, 4, dtype=dtype).to(memory_format=torch.channels_last)
    return x.requires_grad_()


def rows_of(kind: str, x: Tensor) -> Tensor:
    """Return activations as [tokens, features]."""
    x = x.detach().double()
    return (x.permute(0, 2, 3, 1) if kind == "conv" else x).reshape(
        -1, x.shape[1 if kind == "conv" else -1]
    )


def close(
    got: Tensor,
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    add: Tensor | float = 0.0,
    *,
    by_torch: bool = False,
) -> None:
    """Assert got = a @ b + add: the product is rounded once, and the sum once more.

    Torch's own convolutions round partial sums as well, on a CPU.
    """
    exact, eps = a @ b + add, torch.finfo(dtype).eps
    bound = product_bound(a, b, dtype) + eps * exact.abs()
    if by_torch:
        bound += 2 * eps * (a.abs() @ b.abs())
    excess = ((got.double() - exact).abs() / bound).max()
    assert excess <= 1, float(excess)


def check_layer(kind: str, layer: nn.Module, x: Tensor, w: Tensor, twice: Tensor) -> None:
    """Compare output and all gradients with float64 products of the masked operands."""
    config, dtype = layer.sdgp_config, x.dtype
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    calls = layer.sdgp_record.calls
    torchs = {
        name: kind == "conv" and not calls[name, "sparse"]
        for name in ("output", "grad_input", "grad_weight")
    }
    rows, grad = rows_of(kind, x), rows_of(kind, g)
    bias = layer.bias.detach().double()
    close(rows_of(kind, y), rows, w.t(), dtype, bias, by_torch=torchs["output"])
    left = sdgp.prune(grad, method="magnitude") if config.prunes else grad
    right = twice if config.grad_input == "weight" else w
    close(rows_of(kind, x.grad), left, right, dtype, by_torch=torchs["grad_input"])
    if config.grad_weight == "sparse":
        grad = sdgp.prune(grad, method="magnitude", dim=0)
    got = as_outputs_inputs(layer, layer.weight.grad).flatten(1)
    close(got, grad.t(), rows, dtype, by_torch=torchs["grad_weight"])


def reference(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the weight [O, I] pruned along I, and that along O as well, in float64."""
    w = as_outputs_inputs(layer, layer.weight.detach()).flatten(1).double()
    once = sdgp.prune(w, method="magnitude")
    return once, sdgp.prune(once, method="magnitude", dim=0)


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


def smallest(weight: Tensor, dim: int) -> Tensor:
    """Return the mask of the two smallest of four: what magnitude would never keep."""
    groups = torch.unflatten(weight.detach().abs(), dim, (-1, 4))
    order = groups.argsort(dim + 1).argsort(dim + 1)
    return (order < 2).flatten(dim, dim + 1)


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


def timed_by(monkeypatch: pytest.MonkeyPatch, dense_us: float) -> None:
    """Let every sparse path take 10 us and torch's own product dense_us."""
    monkeypatch.setattr(
        timing,
        "HostTimer",
        lambda: lambda run, label: (run(), dense_us if "dense" in label else 10.0)[1],
    )


def test_where_it_is_slower_the_product_is_torchs_with_the_same_weight(
    emulated: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_by(monkeypatch, dense_us=5.0)
    layer = layer_of("linear", BOTH.replace(tune="first_use"), torch.bfloat16)
    x = input_of("linear", torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = layer(x)
        y.backward(torch.ones_like(y))
    w = sdgp.prune(layer.weight.detach())
    assert torch.equal(y, F.linear(x, w, layer.bias))
    assert torch.equal(x.grad, torch.ones_like(y) @ sdgp.prune(w, dim=0))
    assert dict(layer.sdgp_record.calls) == {("output", "plain"): 1, ("grad_input", "plain"): 1}


def test_a_decision_is_stored_and_holds_for_its_bucket(
    emulated: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_by(monkeypatch, dense_us=100.0)
    layer = layer_of("linear", WEIGHTS.replace(tune="first_use"), torch.bfloat16)
    for tokens in (128, 104, 97):
        x = torch.randn(tokens, INPUTS, dtype=torch.bfloat16)
        w = sdgp.prune(layer.weight.detach()).double()
        close(layer(x), x.double(), w.t(), x.dtype, layer.bias.detach().double())
    cache = store.default_cache()
    (decision,) = cache.decisions(emulated, torch.device("cpu"))
    assert decision.gemm.describe() == f"M={OUTPUTS} N=128 K={INPUTS} bfloat16 col to col"
    assert decision.rival == "linear" and "takes 10.0 us, linear 100.0 us" in decision.reason
    again = store.TuningCache(cache.folder).read(decision.key, emulated)
    assert again == decision
    assert layer.sdgp_record.calls == {("output", "sparse"): 3}


def test_a_wrong_algorithm_is_never_used(emulated: CusparseLtBackend, emulator: Emulator) -> None:
    emulator.bad_algorithm(0, Bad.ALWAYS_WRONG)
    layer = layer_of("linear", WEIGHTS.replace(on_unsupported="plain"), torch.bfloat16)
    x = torch.randn(64, INPUTS, dtype=torch.bfloat16)
    with pytest.warns(sdgp.SDGPFallbackWarning, match="output runs plain"):
        y = layer(x)
    assert torch.equal(y, F.linear(x, sdgp.prune(layer.weight.detach()), layer.bias))


def test_any_metadata_order_is_learned(
    emulated: CusparseLtBackend, emulator: Emulator, packs: list[bool]
) -> None:
    emulator.layout("random", 7)
    layer = nn.Linear(128, 256).bfloat16()
    sdgp.convert_(layer, BOTH)
    x = torch.randn(32, 128, dtype=torch.bfloat16, requires_grad=True)
    check_layer("linear", layer, x, *reference(layer))
    assert {way for _, way in layer.sdgp_record.calls} == {"sparse"}


@pytest.mark.parametrize(
    "conv, words",
    [
        (nn.Conv2d(INPUTS, OUTPUTS, 3, padding=1), "only an unpadded 1x1"),
        (nn.Conv2d(INPUTS, OUTPUTS, 1, stride=2), "a strided convolution would copy"),
        (nn.Conv2d(INPUTS, OUTPUTS, 1, groups=2), "the convolution has 2 groups"),
    ],
)
@pytest.mark.parametrize("config", [WEIGHTS, BOTH], ids=["once", "twice"])
def test_other_convolutions_use_the_masked_weight(
    emulated: CusparseLtBackend, conv: nn.Conv2d, words: str, config: sdgp.SDGPConfig
) -> None:
    conv = copy.deepcopy(conv).double()
    sdgp.convert_(conv, config.replace(on_unsupported="plain"))
    x = torch.randn(2, INPUTS, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    x.requires_grad_()
    with pytest.warns(sdgp.SDGPFallbackWarning, match=words):
        y = conv(x)
        y.square().sum().backward()
    w = sdgp.prune(conv.weight.detach(), dim=1).requires_grad_()
    twice = sdgp.prune(w.detach(), dim=0) if config is BOTH else w.detach()
    steps = conv.stride, conv.padding, conv.dilation, conv.groups
    assert torch.allclose(y, F.conv2d(x, w, conv.bias, *steps))
    other = x.detach().requires_grad_()
    F.conv2d(other, twice, None, *steps).backward(2 * y.detach())
    assert torch.allclose(x.grad, other.grad)
    F.conv2d(x.detach(), w, conv.bias, *steps).square().sum().backward()
    assert torch.allclose(conv.weight.grad, w.grad)


def test_masks_are_checked_and_leave_with_revert() -> None:
    layer = layer_of("linear", WEIGHTS.replace(backend="dense"), torch.float32)
    good = smallest(layer.weight, 1)
    set_weight_mask_(layer, good)
    held = layer.weight_mask
    wrong = [
        (TypeError, "weight_mask must be a bool tensor", good.float()),
        (ValueError, "weight_mask must be of the weight's shape", good.t()),
        (ValueError, "weight_mask must be 2:4 along dimension 1, got 4 of 4", good | True),
    ]
    for error, words, mask in wrong:
        with pytest.raises(error, match=words):
            set_weight_mask_(layer, mask)
    assert layer.weight_mask is held and torch.equal(held, good)
    assert set(layer.state_dict()) == {"weight", "bias", "weight_mask"}
    set_weight_mask_(layer, ~good)
    assert layer.weight_mask is held and torch.equal(held, ~good)
    twin = layer_of("linear", WEIGHTS.replace(backend="dense"), torch.float32)
    set_weight_mask_(twin, good)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(8, INPUTS)
    assert torch.equal(twin(x), layer(x))
    sdgp.revert_(layer)
    assert type(layer) is nn.Linear and set(layer.state_dict()) == {"weight", "bias"}
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_second_derivative_is_refused_and_func_transforms_compose() -> None:
    layer = layer_of("linear", WEIGHTS.replace(backend="dense"), torch.float32)
    x = torch.randn(4, INPUTS, requires_grad=True)
    grad = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(sdgp.SDGPError, match="second derivative"):
        grad.sum().backward()
    jacobian = torch.func.jacrev(layer)(x[0].detach())
    assert torch.allclose(jacobian, sdgp.prune(layer.weight.detach()))
    per_sample = torch.func.vmap(layer)(x.detach())
    assert torch.allclose(per_sample, layer(x.detach()))


def test_functional_masks_too() -> None:
    w, x = torch.randn(OUTPUTS, INPUTS), torch.randn(5, INPUTS)
    config = WEIGHTS.replace(backend="dense")
    mask = smallest(w, 1)
    kept = masked(w, mask, config)
    got = sdgp.functional.linear(x, w, config=config, masks=(mask, None))
    assert torch.equal(got, F.linear(x, kept))
    image = torch.randn(1, INPUTS, 3, 3)
    taps = w.view(OUTPUTS, INPUTS, 1, 1)
    found = sdgp.functional.conv2d(image, taps, config=config)
    assert torch.allclose(found, F.conv2d(image, sdgp.prune(taps, dim=1)))


def test_odd_widths_stay_dense_and_disabled_layers_are_torchs() -> None:
    model = nn.ModuleDict(
        {"odd": nn.Linear(30, 32), "narrow": nn.Linear(32, 30), "x": nn.Linear(32, 32)}
    )
    report = sdgp.convert_(model, BOTH.replace(backend="dense"))
    assert report.converted == ["x"]
    assert report.skipped["odd"] == "its weight has 30 inputs, no multiple of weight_m = 4"
    assert report.skipped["narrow"] == "its weight has 30 outputs, no multiple of weight_m = 4"
    sdgp.set_enabled_(model, False)
    x = torch.randn(3, 32)
    assert torch.equal(model["x"](x), F.linear(x, model["x"].weight, model["x"].bias))
