"""Heavy tokens: which rows they are, and that what is left stays unbiased."""

import math

import pytest
import torch
from torch import Tensor

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends import dense, emulation
from sdgp_cusparselt.packing.heavy import heaviest, heavy_capacity, row_energies
from tests.helpers import assert_product, same_bits


def gradient(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tokens of very different size, as a language model's are."""
    size = torch.randn(*shape[:-1], 1).exp()
    return (torch.randn(shape) * size).to(dtype)


@pytest.mark.parametrize("rows", [0, 1, 7, 16, 100, 1024, 4097])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.06, 0.5, 1.0])
def test_capacity_is_at_least_the_share_and_leaves_no_padding(rows: int, share: float) -> None:
    capacity = heavy_capacity(rows, share)
    assert math.floor(share * rows) <= capacity <= rows
    assert capacity < share * rows + 17
    assert (capacity > 0) == (share * rows > 0)
    assert capacity in (0, rows) or (rows + capacity) % 16 == 0


def test_the_heaviest_rows_are_those_of_largest_norm_in_order() -> None:
    energies = torch.rand(100).square()
    rows = heaviest(energies, 12)
    assert rows.tolist() == sorted(energies.argsort(descending=True)[:12].tolist())
    assert heaviest(energies, 100).tolist() == list(range(100))
    assert heaviest(energies, 0).numel() == 0


def test_a_tie_takes_the_lower_row_and_nan_is_largest() -> None:
    energies = torch.tensor([1.0, 2.0, 1.0, torch.nan, 1.0, math.inf])
    assert heaviest(energies, 4).tolist() == [0, 1, 3, 5]
    assert heaviest(torch.zeros(6), 2).tolist() == [0, 1]
    assert heaviest(-energies.new_tensor([torch.nan, 0.0]), 1).tolist() == [0]  # with a sign


def test_row_energies_do_not_overflow_a_narrow_type() -> None:
    x = torch.full((3, 64), 2.0**15, dtype=torch.float16)  # powers of 2 add up exactly
    assert row_energies(x).tolist() == [2.0**36] * 3


@pytest.mark.parametrize("shape", [(40, 32), (4, 10, 32), (0, 32)])
def test_heavy_rows_are_exact_and_the_others_drawn_as_always(shape: tuple[int, ...]) -> None:
    x = gradient(*shape)
    config = sdgp.SDGPConfig(backend="dense", heavy_tokens=0.1)
    torch.manual_seed(1)
    found = emulation.prune_features(x, config).view(-1, 32)
    torch.manual_seed(1)
    drawn = emulation.prune_features(x, config.replace(heavy_tokens=0.0)).view(-1, 32)
    heavy = heaviest(row_energies(x.view(-1, 32)), heavy_capacity(len(drawn), 0.1))
    is_heavy = torch.zeros(len(drawn), dtype=torch.bool)
    is_heavy[heavy] = True
    assert same_bits(found[is_heavy], x.view(-1, 32)[is_heavy])
    assert same_bits(found[~is_heavy], drawn[~is_heavy])
    assert not len(drawn) or not torch.equal(drawn[is_heavy], found[is_heavy])


def test_with_room_for_all_rows_the_product_is_dense() -> None:
    x, weight = gradient(50, 64), torch.randn(64, 24)
    config = sdgp.SDGPConfig(backend="dense", heavy_tokens=1.0)
    assert_product(dense.linear_grad_input(x, weight, config), x, weight)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7])
def test_unbiased_at_every_capacity(share: float) -> None:
    x, draws = gradient(64, 64, dtype=torch.float64), 500
    config = sdgp.SDGPConfig(backend="dense", heavy_tokens=share)
    # Errors of draws along a direction are independent numbers of mean 0: |z| > 5 is a case in
    # 1.7 million. Along x itself it is the length that would be off.
    found = torch.stack([emulation.prune_features(x, config) for _ in range(draws)])
    for direction in (x, torch.randn_like(x), torch.randn_like(x) * x.norm(dim=1, keepdim=True)):
        errors = ((found - x) * direction).sum((1, 2))
        z = errors.mean() / errors.std() * math.sqrt(draws)
        assert abs(float(z)) < 5


def test_a_layer_and_its_gradients() -> None:
    layer = torch.nn.Linear(24, 64)
    input = torch.randn(4, 12, 24, requires_grad=True)
    seen = gradient(4, 12, 64)
    config = sdgp.SDGPConfig(backend="dense", heavy_tokens=1.0)
    sdgp.convert_(torch.nn.Sequential(layer), config)
    layer(input).backward(seen)
    flat = seen.view(-1, 64)
    assert input.grad is not None and layer.weight.grad is not None
    assert_product(input.grad.view(-1, 24), flat, layer.weight.detach())
    assert_product(layer.weight.grad, flat.t(), input.detach().view(-1, 24))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"heavy_tokens": 1.5}, ValueError, r"heavy_tokens must be in 0\.\.1, got 1\.5"),
        ({"heavy_tokens": float("nan")}, ValueError, r"must be in 0\.\.1, got nan"),
        ({"heavy_tokens": "6 %"}, TypeError, "heavy_tokens must be a number, got '6 %'"),
        ({"heavy_tokens": 0.1, "prune": "magnitude"}, ValueError, "got 0.1 with magnitude 2:4"),
        ({"heavy_tokens": 0.1, "n": 1}, ValueError, "got 0.1 with mvue 1:4"),
        ({"heavy_tokens": 0.1, "beta": 0.5}, ValueError, "without beta"),
    ],
)
def test_what_cannot_be_is_refused(
    wrong: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sdgp.SDGPConfig(**wrong)  # type: ignore[arg-type]


def test_a_schedule_drops_them_where_nothing_is_drawn() -> None:
    schedule = sdgp.Schedule(total_steps=10, warmup=2, methods=((0.5, "magnitude"),))
    config = sdgp.SDGPConfig(heavy_tokens=0.1, schedule=schedule)
    assert [config.at(step).heavy_tokens for step in (0, 3, 8)] == [0.0, 0.1, 0.0]


def test_a_preset_leaves_them_out_where_grad_weight_alone_is_pruned() -> None:
    block = torch.nn.Module()
    block.up, block.down = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)
    report = sdgp.convert_(block, sdgp.SDGPConfig(heavy_tokens=0.1), preset="balanced")
    shares = {name: config.heavy_tokens for name, config in report.configs.items()}
    assert shares == {"up": 0.1, "down": 0.0}
