"""The blocked ways of a CPU: exact pairs for given draws, both orders of memory, every dtype."""

import math

import pytest
import torch
from torch import Tensor

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.pruning import cpu, fours, plain
from tests.helpers import bits, oracle_magnitude, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A float32 sum of four, rounded three times, against the distance of two points that is 1 here.
NEAR = 16 * torch.finfo(torch.float32).eps


def wide(count: int, seed: int) -> Tensor:
    """Groups of every kind: alike, one larger than all others together, zeros, few values."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=g) * torch.exp(2 * torch.randn(count, 4, generator=g))
    return torch.where(torch.rand(count, 4, generator=g) < 0.2, 0.0, x)


def by_blocks(x: Tensor, method: str, n: int = 2, seed: int = 0, at: int = 1) -> Tensor:
    assert cpu.takes(x, at, method, n)
    return cpu.prune_fours(x, at, method, n, torch.Generator().manual_seed(seed))


def uniforms(count: int, seed: int) -> Tensor:
    u = torch.empty(count)
    u.uniform_(fours.MARGIN, 1 - fours.MARGIN, generator=torch.Generator().manual_seed(seed))
    return u.double()


def line(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Ends of the stretches in float64, in units of the distance of two points, and the amount."""
    size = x.double().abs()
    others = size.sum(1, keepdim=True) - size.amax(1, keepdim=True)
    reach = torch.where(others > 0, others, torch.inf) if n == 2 else torch.inf
    ends = torch.minimum(size, torch.as_tensor(reach, dtype=torch.float64)).cumsum(1)
    step = ends[:, 3:] / n
    amount = torch.minimum(step, others) if n == 2 else step
    return ends / torch.where(step > 0, step, 1.0), amount


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mvue_keeps_the_members_under_the_points(dtype: torch.dtype, n: int) -> None:
    x = wide(20_000, 1).to(dtype)
    y = by_blocks(x, "mvue", n, seed=2)
    u = uniforms(len(x), 2)[:, None]
    ends, amount = line(x, n)
    # How many of u, u + 1 lie below each end of a stretch; where that grows, one is hit.
    below = (ends > u).double() + (ends > u + 1).double() * (n - 1)
    hit = below.diff(dim=1, prepend=torch.zeros_like(u)) > 0
    distance = torch.minimum((ends - u).abs(), (ends - u - 1).abs()).amin(1)
    nonzero = (x != 0).sum(1)
    clear = (distance > NEAR) & (nonzero > n)
    assert clear.float().mean() > 0.5
    size = torch.maximum(x.double().abs(), amount)
    expected = torch.where(hit, size.copysign(x.double()), 0.0)
    error = (y.double() - expected).abs()
    bound = 4 * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps * size
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (error <= bound + tiny)[clear].all()
    few = nonzero <= n
    assert same_bits(y[few], x[few])


@pytest.mark.parametrize("n", [1, 2])
def test_mvue_keeps_exactly_n_and_never_loses_a_sure_element(n: int) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(300_000, 4, generator=g) * torch.exp(3 * torch.randn(300_000, 4, generator=g))
    # Beside a sure element every boundary is a tie but for rounding: all four places of it.
    x[: 1 << 17, :] = torch.rand(1 << 17, 4, generator=g) + 0.01
    for place in range(4):
        x[place : 1 << 17 : 4, place] *= 1e4
    y = by_blocks(x, "mvue", n)
    assert ((y != 0).sum(1) == n).all()
    if n == 2:
        size = x.double().abs()
        sure = size > (size.sum(1, keepdim=True) - size) * (1 + 1e-6)
        assert sure[: 1 << 17].any(1).all() and torch.equal(y[sure], x[sure])


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("u", [0.0, 2.0**-24, 1e-3, 0.5, 1 - 2.0**-24])
def test_mvue_keeps_the_sure_element_wherever_the_points_fall(
    place: int, u: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extreme(self: Tensor, low: float, high: float, *, generator: object = None) -> Tensor:
        return self.fill_(low + u * (high - low))

    monkeypatch.setattr(Tensor, "uniform_", extreme)
    x = torch.rand(50_000, 4) * torch.exp(torch.randn(50_000, 4)) + 1e-6
    x[:, place] = x.sum(1) * 3
    y = by_blocks(x, "mvue")
    assert ((y != 0).sum(1) == 2).all() and torch.equal(y[:, place], x[:, place])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2])
def test_mvue_is_unbiased_with_the_least_variance(dtype: torch.dtype, n: int) -> None:
    draws = 40_000
    kinds = [[1.0, -2.0, 0.5, 3.0], [0.1, 40.0, 0.2, -0.3], [0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1, 1]]
    for group in torch.tensor(kinds).to(dtype):
        x = group.expand(draws, 4).contiguous()
        y = by_blocks(x, "mvue", n, seed=5).double()
        size = group.double().abs()
        share = n * size / size.sum()
        if n == 2 and (share > 1).any():
            rest = size.masked_fill(share > 1, 0)
            share = torch.where(share > 1, 1.0, rest / rest.sum())
        variance = (size**2 * (1 / share.clamp(min=1e-9) - 1)).clamp(min=0)
        # A kept value is rounded to dtype: a bias of half a unit in its last place.
        rounding = torch.finfo(dtype).eps * size.sum()
        deviation = (y.mean(0) - group.double()).abs()
        assert (deviation <= 6 * (variance / draws).sqrt() + rounding).all()
        spread = ((y - group.double()) ** 2).mean(0)
        assert (spread <= variance * 1.1 + 6 * rounding**2).all()


def test_mvue_of_subnormal_numbers_keeps_two_with_their_probability() -> None:
    x = (torch.tensor([3.0, 1.0, 2.0, 2.0]) * 2.0**-140).expand(40_000, 4).contiguous()
    y = by_blocks(x, "mvue")
    assert ((y != 0).sum(1) == 2).all()
    share = torch.tensor([0.75, 0.25, 0.5, 0.5])
    assert ((y != 0).float().mean(0) - share).abs().max() < 6 * 0.5 / math.sqrt(40_000)


@pytest.mark.parametrize("method", ["random", "mvue"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2])
def test_a_group_that_overflows_is_pruned_by_magnitude_and_leaves_the_others_alone(
    method: str, dtype: torch.dtype, n: int
) -> None:
    x = wide(4000, 4).clamp(-1e3, 1e3).to(dtype)
    bad = x.clone()
    bad[7, 1], bad[100, 3], bad[3999] = math.inf, math.nan, -math.inf
    hit = torch.zeros(4000, dtype=torch.bool)
    hit[[7, 100, 3999]] = True
    y, clean = by_blocks(bad, method, n), by_blocks(x, method, n)
    # A NaN may come back as another NaN: rounding float32 to bfloat16 does not keep its bits.
    expected = oracle_magnitude(bad[hit], n, 4, 1)
    torch.testing.assert_close(y[hit], expected, rtol=0, atol=0, equal_nan=True)
    assert same_bits(y[~hit], clean[~hit])


def test_a_sum_that_overflows_is_pruned_by_magnitude() -> None:
    x = torch.tensor([[3e38, 2e38, -1e38, 1e38], [1.0, 2.0, 3.0, 4.0]])
    assert same_bits(by_blocks(x, "mvue")[:1], oracle_magnitude(x[:1], 2, 4, 1))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_draws_every_subset_alike(n: int, dtype: torch.dtype) -> None:
    groups = 60_000
    y = by_blocks(torch.ones(groups, 4, dtype=dtype), "random", n).float()
    code = (y * torch.tensor([1.0, 2.0, 4.0, 8.0])).sum(1)
    counts = code.unique(return_counts=True)[1].double()
    assert len(counts) == math.comb(4, n)
    expected = groups / len(counts)
    # The 1e-5 quantile of chi squared with five degrees of freedom.
    assert ((counts - expected) ** 2 / expected).sum() < 31


@pytest.mark.parametrize("method", ["magnitude", "random", "mvue"])
@pytest.mark.parametrize("shape, at", [((40, 4, 9), 1), ((4, 700), 0), ((3, 5, 4), 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_members_anywhere_in_memory_and_blocks_of_any_size(
    method: str, shape: tuple[int, ...], at: int, dtype: torch.dtype, monkeypatch
) -> None:
    x = wide(math.prod(shape) // 4, 6).view(shape).to(dtype)
    y = by_blocks(x, method, at=at)
    assert ((y != 0).sum(at) <= 2).all()
    kept = y != 0
    if method != "mvue":
        assert torch.equal(y[kept], x[kept])
    else:
        assert (y[kept].sign() == x[kept].sign()).all()
    monkeypatch.setattr(fours, "CHUNK", 50)
    again = by_blocks(x, method, at=at)
    if method == "magnitude":
        assert same_bits(y, oracle_magnitude(x, 2, 4, at)) and same_bits(again, y)
    elif max(shape[at + 1 :], default=1) <= 50:  # blocks of whole rows draw in the same order
        assert same_bits(again, y)
    assert ((again != 0).sum(at) <= 2).all()


@pytest.mark.parametrize("method", ["magnitude", "random", "mvue"])
def test_what_is_dropped_is_plus_zero(method: str) -> None:
    y = by_blocks(-torch.rand(500, 4) - 0.1, method)
    assert (bits(y)[y == 0] == 0).all()


def test_magnitude_equals_the_plain_way_bit_for_bit() -> None:
    x = wide(5000, 8).to(torch.bfloat16)
    assert same_bits(by_blocks(x, "magnitude"), plain.prune_groups(x, 1, "magnitude", 2, None))


def test_a_thread_of_its_own_has_scratch_of_its_own() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x = torch.randn(256, 1024)
    expected = sdgp.prune(x)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: sdgp.prune(x), range(24)))
    assert all(same_bits(y, expected) for y in results)


@pytest.mark.parametrize("place", [1, 2])
def test_mvue_keeps_the_sure_element_whose_stretch_begins_at_a_point(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.rand(50_000, 4) + 0.01
    x[:, place] = 100.0
    before = x[:, :place].sum(1)
    u = torch.nextafter(before / (x.sum(1) - 100.0), torch.tensor(0.0))

    def near(self: Tensor, *_: float, generator: object = None) -> Tensor:
        return self.copy_(u[: len(self)])

    monkeypatch.setattr(Tensor, "uniform_", near)
    monkeypatch.setattr(fours, "CHUNK", len(x))
    y = by_blocks(x, "mvue")
    assert ((y != 0).sum(1) == 2).all() and torch.equal(y[:, place], x[:, place])
