"""Heavy tokens on the sparse way: the emulator multiplies what was packed, on a CPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.packing.heavy import heaviest, heavy_capacity, row_energies
from sdgp_cusparselt.packing.layout import PLAIN
from sdgp_cusparselt.packing.packed import buffer_nbytes
from sdgp_cusparselt.products import routes
from sdgp_cusparselt.products.heavy import (
    HeavyKernels,
    HeavyReference,
    heavy_packer_for,
    heavy_rival,
    rows_without_extra,
)
from sdgp_cusparselt.products.operands import LinearGradInput
from sdgp_cusparselt.products.sparse import SparseProduct, sparse_product
from tests.helpers import product_bound
from tests.interpreting import needs_loops
from tests.products.worlds import World

TOKENS, OUTPUTS, INPUTS = 40, 64, 24


def config(share: float, **more: object) -> sdgp.SDGPConfig:
    return sdgp.SDGPConfig(tune="never", heavy_tokens=share, **more)  # type: ignore[arg-type]


def operands(dtype: torch.dtype = torch.bfloat16, *shape: int) -> LinearGradInput:
    shape = shape or (TOKENS,)
    gradient = torch.randn(*shape, OUTPUTS).mul(torch.randn(*shape, 1).exp()).to(dtype)
    return LinearGradInput(gradient, torch.randn(OUTPUTS, INPUTS).to(dtype))


def bound_of_pairs(x: Tensor, weight: Tensor) -> Tensor:
    """Two products, each rounded to the dtype, and their sum rounded once more."""
    top = sdgp.prune(x)
    parts = product_bound(top, weight, x.dtype) + product_bound(x - top, weight, x.dtype)
    exact = (x.double() @ weight.double()).abs()
    return parts + torch.finfo(x.dtype).eps * (exact + parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(TOKENS,), (4, 12), (7,)])
def test_with_room_for_all_rows_it_is_the_dense_product(
    world: World, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    given = operands(dtype, *shape)
    found = sparse_product(world.backend, given, config(1.0))
    x, weight = given.matrices()
    assert found.shape == (*shape, INPUTS) and found.dtype == dtype
    error = (found.view(-1, INPUTS).double() - x.double() @ weight.double()).abs()
    assert (error <= bound_of_pairs(x, weight)).all()


def test_heavy_rows_are_exact_and_the_others_as_without(world: World) -> None:
    given = operands()
    torch.manual_seed(2)
    found = sparse_product(world.backend, given, config(0.2))
    torch.manual_seed(2)
    without = sparse_product(world.backend, given, config(0.0))
    x, weight = given.matrices()
    heavy = heaviest(row_energies(x), heavy_capacity(TOKENS, 0.2))
    light = torch.ones(TOKENS, dtype=torch.bool).index_fill(0, heavy, False)
    assert torch.equal(found[light], without[light])
    error = (found.double() - x.double() @ weight.double()).abs()
    assert (error[heavy] <= bound_of_pairs(x, weight)[heavy]).all()
    assert (error[light] > bound_of_pairs(x, weight)[light]).any()


def test_it_is_the_emulated_product_up_to_rounding(world: World) -> None:
    # The draws of both ways differ, so all that they share is tried: every row heavy but one.
    given = operands()
    given.grad_output[5] = 0  # a row of which nothing can be drawn
    share = (TOKENS - 1) / TOKENS
    found = sparse_product(world.backend, given, config(share))
    emulated = given.emulated(config(share))
    bound = bound_of_pairs(*given.matrices())
    assert ((found.double() - emulated.double()).abs() <= 2 * bound).all()


def test_a_layer_takes_the_sparse_way_and_counts_it(world: World) -> None:
    layer = nn.Linear(INPUTS, OUTPUTS).bfloat16()
    sdgp.convert_(layer, config(1.0, check_every=1, grad_weight="sparse"))
    input = torch.randn(48, INPUTS).bfloat16().requires_grad_()
    seen = torch.randn(48, OUTPUTS).bfloat16()
    for _ in range(2):
        input.grad = None
        layer(input).backward(seen)
    assert layer.sdgp_record.calls == {("grad_input", "sparse"): 2, ("grad_weight", "sparse"): 2}
    assert not layer.sdgp_record.broken
    assert input.grad is not None
    weight = layer.weight.detach()
    error = (input.grad.double() - seen.double() @ weight.double()).abs()
    assert (error <= bound_of_pairs(seen, weight)).all()


def test_without_a_proven_packer_the_layer_runs_plain_and_says_so(world: World) -> None:
    nothing = SimpleNamespace(layout=None, packer="library")
    world.patch.setattr(world.backend, "certificate", lambda *given: nothing)
    layer = nn.Linear(INPUTS, OUTPUTS).bfloat16()
    sdgp.convert_(layer, config(0.1))
    input = torch.randn(48, INPUTS).bfloat16().requires_grad_()
    seen = torch.randn(48, OUTPUTS).bfloat16()
    with pytest.warns(sdgp.SDGPFallbackWarning, match="packer is not proven for this plan"):
        layer(input).backward(seen)
    assert input.grad is not None and torch.equal(input.grad, seen.mm(layer.weight.detach()))


@needs_loops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strided", [False, True])
def test_kernels_and_reference_write_the_same(strided: bool, dtype: torch.dtype) -> None:
    x = torch.randn(37, 64).mul(4).round().to(dtype)  # sums of integers are exact in any order
    x = torch.cat([x, x], 1)[:, 1:65] if strided else x
    made = []
    for kind in (HeavyKernels, HeavyReference):
        packer = kind(x, 0.3, PLAIN, 9000)
        assert packer.scratch_at >= 9000
        buffer = torch.full((packer.nbytes,), 0xAA, dtype=torch.uint8)
        torch.manual_seed(5)
        packer(x, buffer.data_ptr(), 0)
        rows = 37 + packer.capacity
        product = torch.arange(rows * 16).view(rows, 16).remainder(61).to(dtype)
        added = packer.add(product, buffer.data_ptr(), 0)
        size = buffer_nbytes((rows, 64), dtype, PLAIN)
        made.append((buffer[:size], added))
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])


def test_the_race_is_against_the_rows_without_extras() -> None:
    for rows in (16, 100, 1000, 4096):
        total = rows + heavy_capacity(rows, 0.06)
        assert rows <= rows_without_extra(total, 0.06) <= rows + 16
        assert rows_without_extra(rows + heavy_capacity(rows, 1.0), 1.0) == rows
    rival = heavy_rival(0.06)
    left, right = torch.randn(112, 16), torch.randn(16, 8)
    rows = rows_without_extra(112, 0.06)
    assert torch.equal(rival.dense(left, right), left[:rows] @ right)
    product = torch.ones(112, 8)
    rival.before(left)
    added = rival.finish(product)
    assert isinstance(added, Tensor) and torch.equal(added, torch.full((112 - rows, 8), 2.0))


def test_tuning_measures_with_the_extra_rows(world: World) -> None:
    given = operands(torch.bfloat16, 64)
    wanted = config(0.1).replace(tune="first_use")
    route = routes.route_of(given, wanted)
    assert route.asked is not None
    assert route.asked.gemm.m == 64 + heavy_capacity(64, 0.1)
    assert route.asked.rival == "mm heavy 0.1"
    if route.way == "sparse":
        assert SparseProduct(given, wanted, world.backend, route.candidate).heavy is not None


def test_what_must_not_be_packed_is_refused() -> None:
    planned: Any = SimpleNamespace(compressed_size=0)
    with pytest.raises(sdgp.errors.NotSupportedError, match="not proven"):
        heavy_packer_for(torch.zeros(16, 16).bfloat16(), 0.1, None, planned)
