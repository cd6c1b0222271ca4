"""Whatever the arguments, a call returns or raises; the interpreter never dies."""

from __future__ import annotations

import contextlib
import ctypes

import pycusparselt as cslt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycusparselt import ComputeType, CusparseLtError, DataType, Operation, Order
from pycusparselt import cusparselt as capi

from tests.bindings.problem import Case, Problem
from tests.emulator.control import Emulator

FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
DIMS = st.one_of(
    st.sampled_from([8, 16, 24, 32, 48, 64, 128]),
    st.integers(-(2**70), 2**70),
)
SMALL = st.sampled_from([16, 32, 64])
DTYPES = st.sampled_from(list(DataType))
ORDERS = st.sampled_from(list(Order))
OPS = st.sampled_from(list(Operation))
REFUSALS = (CusparseLtError, ValueError, TypeError, ctypes.ArgumentError)


@FUZZ
@given(
    structured=st.booleans(),
    rows=DIMS,
    cols=DIMS,
    ld=st.none() | DIMS,
    alignment=st.integers(-1, 2**33),
    dtype=DTYPES,
    order=ORDERS,
)
def test_matrices(
    handle: cslt.Handle,
    structured: bool,
    rows: int,
    cols: int,
    ld: int | None,
    alignment: int,
    dtype: DataType,
    order: Order,
) -> None:
    make = cslt.MatDescriptor.structured if structured else cslt.MatDescriptor.dense
    with contextlib.suppress(*REFUSALS):
        matrix = make(handle, rows, cols, ld=ld, dtype=dtype, order=order, alignment=alignment)
        assert (matrix.rows, matrix.cols) == (rows, cols)
        assert matrix.rows > 0 and matrix.cols > 0
        matrix.close()


@FUZZ
@given(
    dims=st.tuples(SMALL, SMALL, SMALL),
    dtype=DTYPES,
    out_dtype=DTYPES,
    ops=st.tuples(OPS, OPS),
    orders=st.tuples(ORDERS, ORDERS, ORDERS),
    sparse_is_a=st.booleans(),
    compute_type=st.sampled_from(list(ComputeType)),
    arch=st.sampled_from([80, 89, 90]),
)
def test_problems_compute_right_or_raise(
    emulator: Emulator,
    handle: cslt.Handle,
    dims: tuple[int, int, int],
    dtype: DataType,
    out_dtype: DataType,
    ops: tuple[Operation, Operation],
    orders: tuple[Order, Order, Order],
    sparse_is_a: bool,
    compute_type: ComputeType,
    arch: int,
) -> None:
    if DataType.R_4F_E2M1 in (dtype, out_dtype) or dtype == DataType.R_32I:
        return  # torch has no host arithmetic to draw these from
    emulator.arch(arch)
    m, n, k = dims
    case = Case(
        m=m,
        n=n,
        k=k,
        dtype=dtype,
        out_dtype=out_dtype,
        op_a=ops[0],
        op_b=ops[1],
        order_a=orders[0],
        order_b=orders[1],
        order_d=orders[2],
        sparse_is_a=sparse_is_a,
        compute_type=compute_type,
    )
    try:
        problem = Problem(handle, case)
    except CusparseLtError:
        return
    if out_dtype == DataType.R_8I:
        exact = problem.expected().clamp(-128, 127)
        assert torch.equal(problem.run().double(), exact)
    else:
        problem.assert_right()


@pytest.fixture
def problem(handle: cslt.Handle) -> Problem:
    return Problem(handle, Case())


@FUZZ
@given(
    offsets=st.lists(st.sampled_from([None, 0, 0, 1, 4, 8, 16]), min_size=5, max_size=5),
    alpha=st.floats(allow_nan=True, width=32),
    stream=st.integers(-1, 2**64),
)
def test_pointers(problem: Problem, offsets: list[int | None], alpha: float, stream: int) -> None:
    memory = torch.zeros(4 * problem.compressed.numel() + 64 * 1024, dtype=torch.uint8)
    room = memory.data_ptr()
    picked = [0 if off is None else room + off for off in offsets]
    with contextlib.suppress(*REFUSALS):
        problem.plan.matmul(alpha, *picked[:2], 0.0, *picked[2:4], 0, stream)
    with contextlib.suppress(*REFUSALS):
        problem.plan.compress(picked[0], *picked[1:3], stream)
    with contextlib.suppress(*REFUSALS):
        problem.matmul.prune(picked[0], picked[1], cslt.PruneAlg.STRIP, stream)
    with contextlib.suppress(*REFUSALS):
        problem.matmul.prune_check(picked[0], picked[4], stream)
    assert not problem.plan.closed


@FUZZ
@given(
    attribute=st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 21),
    size=st.integers(0, 16) | st.just(2**64 - 1),
    null=st.booleans(),
    value=st.integers(-(2**63), 2**63 - 1),
)
def test_attributes(problem: Problem, attribute: int, size: int, null: bool, value: int) -> None:
    room = (ctypes.c_int64 * 4)(value)
    data = 0 if null else ctypes.addressof(room)
    handle, lib = problem.handle.address, problem.plan.library
    owners = {
        problem.matmul.a: (capi.mat_desc_get_attribute, capi.mat_desc_set_attribute),
        problem.matmul: (capi.matmul_desc_get_attribute, capi.matmul_desc_set_attribute),
        problem.alg: (capi.matmul_alg_get_attribute, capi.matmul_alg_set_attribute),
    }
    for owner, functions in owners.items():
        for function in functions:
            with contextlib.suppress(*REFUSALS):
                function(lib, handle, owner.address, attribute, data, size)
    assert room[3] == 0


@FUZZ
@given(
    value=st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.none(), st.text(max_size=3)),
    which=st.sampled_from(list(cslt.MatmulDescAttribute)),
)
def test_attribute_values(problem: Problem, value: object, which: cslt.MatmulDescAttribute) -> None:
    with contextlib.suppress(*REFUSALS):
        problem.matmul.set(which, value)  # type: ignore[arg-type]
        problem.matmul.get(which)
