"""The emulator refuses what the library's documentation refuses, and misbehaves when told to."""

from collections.abc import Callable

import pycusparselt as cslt
import pytest
import torch
from pycusparselt import (
    AlgAttribute,
    ComputeType,
    CusparseLtError,
    DataType,
    MatDescAttribute,
    MatDescriptor,
    MatmulDescriptor,
    Operation,
    Order,
    Status,
)
from pycusparselt import cusparselt as capi
from pycusparselt.abi import OpaqueStorage

from tests.bindings.problem import Case, Problem
from tests.emulator.control import Bad, Emulator

Make = Callable[[cslt.Handle], object]
R_16F, R_8I, R_32F = DataType.R_16F, DataType.R_8I, DataType.R_32F

REFUSED_MATRICES: dict[str, tuple[Status, Make]] = {
    "structured rows": (
        Status.NOT_SUPPORTED,
        lambda h: MatDescriptor.structured(h, 24, 32, dtype=R_16F),
    ),
    "structured cols": (
        Status.NOT_SUPPORTED,
        lambda h: MatDescriptor.structured(h, 32, 24, dtype=R_16F),
    ),
    "structured int8": (
        Status.NOT_SUPPORTED,
        lambda h: MatDescriptor.structured(h, 32, 48, dtype=R_8I),
    ),
    "dense fp16": (Status.NOT_SUPPORTED, lambda h: MatDescriptor.dense(h, 12, 16, dtype=R_16F)),
    "dense int8": (Status.NOT_SUPPORTED, lambda h: MatDescriptor.dense(h, 16, 24, dtype=R_8I)),
    "dense fp32": (Status.NOT_SUPPORTED, lambda h: MatDescriptor.dense(h, 6, 8, dtype=R_32F)),
    "ld": (Status.NOT_SUPPORTED, lambda h: MatDescriptor.dense(h, 16, 16, ld=20, dtype=R_16F)),
    "short ld": (
        Status.INVALID_VALUE,
        lambda h: MatDescriptor.dense(h, 16, 32, ld=16, dtype=R_16F),
    ),
    "no rows": (Status.INVALID_VALUE, lambda h: MatDescriptor.dense(h, 0, 16, dtype=R_16F)),
    "negative": (Status.INVALID_VALUE, lambda h: MatDescriptor.dense(h, -16, 16, dtype=R_16F)),
    "alignment 8": (
        Status.NOT_SUPPORTED,
        lambda h: MatDescriptor.dense(h, 16, 16, dtype=R_16F, alignment=8),
    ),
    "alignment 0": (
        Status.NOT_SUPPORTED,
        lambda h: MatDescriptor.dense(h, 16, 16, dtype=R_16F, alignment=0),
    ),
    "too large": (
        Status.NOT_SUPPORTED,
        lambda h: MatDescriptor.dense(h, 2**20, 2**20, dtype=R_16F),
    ),
    "structured int32": (
        Status.NOT_SUPPORTED,
        lambda h: MatDescriptor.structured(h, 32, 32, dtype=DataType.R_32I),
    ),
    "fp4": (
        Status.NOT_SUPPORTED,
        lambda h: MatDescriptor.structured(h, 32, 64, dtype=DataType.R_4F_E2M1),
    ),
}


@pytest.mark.parametrize("name", REFUSED_MATRICES)
def test_refused_matrices(handle: cslt.Handle, name: str) -> None:
    status, make = REFUSED_MATRICES[name]
    with pytest.raises(CusparseLtError) as caught:
        make(handle)
    assert caught.value.status == status


def _four(handle: cslt.Handle) -> dict[str, MatDescriptor]:
    return {
        "a": MatDescriptor.structured(handle, 32, 64, dtype=R_16F),
        "b": MatDescriptor.dense(handle, 64, 48, dtype=R_16F),
        "c": MatDescriptor.dense(handle, 32, 48, dtype=R_16F),
        "d": MatDescriptor.dense(handle, 32, 48, dtype=R_16F),
    }


def _changed(**change: Make) -> Callable[[cslt.Handle], MatmulDescriptor]:
    def make(handle: cslt.Handle) -> MatmulDescriptor:
        four: dict[str, object] = dict(_four(handle))
        four.update({name: build(handle) for name, build in change.items()})
        return MatmulDescriptor(handle, **four)  # type: ignore[arg-type]

    return make


def _batched(matrix: MatDescriptor) -> MatDescriptor:
    matrix.set(MatDescAttribute.NUM_BATCHES, 2)
    return matrix


def _with(**options: object) -> Callable[[cslt.Handle], MatmulDescriptor]:
    return lambda h: MatmulDescriptor(h, **_four(h), **options)  # type: ignore[arg-type]


REFUSED_PROBLEMS: dict[str, tuple[Status, Make]] = {
    "two structured": (
        Status.INVALID_VALUE,
        _changed(b=lambda h: MatDescriptor.structured(h, 64, 48, dtype=R_16F)),
    ),
    "none structured": (
        Status.INVALID_VALUE,
        _changed(a=lambda h: MatDescriptor.dense(h, 32, 64, dtype=R_16F)),
    ),
    "structured output": (
        Status.INVALID_VALUE,
        _changed(c=lambda h: MatDescriptor.structured(h, 32, 48, dtype=R_16F)),
    ),
    "inner dimension": (
        Status.INVALID_VALUE,
        _changed(b=lambda h: MatDescriptor.dense(h, 72, 48, dtype=R_16F)),
    ),
    "transposed a": (Status.INVALID_VALUE, _with(op_a=Operation.T)),
    "transposed b": (Status.INVALID_VALUE, _with(op_b=Operation.T)),
    "output shape": (
        Status.INVALID_VALUE,
        _changed(d=lambda h: MatDescriptor.dense(h, 32, 56, dtype=R_16F)),
    ),
    "output order": (
        Status.NOT_SUPPORTED,
        _changed(d=lambda h: MatDescriptor.dense(h, 32, 48, ld=48, dtype=R_16F, order=Order.COL)),
    ),
    "mixed types": (
        Status.NOT_SUPPORTED,
        _changed(b=lambda h: MatDescriptor.dense(h, 64, 48, dtype=DataType.R_16BF)),
    ),
    "compute int": (Status.NOT_SUPPORTED, _with(compute_type=ComputeType.COMPUTE_32I)),
    "batches": (
        Status.INVALID_VALUE,
        _changed(b=lambda h: _batched(MatDescriptor.dense(h, 64, 48, dtype=R_16F))),
    ),
}


@pytest.mark.parametrize("name", REFUSED_PROBLEMS)
def test_refused_problems(handle: cslt.Handle, name: str) -> None:
    status, make = REFUSED_PROBLEMS[name]
    with pytest.raises(CusparseLtError) as caught:
        make(handle)
    assert caught.value.status == status


@pytest.mark.parametrize("order_a, order_b", [(Order.COL, Order.COL), (Order.ROW, Order.ROW)])
def test_int8_only_contiguous_along_k(handle: cslt.Handle, order_a: Order, order_b: Order) -> None:
    case = Case(dtype=R_8I, order_a=order_a, order_b=order_b, compute_type=ComputeType.COMPUTE_32I)
    with pytest.raises(CusparseLtError, match="NOT_SUPPORTED"):
        Problem(handle, case)


def test_half_accumulation_is_refused_with_the_algorithm_and_runs_on_sm90(
    emulator: Emulator, handle: cslt.Handle
) -> None:
    matmul = MatmulDescriptor(handle, **_four(handle), compute_type=ComputeType.COMPUTE_16F)
    with pytest.raises(CusparseLtError, match="cusparseLtMatmulAlgSelectionInit.*NOT_SUPPORTED"):
        cslt.AlgSelection(handle, matmul)
    emulator.arch(90)
    cslt.AlgSelection(handle, matmul)


def test_fp8_needs_sm89(handle: cslt.Handle) -> None:
    case = Case(dtype=DataType.R_8F_E4M3, out_dtype=DataType.R_16BF, order_b=Order.COL)
    with pytest.raises(CusparseLtError, match="NOT_SUPPORTED"):
        Problem(handle, case)


def test_null_and_misaligned_pointers(handle: cslt.Handle) -> None:
    problem = Problem(handle, Case())
    a, b, d = problem.pointers()
    good = [a, b, d, d]
    for position in range(4):
        for bad in (0, good[position] + 8):
            left, right, c, out = [*good[:position], bad, *good[position + 1 :]]
            with pytest.raises(CusparseLtError, match="INVALID_VALUE"):
                problem.plan.matmul(1.0, left, right, 0.0, c, out)
    for bad in (0, a + 4):
        with pytest.raises(CusparseLtError, match="INVALID_VALUE"):
            problem.plan.compress(bad, a, problem.scratch.data_ptr())
    problem.plan.compress(problem.a_memory.data_ptr(), a, 0)  # no scratch: taken, as on sm86


def test_use_before_init_after_destroy_and_after_a_move(lib: cslt.Library) -> None:
    number = torch.zeros(1, dtype=torch.int32)
    storage = OpaqueStorage()
    for ready in (False, True):
        if ready:
            capi.init(lib, storage.address)
            capi.get_version(lib, storage.address, number.data_ptr())
            capi.destroy(lib, storage.address)
        with pytest.raises(CusparseLtError, match="INVALID_VALUE"):
            capi.get_version(lib, storage.address, number.data_ptr())
    moved = OpaqueStorage()
    capi.init(lib, storage.address)
    torch_view = [torch.frombuffer(s._memory, dtype=torch.uint8) for s in (storage, moved)]
    offset = [s.address - v.data_ptr() for s, v in zip((storage, moved), torch_view, strict=True)]
    torch_view[1][offset[1] : offset[1] + 512] = torch_view[0][offset[0] : offset[0] + 512]
    with pytest.raises(CusparseLtError, match="INVALID_VALUE"):
        capi.get_version(lib, moved.address, number.data_ptr())
    capi.destroy(lib, storage.address)


def test_a_plan_of_a_destroyed_descriptor_is_refused(
    emulator: Emulator, lib: cslt.Library, handle: cslt.Handle
) -> None:
    problem = Problem(handle, Case())
    a, b, d = problem.pointers()
    capi.mat_descriptor_destroy(lib, problem.matmul.b.address)
    with pytest.raises(CusparseLtError, match="INVALID_VALUE"):
        problem.plan.matmul(1.0, a, b, 0.0, d, d)
    assert emulator.order_violations() == 1
    with pytest.raises(CusparseLtError):
        handle.close()
    emulator.reset()


def test_unpruned_input_is_counted(emulator: Emulator, handle: cslt.Handle) -> None:
    problem = Problem(handle, Case())
    assert emulator.unpruned_groups() == 0
    dense = torch.ones_like(problem.a_memory)
    compressed, scratch = problem.compressed.data_ptr(), problem.scratch.data_ptr()
    problem.plan.compress(dense.data_ptr(), compressed, scratch)
    assert emulator.unpruned_groups() == 64 * 64 // 4


def test_wrong_from_256_rows(emulator: Emulator, handle: cslt.Handle) -> None:
    emulator.bad_algorithm(2, Bad.WRONG_FROM_256_ROWS)
    Problem(handle, Case(m=128), alg_id=2).assert_right()
    Problem(handle, Case(m=256), alg_id=1).assert_right()
    with pytest.raises(AssertionError, match="beyond the bound"):
        Problem(handle, Case(m=256), alg_id=2).assert_right()


@pytest.mark.parametrize("kind", [Bad.ALWAYS_WRONG, Bad.GIVES_NAN])
def test_always_bad(emulator: Emulator, handle: cslt.Handle, kind: Bad) -> None:
    emulator.bad_algorithm(0, kind)
    problem = Problem(handle, Case())
    error = (problem.run().double() - problem.expected()).abs()
    assert not (error <= problem.bound()).all()


def test_non_deterministic(emulator: Emulator, handle: cslt.Handle) -> None:
    emulator.bad_algorithm(0, Bad.NON_DETERMINISTIC)
    problem = Problem(handle, Case())
    runs = [problem.run().clone() for _ in range(4)]
    right = [bool(((r.double() - problem.expected()).abs() <= problem.bound()).all()) for r in runs]
    assert right == [True, False, True, False]
    assert not torch.equal(runs[1], runs[3])


@pytest.mark.parametrize(
    "kind, function, status",
    [
        (Bad.NOT_SUPPORTED_AT_PLAN, "cusparseLtMatmulPlanInit", Status.NOT_SUPPORTED),
        (Bad.NOT_SUPPORTED_AT_MATMUL, "cusparseLtMatmul", Status.NOT_SUPPORTED),
        (Bad.FAILS_AT_MATMUL, "cusparseLtMatmul", Status.EXECUTION_FAILED),
        (Bad.HANGS_AT_PLAN, "cusparseLtMatmulPlanInit", Status.INTERNAL_ERROR),
    ],
)
def test_algorithms_that_refuse(
    emulator: Emulator, handle: cslt.Handle, kind: Bad, function: str, status: Status
) -> None:
    emulator.bad_algorithm(1, kind)
    with pytest.raises(CusparseLtError) as caught:
        Problem(handle, Case(), alg_id=1).run()
    assert (caught.value.function, caught.value.status) == (function, status)
    assert emulator.hangs() == (kind == Bad.HANGS_AT_PLAN)


def test_split_k_rules_of_sm80_and_sm90(emulator: Emulator, handle: cslt.Handle) -> None:
    few, many = Problem(handle, Case()), Problem(handle, Case(m=416))
    few.alg.set(AlgAttribute.SPLIT_K, 4)
    few.alg.set(AlgAttribute.SPLIT_K_BUFFERS, 3)
    for bad in (-1, 0, 65):
        with pytest.raises(CusparseLtError, match="INVALID_VALUE"):
            few.alg.set(AlgAttribute.SPLIT_K, bad)
    emulator.arch(90)
    assert few.alg.get(AlgAttribute.CONFIG_MAX_ID) == 21
    with pytest.raises(CusparseLtError, match="INVALID_VALUE"):
        few.alg.set(AlgAttribute.SPLIT_K, 4)
    for problem in (few, many):
        problem.alg.set(AlgAttribute.SPLIT_K, -1)
    with pytest.raises(CusparseLtError, match="INTERNAL_ERROR"):
        cslt.MatmulPlan(handle, few.matmul, few.alg)
    assert emulator.hangs() == 1
    cslt.MatmulPlan(handle, many.matmul, many.alg)
    assert emulator.hangs() == 1


def test_each_algorithm_may_have_its_own_layout(emulator: Emulator, handle: cslt.Handle) -> None:
    emulator.layout("plain", alg_id=3)
    case = Case(m=256, k=128)
    torch.manual_seed(1)
    blocked = Problem(handle, case, alg_id=0)
    torch.manual_seed(1)
    plain = Problem(handle, case, alg_id=3)
    blocked.assert_right()
    plain.assert_right()
    assert torch.equal(blocked.a, plain.a)
    assert not torch.equal(blocked.compressed, plain.compressed)
    deprecated = torch.zeros_like(plain.compressed)
    memory, scratch = plain.a_memory.data_ptr(), plain.scratch.data_ptr()
    plain.matmul.a.compress(memory, deprecated.data_ptr(), scratch)
    assert torch.equal(deprecated, blocked.compressed)


def test_a_layout_per_plan(emulator: Emulator, handle: cslt.Handle) -> None:
    emulator.layout_per_plan()
    packed = []
    for alg_id in (0, 1):
        torch.manual_seed(1)
        problem = Problem(handle, Case(), alg_id=alg_id)
        problem.assert_right()
        packed.append(problem.compressed)
    assert not torch.equal(packed[0], packed[1])


def test_wrong_controls_are_refused(emulator: Emulator) -> None:
    with pytest.raises(ValueError, match="layout"):
        emulator.layout("sm70")
    with pytest.raises(ValueError, match="bad_algorithm"):
        emulator.bad_algorithm(-1, Bad.GIVES_NAN)
    with pytest.raises(ValueError, match="fail"):
        emulator.fail("cusparseLtNothing", 3)
