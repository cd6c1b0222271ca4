"""pack and unpack in plain torch against packing spelled out group by group."""

import math

import packing_cases as cases
import packing_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing import reference
from sdgp_cusparselt.packing.nibbles import collect
from sdgp_cusparselt.packing.packed import Packed24
from sdgp_cusparselt.packing.reference import Draws, pack_operand
from tests.helpers import bits

DRAWS = Draws(torch.tensor([0x1234_5678_9ABC_DEF0, -(2**62) + 12345]), 0)


@pytest.mark.parametrize("name", sorted(layouts.NAMED))
@pytest.mark.parametrize("dtype", cases.FLOAT_DTYPES)
@pytest.mark.parametrize("rows, cols", [(5, 12), (48, 80), (128, 64)])
def test_bytes_equal_the_spelled_out_packing(
    name: str, dtype: torch.dtype, rows: int, cols: int
) -> None:
    layout = layouts.NAMED[name]
    padded = layouts.padded_shape(rows, cols, dtype)
    if layout.misfit(*padded):
        with pytest.raises(ValueError, match="fits"):
            pack_operand(torch.zeros(rows, cols, dtype=dtype), layout)
        return
    x = cases.adversarial(rows, cols, dtype)
    packed = pack_operand(x, layout)
    pruned = oracle.prune_magnitude(x)
    values, metadata = oracle.pack(pruned, name, 16)
    assert torch.equal(packed.values.view(values.dtype), values)
    assert torch.equal(packed.metadata, metadata)
    assert torch.equal(packed.unpack().float().nan_to_num(7), pruned.float().nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_types_have_the_same_format_with_multiples_of_32(dtype: torch.dtype) -> None:
    x = (torch.randn(40, 96) * 9).to(dtype)
    packed = pack_operand(x, layouts.PLAIN)
    values, metadata = oracle.pack(oracle.prune_magnitude(x), "plain", 32)
    assert packed.padded_shape == (64, 96)
    assert torch.equal(packed.values.view(torch.int8), values)
    assert torch.equal(packed.metadata, metadata)


def test_int8_minus_128_is_the_largest_magnitude() -> None:
    x = torch.tensor([[-128, 127, 126, 1] * 8], dtype=torch.int8)
    assert pack_operand(x, layouts.PLAIN).unpack().tolist() == [[-128, 127, 0, 0] * 8]


@pytest.mark.parametrize(
    "members, indices",
    [
        ((5, 0, 0, 0), (0, 3)),
        ((0, 5, 0, 0), (1, 3)),
        ((0, 0, 5, 0), (2, 3)),
        ((0, 0, 0, 5), (2, 3)),
        ((0, 0, 0, 0), (2, 3)),
        ((-0.0, -0.0, -0.0, -0.0), (2, 3)),
        ((5, -0.0, 0, 0), (0, 3)),
        ((5, 0, 0, 6), (0, 3)),
        ((0, 5, 6, 0), (1, 2)),
        ((3, 3, 3, 3), (0, 1)),
        ((1, 2, 3, math.nan), (2, 3)),
        ((math.inf, 2, math.nan, 3), (0, 2)),
    ],
)
def test_indices_of_special_groups(members: tuple[float, ...], indices: tuple[int, int]) -> None:
    x = torch.tensor(members * 4, dtype=torch.float16).view(1, 16)
    packed = pack_operand(x, layouts.PLAIN)
    nibble = collect(packed.metadata, packed.layout, 16, 16)[0, 0].item()
    assert (nibble & 3, nibble >> 2) == indices
    kept = [members[i] if members[i] != 0 else 0.0 for i in indices]
    want = torch.tensor(kept, dtype=torch.float16)
    assert cases.same_bits(packed.values[0, :2], want)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 70),
    groups=st.integers(1, 20),
    row_bits=st.integers(0, 6),
    group_bits=st.integers(1, 4),
    order=st.sampled_from(["rows", "groups"]),
    dtype=st.sampled_from(cases.FLOAT_DTYPES),
)
def test_unpack_returns_the_pruned_matrix_in_any_layout(
    seed: int,
    rows: int,
    groups: int,
    row_bits: int,
    group_bits: int,
    order: str,
    dtype: torch.dtype,
) -> None:
    x = cases.adversarial(rows, 4 * groups, dtype, seed)
    layout = cases.random_layout(seed, row_bits, group_bits, order)
    dense = pack_operand(x, layout).unpack()
    pruned = oracle.prune_magnitude(x)
    assert cases.same_bits(dense, torch.where(pruned == 0, torch.zeros_like(pruned), pruned))


@pytest.mark.parametrize("view", ["transpose", "step", "offset"])
def test_strides_do_not_matter(view: str) -> None:
    base = cases.adversarial(96, 160, torch.bfloat16)
    x = {"transpose": base.t(), "step": base[::2, ::2], "offset": base[3:, 8:72]}[view]
    assert cases.same_bits(
        pack_operand(x, layouts.PLAIN).buffer, pack_operand(x.clone(), layouts.PLAIN).buffer
    )


def test_chunks_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    x = cases.adversarial(96, 64, torch.bfloat16)
    for method in ("magnitude", "random", "mvue"):
        whole = pack_operand(x, layouts.PLAIN, method=method, draws=DRAWS)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_CHUNK", 7 * 64)
            parts = pack_operand(x, layouts.PLAIN, method=method, draws=DRAWS)
        assert cases.same_bits(whole.buffer, parts.buffer)


def test_none_packs_what_is_2_of_4_and_refuses_the_rest() -> None:
    x = oracle.prune_magnitude(cases.adversarial(64, 64, torch.float16))
    packed = pack_operand(x, layouts.PLAIN, method="none")
    assert cases.same_bits(packed.buffer, pack_operand(x, layouts.PLAIN).buffer)
    x[40, 20:23] = 1
    with pytest.raises(ValueError, match="non-zeros in row 40, columns 20 to 23"):
        pack_operand(x, layouts.PLAIN, method="none")


def test_rescaled_multiplies_in_fp32_and_leaves_overflow_alone() -> None:
    x = cases.adversarial(32, 64, torch.bfloat16)
    ratio = torch.rand(1, 64) + 1
    got = pack_operand(x, layouts.PLAIN, method="rescaled_magnitude", ratio=ratio).unpack()
    kept = oracle.prune_magnitude(x)
    want = (kept.float() * ratio).bfloat16()
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    assert torch.equal(got.isnan(), kept.isnan())


def test_a_value_that_rescaling_rounds_to_zero_keeps_its_place() -> None:
    tiny = torch.finfo(torch.float16).smallest_normal / 1024
    x = torch.tensor([[tiny, -tiny, 0, 0] * 4], dtype=torch.float16)
    ratio = torch.tensor([[0.01, 1.0, 1.0, 1.0] * 4])
    packed = pack_operand(x, layouts.PLAIN, method="rescaled_magnitude", ratio=ratio)
    nibble = collect(packed.metadata, packed.layout, 16, 16)[0, 0].item()
    assert (nibble & 3, nibble >> 2) == (0, 1)
    assert packed.unpack()[0, :4].tolist() == [0, -tiny, 0, 0]


@pytest.mark.parametrize("method", ["magnitude", "rescaled_magnitude", "random", "mvue"])
def test_one_of_four_is_a_pair_whose_other_value_is_zero(method: str) -> None:
    x = cases.adversarial(64, 64, torch.float16).nan_to_num(1, 1, 1)
    ratio = torch.ones(1, 64)
    packed = pack_operand(x, layouts.PLAIN, method=method, n=1, ratio=ratio, draws=DRAWS)
    got, groups = packed.unpack().view(-1, 4), x.view(-1, 4)
    kept = got != 0
    assert (kept.sum(-1) <= 1).all()
    if method != "random":
        assert (kept.any(-1) == (groups != 0).any(-1)).all()
    if method in ("magnitude", "rescaled_magnitude"):
        first = groups.abs().float().argmax(-1, keepdim=True)
        assert torch.equal(got, torch.zeros_like(got).scatter(1, first, groups.gather(1, first)))
    if method == "mvue":
        total = groups.abs().float().sum(-1)
        want = total.half().clamp(max=torch.finfo(torch.half).max)
        assert torch.equal(got.abs().sum(-1).nan_to_num(posinf=65504), want)


@pytest.mark.parametrize(
    "group", [(1.0, -2.0, 3.0, 5.0), (1.0, 1.0, 1.0, 1.0), (0.5, 0.0, -8.0, 1.0), (0, 0, 3.0, 0)]
)
def test_mvue_is_unbiased_with_the_least_variance(group: tuple[float, ...]) -> None:
    draws = 40_000
    a = torch.tensor(group, dtype=torch.float64)
    x = a.to(torch.float16).repeat(draws // 4, 4)
    got = pack_operand(x, layouts.PLAIN, method="mvue", draws=DRAWS).unpack().double().view(-1, 4)
    size = a.abs()
    total, peak = size.sum(), size.max()
    if peak < total - peak:
        p, value = 2 * size / total, (total / 2).expand(4)
    else:
        top = torch.arange(4) == size.argmax()
        p = torch.where(top, 1.0, size / (total - peak).clamp(min=1e-30))
        value = torch.where(top, size, total - peak)
    variance = (p * (1 - p)).clamp(min=0) * value**2
    bound = 5 * (variance / draws).sqrt() + 2.0**-11 * value
    assert ((got.mean(0) - a).abs() <= bound).all()
    kept = got != 0
    assert (kept.sum(-1) <= 2).all()
    expected = (value * a.sign()).expand_as(got)[kept]
    assert torch.equal(got[kept], expected.to(torch.float16).double())


@pytest.mark.parametrize("method", ["random", "mvue"])
@pytest.mark.parametrize("dtype", [*cases.FLOAT_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2])
def test_overflowing_groups_become_nan_and_the_others_draw_as_ever(
    method: str, dtype: torch.dtype
) -> None:
    if method == "mvue" and dtype.itemsize == 1:
        pytest.skip("pack refuses mvue of 8-bit types")
    x = cases.adversarial(64, 64, torch.float16).float().clamp(-200, 200).to(dtype)
    x[::7, ::9] = torch.tensor(torch.inf).to(dtype)  # NaN where the type has no Inf
    x[::5, 3::11] = torch.tensor(-torch.inf).to(dtype)
    whole = x.float().view(64, 16, 4).isfinite().all(-1)
    tame = torch.where(x.float().isfinite(), x.float(), 3.0).to(dtype)

    def packed(operand: Tensor) -> Tensor:
        done = pack_operand(operand, layouts.PLAIN, method=method, draws=DRAWS)
        return done.unpack().view(64, 16, 4)

    got = packed(x)
    assert whole.any() and not whole.all()
    hit = got.float()[~whole]
    assert (hit.isnan().sum(-1) == 2).all() and (hit[~hit.isnan()] == 0).all()
    assert torch.equal(bits(got)[whole], bits(packed(tame))[whole])


def test_packed_is_one_allocation_and_says_what_it_holds() -> None:
    packed = pack_operand(torch.randn(64, 128).bfloat16(), layouts.PLAIN)
    rows, cols = packed.padded_shape
    assert packed.values.data_ptr() == packed.buffer.data_ptr()
    assert packed.metadata.data_ptr() == packed.buffer.data_ptr() + rows * cols
    assert packed.nbytes == rows * cols + layouts.PLAIN.nbytes(rows, cols)
    assert "64 x 128" in repr(packed)


def test_packed_refuses_what_does_not_hold_together() -> None:
    with pytest.raises(TypeError, match="dtype"):
        Packed24.empty((32, 32), torch.float32, layouts.PLAIN)
    with pytest.raises(ValueError, match="bytes for"):
        Packed24(torch.zeros(8, dtype=torch.uint8), (32, 32), torch.bfloat16, layouts.PLAIN)
    with pytest.raises(TypeError, match="uint8"):
        Packed24(torch.zeros(8), (32, 32), torch.bfloat16, layouts.PLAIN)
    for method in ("random", "mvue"):
        with pytest.raises(ValueError, match="draws"):
            pack_operand(torch.zeros(16, 16).half(), layouts.PLAIN, method=method)
    with pytest.raises(ValueError, match="ratio"):
        pack_operand(torch.zeros(16, 16).half(), layouts.PLAIN, method="rescaled_magnitude")
