"""The bound holds for what computes right, in any order, and not for the smallest real fault."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdgp_cusparselt.equivalence import (
    compare,
    compare_product,
    exact_bound,
    product_bound,
    reference_dtype,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def operands(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 16, 1000])
def test_a_right_product_is_within_its_bound(dtype: torch.dtype, k: int) -> None:
    a, b = operands(33, k, 17, dtype)
    assert compare_product(a @ b, a, b) is None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([16, 64, 512]), st.sampled_from(DTYPES[:2]))
def test_any_order_of_accumulation_is_within_the_bound(
    seed: int, k: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(4, k, generator=generator).to(dtype)
    b = torch.randn(k, 3, generator=generator).to(dtype)
    order = torch.randperm(k, generator=generator)
    total = torch.zeros(4, 3)
    for i in order.tolist():
        total = total + a[:, i : i + 1].float() * b[i : i + 1].float()
    assert compare_product(total.to(dtype), a, b) is None


def test_truncating_every_sum_is_within_the_bound() -> None:
    """Tensor cores truncate the aligned products; all errors of one sign are the worst case."""
    k = 512
    a, b = torch.rand(8, k).bfloat16(), torch.rand(k, 8).bfloat16()
    total = torch.zeros(8, 8, dtype=torch.float64)
    for i in range(k):
        total += a[:, i : i + 1].double() * b[i : i + 1].double()
        exponent = torch.floor(torch.log2(total.clamp_min(1e-30)))
        unit = torch.exp2(exponent - 23)
        total = torch.floor(total / unit) * unit
    size = a.double() @ b.double()
    bound = product_bound(size, size, k, torch.float32)
    assert compare(total.float(), size, bound) is None
    assert ((total - size).abs() > bound / 100).any(), "the bound is not idle"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_missing_product_is_found_and_named(dtype: torch.dtype) -> None:
    a, b = operands(40, 64, 24, dtype)
    result = a @ b
    result[7, 5] = a[7, :-4] @ b[:-4, 5]
    found = compare_product(result, a, b)
    assert found is not None and found.index == (7, 5) and found.share == 1 / 960
    assert found.got == result[7, 5].item()
    assert found.expected == pytest.approx((a[7].double() @ b[:, 5].double()).item(), rel=1e-5)
    assert abs(found.got - found.expected) > found.bound > 0
    text = found.describe()
    assert "0.10% of the elements are out of bound; worst (7, 5): got" in text


def test_the_worst_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdgp_cusparselt.equivalence._CHUNK", 64)
    a, b = operands(40, 16, 8, torch.bfloat16)
    result = (a @ b).clone()
    for row, error in ((3, 1.0), (20, 100.0), (39, 2.0)):
        result[row, 2] += error
    found = compare_product(result, a, b)
    assert found is not None and found.index == (20, 2)
    assert found.share == pytest.approx(3 / 320)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_mismatches_unless_both_have_them(wrong: float) -> None:
    reference = torch.ones(3, 4)
    bound = torch.full((3, 4), 0.5)
    result = reference.clone()
    result[1, 2] = wrong
    found = compare(result, reference, bound)
    assert found is not None and found.index == (1, 2) and found.share == 1 / 12
    back = compare(reference, result.float(), bound)
    assert back is not None and back.index == (1, 2)
    assert compare(result, result.clone(), bound) is None
    assert compare(result, torch.full_like(result, -wrong), bound) is not None


def test_an_overflow_of_the_dtype_is_right() -> None:
    a = torch.full((1, 16), 200.0).half()
    b = torch.full((16, 1), 300.0).half()
    assert torch.isinf((a @ b).item() * torch.ones(1)).all()
    assert compare_product(a @ b, a, b) is None
    assert compare_product(-(a @ b), a, b) is not None


def test_an_overflowed_gradient_must_stay_visible() -> None:
    a, b = operands(6, 16, 8, torch.float16)
    a[2, 3], a[4, 1] = math.inf, math.nan
    result = (a.float() @ b.float()).half()
    assert compare_product(result, a, b) is None
    hidden = result.clone()
    hidden[2] = 0.0
    found = compare_product(hidden, a, b)
    assert found is not None and found.index[0] == 2


def test_an_inf_of_the_dense_operand_is_not_compared() -> None:
    """A sparse product skips the zeros that a dense one multiplies with Inf."""
    a, b = operands(6, 16, 8, torch.float16)
    a[:, 2:] = 0
    b[9, 5] = math.inf
    sparse = a[:, :2].float() @ b[:2].float()
    assert compare_product(sparse.half(), a, b) is None
    sparse[1, 4] += 1
    assert compare_product(sparse.half(), a, b) is not None


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_integers_leave_no_room(dtype: torch.dtype) -> None:
    a = torch.randint(-2, 3, (32, 256)).to(dtype)
    b = torch.randint(-1, 2, (256, 16)).to(dtype)
    result = (a.double() @ b.double()).to(dtype)
    assert compare_product(result, a, b, exact=True) is None
    result[5, 6] += 1
    found = compare_product(result, a, b, exact=True)
    assert found is not None and found.index == (5, 6) and found.bound == 0
    large = torch.tensor([257.0, 4099.0])
    assert (exact_bound(large, torch.bfloat16) > 0).all()
    assert exact_bound(large, torch.float16).tolist() == [0.0, 4099.0 * 2**-10]


def test_shapes_and_empty_products() -> None:
    empty = torch.empty(0, 4)
    assert compare(empty, empty, empty) is None
    assert compare_product(empty, torch.empty(0, 8), torch.empty(8, 4)) is None
    with pytest.raises(ValueError, match="must be of one shape"):
        compare(torch.ones(2), torch.ones(3), torch.ones(3))


def test_references_are_wide_enough() -> None:
    assert reference_dtype(torch.bfloat16) == torch.float32
    assert reference_dtype(torch.float32) == torch.float64
