"""Prune functions against oracles in plain Python loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.pruning import cpu, fours
from sdgp_cusparselt.pruning.bits import FLOAT_DTYPES
from tests.helpers import SDGP_PATTERNS, bits, oracle_magnitude, same_bits

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-40]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def draw(shape: tuple[int, ...], seed: int, special: float = 0.3) -> Tensor:
    """Normal numbers with ties, zeros, subnormals, NaN and Inf strewn in."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    x = torch.where(torch.rand(shape, generator=g) < 0.3, x.round(), x)
    pick = torch.randint(len(SPECIAL), shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < special, torch.tensor(SPECIAL)[pick], x)


@pytest.mark.parametrize("n, m", SDGP_PATTERNS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_magnitude_equals_the_loops(n: int, m: int, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 2 * m + 3), min_size=1, max_size=3)))
    if math.prod(shape) > 4000:
        shape = shape[:2]
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    dtype = data.draw(st.sampled_from(DTYPES))
    x = draw(shape, data.draw(st.integers(0, 2**31))).to(dtype)
    assert same_bits(sdgp.prune(x, n=n, m=m, dim=dim), oracle_magnitude(x, n, m, dim))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_of_four_values_in_both_ways_of_comparing(
    n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.0, math.inf, math.nan], dtype=dtype)
    x = torch.cartesian_prod(values, values, values, values)
    expected = oracle_magnitude(x, n, 4, 1)
    assert same_bits(sdgp.prune(x, n=n), expected)
    monkeypatch.setattr(fours, "CHUNK", 100)  # several chunks, the last one short
    assert same_bits(sdgp.prune(x, n=n), expected)
    monkeypatch.setattr(cpu, "takes", lambda *_: False)
    assert same_bits(sdgp.prune(x, n=n), expected)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 32), data=st.data())
def test_any_pattern(m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m))
    x = draw((3, data.draw(st.integers(1, 70))), data.draw(st.integers(0, 2**31)))
    assert same_bits(sdgp.prune(x, n=n, m=m), oracle_magnitude(x, n, m, 1))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("method", ["magnitude", "rescaled_magnitude", "random", "mvue"])
def test_every_float_dtype(dtype: torch.dtype, method: str) -> None:
    x = torch.randn(8, 16).to(dtype)
    y = sdgp.prune(x, method=method)
    assert y.dtype == dtype and y.shape == x.shape
    assert ((y.float() != 0).view(8, 4, 4).sum(-1) <= 2).all()
    if method == "magnitude":
        assert same_bits(y, oracle_magnitude(x.float(), 2, 4, 1).to(dtype))


@pytest.mark.parametrize("dtype", [d for d in FLOAT_DTYPES if str(d).endswith("fnuz")], ids=str)
def test_nan_is_largest_where_it_looks_like_minus_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([240.0, math.nan, 240.0, 240.0]).to(dtype)
    assert sdgp.prune(x, n=1).float().isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    "group, kept",
    [
        ([1.0, 2.0, 3.0, 4.0], [2, 3]),
        ([1.0, 1.0, 1.0, 1.0], [0, 1]),
        ([-1.0, 1.0, 2.0, -1.0], [0, 2]),
        ([1.0, math.nan, math.inf, math.nan], [1, 3]),
        ([1.0, -math.inf, 3e38, math.inf], [1, 3]),
        ([1e-45, 0.0, -1e-45, 3e-45], [0, 3]),
    ],
)
def test_by_hand(group: list[float], kept: list[int]) -> None:
    x = torch.tensor(group)
    y = sdgp.prune(x)
    for i in range(4):
        expected = x[i] if i in kept else torch.tensor(0.0)
        assert same_bits(y[i : i + 1], expected[None])


def test_zero_groups_stay_zero_and_a_kept_minus_zero_keeps_its_sign() -> None:
    x = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    assert torch.signbit(sdgp.prune(x)).tolist() == [True, False, False, False]


@pytest.mark.parametrize("method", ["magnitude", "rescaled_magnitude"])
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_memory_format_changes_nothing_but_strides(method: str, dim: int) -> None:
    x = draw((5, 12, 6, 7), 3, special=0.0)
    last = x.to(memory_format=torch.channels_last)
    plain, strided = (sdgp.prune(t, method=method, dim=dim) for t in (x, last))
    if method == "magnitude":
        assert same_bits(plain, strided)
        assert same_bits(plain, oracle_magnitude(x, 2, 4, dim))
    torch.testing.assert_close(plain, strided)
    assert plain.stride() == x.stride() and strided.stride() == last.stride()


def test_expanded_sliced_and_transposed_inputs() -> None:
    base = torch.randn(6, 40)
    for x in (base[:, ::2], base.t(), base[0, 0].expand(6, 40), base[:1].expand(6, 40)):
        assert same_bits(sdgp.prune(x), oracle_magnitude(x, 2, 4, 1))


def test_nothing_to_prune_returns_the_tensor_itself() -> None:
    x = torch.randn(4, 8)
    assert sdgp.prune(x, method="none") is x
    assert sdgp.prune(x, n=4) is x
    empty = torch.empty(0, 8)
    assert sdgp.prune(empty) is empty


@pytest.mark.parametrize("n, m", SDGP_PATTERNS)
@pytest.mark.parametrize("shape, dim, dims", [((3, 32, 5, 4), 1, (2, 3)), ((2, 7, 32), -1, (1,))])
def test_rescaled_keeps_the_l1_norm_per_sample_and_channel(
    n: int, m: int, shape: tuple[int, ...], dim: int, dims: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    x.select(dim, 0).mul_(1e-6)  # a channel that is pruned away everywhere
    x.select(dim, 1).zero_()
    kept = oracle_magnitude(x, n, m, dim)
    y = sdgp.prune(x, method="rescaled_magnitude", n=n, m=m, dim=dim)
    ratio = x.double().abs().sum(dims, keepdim=True) / kept.double().abs().sum(dims, keepdim=True)
    ratio = torch.where(kept.abs().sum(dims, keepdim=True) > 0, ratio, torch.ones_like(ratio))
    count = math.prod(x.shape[d] for d in dims)
    bound = (2 * count + 4) * torch.finfo(torch.float32).eps * (kept.double() * ratio).abs()
    assert ((y.double() - kept.double() * ratio).abs() <= bound).all()


def test_rescaled_sums_over_the_tokens_of_a_matrix_and_where_it_is_told() -> None:
    x = torch.randn(64, 8)
    kept = oracle_magnitude(x, 2, 4, 1)
    per_feature = kept * (x.abs().sum(0) / kept.abs().sum(0))
    torch.testing.assert_close(sdgp.prune(x, method="rescaled_magnitude"), per_feature)
    per_tensor = kept * (x.abs().sum() / kept.abs().sum())
    whole = sdgp.prune(x, method="rescaled_magnitude", scale_dims=(0, 1))
    torch.testing.assert_close(whole, per_tensor)


def test_rescaled_fp16_sums_do_not_overflow_and_small_gradients_are_not_shrunk() -> None:
    large = torch.full((4096, 4), 60.0, dtype=torch.float16)
    assert torch.isfinite(sdgp.prune(large, method="rescaled_magnitude")).all()
    small = torch.randn(64, 8).mul_(1e-6)
    y = sdgp.prune(small, method="rescaled_magnitude")
    torch.testing.assert_close(y.abs().sum(0), small.abs().sum(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["magnitude", "rescaled_magnitude", "random", "mvue"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_overflow_stays_visible(method: str, bad: float) -> None:
    x = torch.randn(16, 8)
    x[:, 5] = bad
    y = sdgp.prune(x, method=method)
    assert not torch.isfinite(y).all()
    assert (~torch.isfinite(y[:, 5])).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(FLOAT_DTYPES), dim=st.sampled_from([0, 1]))
def test_random_keeps_the_largest_of_a_group_with_an_overflow_and_draws_in_the_others(
    data: st.DataObject, dtype: torch.dtype, dim: int
) -> None:
    n, m = data.draw(st.sampled_from([*SDGP_PATTERNS, (1, 2), (3, 4), (3, 5)]))
    seed = data.draw(st.integers(0, 2**31))
    bad = draw((6, 2 * m + 3), seed, special=1.5 / m).to(dtype)
    wide = bad.float()
    finite = torch.where(wide.isfinite(), wide, 1.0).to(dtype)
    groups = F.pad(wide, (0, -wide.shape[1] % m)).unflatten(1, (-1, m))
    overflow = (~groups.isfinite()).any(-1, keepdim=True).expand(groups.shape)
    overflow = overflow.flatten(1)[:, : wide.shape[1]]

    def drawn(t: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        t = t if dim == 1 else t.t()
        y = sdgp.prune(t, method="random", n=n, m=m, dim=dim, generator=generator)
        return bits(y if dim == 1 else y.t())

    expected = bits(oracle_magnitude(bad, n, m, 1))
    assert torch.equal(drawn(bad), torch.where(overflow, expected, drawn(finite)))


@pytest.mark.parametrize("n, m", [*SDGP_PATTERNS, (3, 4), (1, 2), (3, 5)])
def test_random_keeps_each_position_with_probability_n_of_m(n: int, m: int) -> None:
    groups = 20_000
    kept = sdgp.prune(torch.ones(groups, m), method="random", n=n, m=m)
    assert (kept.sum(1) == n).all()
    p = n / m
    sigma = math.sqrt(p * (1 - p) / groups)
    assert (kept.mean(0) - p).abs().max() < 6 * sigma


def test_random_two_of_four_is_uniform_over_the_six_subsets() -> None:
    groups = 60_000
    kept = sdgp.prune(torch.ones(groups, 4), method="random")
    code = (kept * torch.tensor([1.0, 2.0, 4.0, 8.0])).sum(1)
    counts = torch.stack([(code == c).sum() for c in (3, 5, 6, 9, 10, 12)]).double()
    expected = groups / 6
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 31  # the 1e-5 quantile of chi squared with five degrees of freedom


def mvue_probabilities(group: list[float], n: int) -> list[float]:
    """Inclusion probabilities by bisection on c in sum min(1, c |x|) = n."""
    size = [abs(v) for v in group]
    if sum(v > 0 for v in size) <= n:
        return [float(v > 0) for v in size]
    low, high = 0.0, n / min(v for v in size if v > 0)
    for _ in range(200):
        c = (low + high) / 2
        low, high = (low, c) if sum(min(1.0, c * v) for v in size) > n else (c, high)
    return [min(1.0, low * v) for v in size]


@pytest.mark.parametrize("n, m", [(2, 4), (1, 2), (1, 4), (2, 8), (4, 8), (8, 16)])
@pytest.mark.parametrize("kind", ["normal", "one dominates", "two values", "wide"])
def test_mvue_is_unbiased_with_the_least_variance(n: int, m: int, kind: str) -> None:
    x = torch.randn(m, dtype=torch.float64)
    if kind == "one dominates":
        x[m // 2] = 50.0
    elif kind == "two values":
        x = torch.where(torch.arange(m) % 2 == 0, 0.0, x)
    elif kind == "wide":
        x = x * 10.0 ** torch.linspace(-3, 3, m, dtype=torch.float64)
    draws = 40_000
    y = sdgp.prune(x.expand(draws, m), method="mvue", n=n, m=m)
    assert ((y != 0).sum(1) <= n).all()
    p = torch.tensor(mvue_probabilities(x.tolist(), n), dtype=torch.float64)
    frequency = (y != 0).double().mean(0)
    sigma_p = (p * (1 - p) / draws).sqrt()
    assert ((frequency - p).abs() <= 6 * sigma_p + 1e-6).all()
    sigma = (x**2 * (1 / p.clamp(min=1e-300) - 1)).clamp(min=0).sqrt() / math.sqrt(draws)
    rare = p * draws < 50  # a handful of draws is no sample of a mean
    assert ((y.mean(0) - x).abs() <= 6 * sigma + 1e-12)[~rare].all()


@pytest.mark.parametrize("place", range(4))
def test_mvue_keeps_exactly_two_where_a_point_meets_a_boundary(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = 4000
    x = torch.rand(groups, 4) + 0.01
    x[:, place] = 100.0
    rest = x.double().clone()
    rest[:, place] = 0.0
    # The sure element's stretch begins where the shares before it end, and there falls a point.
    start = (rest / rest.sum(1, keepdim=True))[:, :place].sum(1).float()
    monkeypatch.setattr(cpu, "takes", lambda *_: False)  # test_fours has the blocked way
    for steps in (-2, -1, 0, 1, 2):
        near = (start + steps * 2.0**-25).clamp(0, 1 - 2**-24)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda shape, u=near, **k: u.to(k["dtype"]).view(shape))
            y = sdgp.prune(x, method="mvue")
        assert ((y != 0).sum(1) == 2).all() and (y[:, place] == 100).all()


@pytest.mark.parametrize("n, m", [*SDGP_PATTERNS, (3, 4), (3, 5), (31, 32)])
def test_mvue_keeps_exactly_n_of_any_m(n: int, m: int) -> None:
    x = torch.randn(3000, m) * torch.exp(3 * torch.randn(3000, m))
    for t in (x, x.double(), x.bfloat16()):
        y = sdgp.prune(t, method="mvue", n=n, m=m)
        assert ((y != 0).sum(1) == n).all()


def test_mvue_two_of_four_has_the_published_variance_on_normal_groups() -> None:
    x = torch.randn(200_000, 4, dtype=torch.float64)
    y = sdgp.prune(x, method="mvue")
    relative = float(((y - x) ** 2).sum() / (x**2).sum())
    assert abs(relative - 0.475) < 0.01


def test_mvue_leaves_groups_with_few_values_alone() -> None:
    x = torch.tensor([[0.0, 3.0, 0.0, -2.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 7.0, 0.0]])
    for _ in range(20):
        assert same_bits(sdgp.prune(x, method="mvue"), x)


@pytest.mark.parametrize("method", ["random", "mvue"])
def test_generators_rule_the_randomness(method: str) -> None:
    x = torch.randn(64, 64)

    def seeded(seed: int) -> Tensor:
        return sdgp.prune(x, method=method, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.equal(seeded(1), seeded(2))
    torch.manual_seed(5)
    first = sdgp.prune(x, method=method)
    assert not torch.equal(first, sdgp.prune(x, method=method))
    torch.manual_seed(5)
    assert torch.equal(first, sdgp.prune(x, method=method))


def test_the_result_carries_no_graph() -> None:
    assert not sdgp.prune(torch.randn(4, 8, requires_grad=True)).requires_grad


@pytest.mark.parametrize("method", ["magnitude", "rescaled_magnitude"])
def test_compiles_without_graph_breaks(method: str) -> None:
    compiled = torch.compile(lambda t: sdgp.prune(t, method=method), fullgraph=True)
    x = torch.randn(64, 48)
    torch.testing.assert_close(compiled(x), sdgp.prune(x, method=method))


@pytest.mark.parametrize("method, n, m", [("random", 2, 4), ("mvue", 2, 4), ("random", 4, 8)])
def test_the_methods_that_draw_trace_for_every_shape(method: str, n: int, m: int) -> None:
    compiled = torch.compile(
        lambda t: sdgp.prune(t, method=method, n=n, m=m),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for x in (torch.randn(8, 16), torch.randn(24, 48)):
        y = compiled(x)
        assert ((y != 0).unflatten(1, (-1, m)).sum(-1) == n).all()


@pytest.mark.parametrize(
    "kwargs, error, words",
    [
        ({"m": 0}, ValueError, ["m must be in 1..32", "0"]),
        ({"m": 33}, ValueError, ["m must be in 1..32", "33"]),
        ({"n": 5}, ValueError, ["n must be in 1..m", "5"]),
        ({"n": 0}, ValueError, ["n must be in 1..m", "0"]),
        ({"n": 2.0}, TypeError, ["n must be an int", "2.0"]),
        ({"n": True}, TypeError, ["n must be an int", "True"]),
        ({"method": "top"}, ValueError, ["method must be one of", "'top'"]),
        ({"method": None}, ValueError, ["method must be one of", "None"]),
        ({"dim": 2}, ValueError, ["dim must be in -2..1", "2"]),
        ({"dim": "x"}, TypeError, ["dim must be an int", "'x'"]),
        ({"method": "rescaled_magnitude", "scale_dims": (3,)}, ValueError, ["scale_dims", "3"]),
    ],
)
def test_bad_arguments(kwargs: dict, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        sdgp.prune(torch.randn(4, 8), **kwargs)
    for word in ["prune: ", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("x", [torch.ones(4, dtype=torch.int32), torch.ones(4).to(torch.cfloat)])
def test_other_dtypes_are_refused(x: Tensor) -> None:
    with pytest.raises(TypeError, match="x must be of a dtype in"):
        sdgp.prune(x)


def test_a_scalar_has_no_groups() -> None:
    with pytest.raises(ValueError, match="dim must be"):
        sdgp.prune(torch.tensor(1.0))
