"""What random and mvue draw: published Philox answers, uniform subsets, means, borders."""

import math

import packing_cases as cases
import pytest
import torch
from torch import Tensor

from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing import sampling
from sdgp_cusparselt.packing.nibbles import collect
from sdgp_cusparselt.packing.reference import Draws, pack_operand, rounded

SEEDS = torch.tensor([0x1234_5678_9ABC_DEF0, -(2**62) + 12345])
EVERY_DRAW = torch.arange(65536, dtype=torch.int32)
LOW = 0xFFFFFFFF
PAIRS = sorted(i | j << 2 for i in range(4) for j in range(i + 1, 4))


def test_philox_has_the_published_answers() -> None:
    """Known answers of Philox4x32-10 from the Random123 distribution (kat_vectors)."""

    def answer(word: int) -> list[int]:
        same = torch.tensor(word)
        return [int(w) for w in sampling.philox((same,) * 4, (same, same))]

    assert answer(0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert answer(LOW) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_a_draw_depends_on_place_and_direction_alone() -> None:
    along_features = sampling.group_bits(24, 6, 0, SEEDS, 0)
    along_tokens = sampling.group_bits(24, 6, 0, SEEDS, 1)
    for stream, whole in enumerate((along_features, along_tokens)):
        for first, rows in ((0, 3), (5, 9), (16, 8), (23, 1)):
            part = sampling.group_bits(rows, 6, first, SEEDS, stream)
            assert torch.equal(part, whole[first : first + rows])
        assert torch.equal(sampling.group_bits(24, 4, 0, SEEDS, stream), whole[:, :4])
    assert not torch.equal(along_features, along_tokens)
    # Row 5, group 3: the second quad's second row, the second octet's right group.
    words = sampling.place_words(torch.tensor([1]), torch.tensor([1]), SEEDS, 0)
    assert along_features[5, 3] == words[0, 0, 1] >> 16
    # Column 10 of x, rows 8 to 11: the second octet's third column, the third quad.
    words = sampling.place_words(torch.tensor([2]), torch.tensor([1]), SEEDS, 1)
    assert along_tokens[10, 2] == words[0, 0, 1] & 0xFFFF


@pytest.mark.parametrize("n, subsets", [(2, 6), (1, 4)])
def test_every_subset_is_equally_likely(n: int, subsets: int) -> None:
    """Chi-square over 2**20 groups, at 1 in 10**6; and over all 16-bit draws, exactly."""
    x = torch.ones(1024, 4096, dtype=torch.float16)
    packed = pack_operand(x, layouts.BLOCKED, method="random", n=n, draws=Draws(SEEDS, 0))
    kept = (packed.unpack().view(-1, 4) != 0).to(torch.int64)
    assert (kept.sum(-1) == n).all()
    counts = torch.bincount(kept @ torch.tensor([1, 2, 4, 8]), minlength=16)
    counts = counts[counts > 0].double()
    assert len(counts) == subsets
    mean = kept.shape[0] / subsets
    statistic = float(((counts - mean) ** 2 / mean).sum())
    assert statistic < {6: 37.4, 4: 30.7}[subsets]  # quantiles of chi-square with 5 and 3 degrees
    chosen = (sampling.random_pair if n == 2 else sampling.random_one)(EVERY_DRAW)
    codes = chosen.nibbles().long() + 16 * (0 if n == 2 else chosen.only_second.long())
    exact = torch.bincount(codes)
    exact = exact[exact > 0]
    assert len(exact) == subsets and exact.max() - exact.min() <= 1


def test_other_seeds_and_offsets_draw_otherwise() -> None:
    def drawn(seed: int, offset: int) -> Tensor:
        return sampling.group_bits(64, 64, 0, torch.tensor([seed, offset]), 0)

    usual = drawn(1, 0)
    for other in (drawn(2, 0), drawn(1, 4), drawn(1 + 2**32, 0), drawn(1, 2**32)):
        # Two independent 16-bit words agree once in 65,536.
        assert (other == usual).float().mean() < 0.01


def test_a_point_lies_between_two_sixteenth_bits() -> None:
    points = sampling._uniform(EVERY_DRAW).double()
    assert torch.equal(points, (EVERY_DRAW.double() + 0.5) / 65536)


def wide_groups(count: int, dtype: torch.dtype, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 4, generator=generator)
    x *= torch.exp(3 * torch.randn(count, 4, generator=generator)) * scale
    # Large enough for all four to overflow nothing.
    x = x.clamp(-1e4, 1e4)
    return torch.where(torch.rand(count, 4, generator=generator) < 0.15, 0.0, x).to(dtype)


def estimates(group: Tensor, draws: Tensor, n: int) -> Tensor:
    """What mvue makes of one group for each draw: float64 [draws, 4]."""
    members = tuple(group[i].expand(len(draws)) for i in range(4))
    sizes = tuple(member.float().abs().contiguous() for member in members)
    chosen, worth, _ = (sampling.mvue_two if n == 2 else sampling.mvue_one)(sizes, draws)
    amount = rounded(worth, group.dtype).view(group.dtype).double()
    nibbles = chosen.nibbles().long()
    out = torch.zeros(len(draws), 4, dtype=torch.float64)
    exact = group.double()
    for slot, index in enumerate((nibbles & 3, nibbles >> 2)):
        value = torch.copysign(torch.maximum(exact.abs()[index], amount), exact[index])
        if chosen.only_second is not None:
            value = torch.where(chosen.only_second == bool(slot), value, 0.0)
        out.scatter_(1, index[:, None], value[:, None])
    return out


@pytest.mark.parametrize("n", [2, 1])
@pytest.mark.parametrize(
    "dtype, scale",
    [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.bfloat16, 1e-38), (torch.float16, 1e-6)],
)
def test_the_mean_of_mvue_over_every_draw_is_x(n: int, dtype: torch.dtype, scale: float) -> None:
    """65,536 draws of 100 groups a case, 400 in all: the mean is off by rounding alone.

    The amount is rounded to dtype once; each of the two ends of a stretch is off by half the
    distance of two points, 2**-16 of an amount of at most S / 2, or S; fp32 rounds each of a dozen
    sums.
    """
    half_ulp = torch.finfo(dtype).eps / 2
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    for group in wide_groups(100, dtype, scale):
        exact, total = group.double(), float(group.double().abs().sum())
        mean = estimates(group, EVERY_DRAW, n).mean(0)
        ends = total / n * 2.0**-16
        bound = half_ulp * exact.abs() + ends + 12 * total * 2.0**-24 + subnormal
        assert ((mean - exact).abs() <= bound).all(), (group, mean)


def border_groups(count: int, dtype: torch.dtype, seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Groups whose largest is the others' sum, an ulp or two more or less, and extreme draws."""
    generator = torch.Generator().manual_seed(seed)
    others = torch.randn(count, 3, generator=generator)
    others *= torch.exp2(torch.randint(-12, 12, (count, 3), generator=generator).float())
    others = torch.where(torch.rand(count, 3, generator=generator) < 0.2, 0.0, others).to(dtype)
    largest = others.float().abs().sum(-1).to(dtype)
    nudged = largest.view(torch.int16) + torch.randint(
        -2, 3, (count,), generator=generator, dtype=torch.int16
    )
    nudged = torch.where(nudged > 0, nudged, largest.view(torch.int16)).view(dtype)
    groups = torch.cat((others, nudged[:, None]), 1)
    order = torch.rand(count, 4, generator=generator).argsort(-1)
    groups = groups.gather(1, order)
    draws = torch.randint(0, 65536, (count,), generator=generator, dtype=torch.int32)
    edge = torch.randint(0, 4, (count,), generator=generator)
    draws = torch.where(edge == 0, 0, torch.where(edge == 1, 65535, draws)).to(torch.int32)
    return tuple(groups[:, i].contiguous() for i in range(4)), draws


def check_borders(count: int, dtype: torch.dtype, seed: int) -> None:
    members, draws = border_groups(count, dtype, seed)
    sizes = tuple(member.float().abs() for member in members)
    chosen, worth, _ = sampling.mvue_two(sizes, draws)
    nonzero = sum((size > 0).int() for size in sizes)
    kept = [torch.maximum(size, worth.to(dtype).float()) > 0 for size in chosen.of(sizes)]
    # A member that is zero is worth its group's amount if it is drawn: it must not be.
    drawn = [size > 0 for size in chosen.of(sizes)]
    nibbles = chosen.nibbles()
    assert ((nibbles & 3) < (nibbles >> 2)).all()
    assert (sum(d.int() for d in drawn) == torch.clamp(nonzero, max=2)).all()
    assert (sum(k.int() for k in kept) == torch.clamp(nonzero, max=2)).all()


@pytest.mark.parametrize("dtype", cases.FLOAT_DTYPES)
def test_exactly_two_are_kept_next_to_a_border(dtype: torch.dtype) -> None:
    check_borders(500_000, dtype, 1)


@pytest.mark.parametrize(
    "group, dtype",
    [
        ((525.5, 526.5, 0.0, 0.00402069091796875), torch.float16),
        ((94.0, 94.5, 0.0, 0.000713348388671875), torch.bfloat16),
        ((627.5, 628.0, 0.0, 0.00475311279296875), torch.float16),
    ],
)
def test_a_zero_is_passed_over_where_rounding_reaches_it(
    group: tuple[float, ...], dtype: torch.dtype
) -> None:
    """The first point falls on the end of member 0, and h was rounded up past member 3."""
    kept = estimates(torch.tensor(group, dtype=dtype), EVERY_DRAW, 2) != 0
    assert (kept.sum(-1) == 2).all() and not kept[:, 2].any()


@pytest.mark.slow
def test_exactly_two_are_kept_next_to_a_border_in_a_hundred_million_groups() -> None:
    for seed in range(50):
        for dtype in cases.FLOAT_DTYPES:
            check_borders(1_000_000, dtype, 100 + seed)


def test_mvue_keeps_the_largest_for_sure_where_it_exceeds_the_others() -> None:
    group = torch.tensor([0.5, 0.0, -8.0, 1.0], dtype=torch.float16)
    drawn = estimates(group, EVERY_DRAW, 2)
    assert (drawn[:, 2] == -8).all() and (drawn[:, 1] == 0).all()
    assert set(drawn[:, 0].tolist()) == {0.0, 1.5} == set(drawn[:, 3].tolist())
    assert math.isclose(float((drawn[:, 3] != 0).double().mean()), 2 / 3, abs_tol=2.0**-15)


def test_every_pair_occurs() -> None:
    x = torch.randn(256, 256).bfloat16()
    packed = pack_operand(x, layouts.PLAIN, method="mvue", draws=Draws(SEEDS, 1))
    nibbles = collect(packed.metadata, layouts.PLAIN, 256, 256)
    assert sorted(nibbles.unique().tolist()) == PAIRS
