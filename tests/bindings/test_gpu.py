"""The same problems on a GPU, through the library that `load()` finds."""

import threading
from collections.abc import Iterator

import pycusparselt as cslt
import pytest
import torch
from pycusparselt import AlgAttribute, ComputeType, CusparseLtError, DataType, Operation, Order

from tests.bindings.problem import Case, Problem, prune_24

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu() -> Iterator[cslt.Handle]:
    torch.zeros(1, device="cuda")  # the handle binds to the current context
    with cslt.Handle(cslt.load()) as handle:
        yield handle


@pytest.mark.parametrize("order_d", [Order.ROW, Order.COL])
@pytest.mark.parametrize("op_b", [Operation.N, Operation.T])
@pytest.mark.parametrize("m", [128, 256, 512])
def test_bf16(gpu: cslt.Handle, m: int, op_b: Operation, order_d: Order) -> None:
    case = Case(m=m, n=256, k=256, op_b=op_b, order_d=order_d)
    Problem(gpu, case, device="cuda").assert_right()


def test_int8(gpu: cslt.Handle) -> None:
    case = Case(
        m=128,
        n=128,
        k=128,
        dtype=DataType.R_8I,
        out_dtype=DataType.R_32I,
        order_b=Order.COL,
        compute_type=ComputeType.COMPUTE_32I,
    )
    Problem(gpu, case, device="cuda").assert_right()


def test_prune_and_check(gpu: cslt.Handle) -> None:
    problem = Problem(gpu, Case(m=128, n=128, k=128), device="cuda")
    dense = torch.randn(128, 128).bfloat16()
    memory, out = dense.cuda(), torch.empty(128, 128, dtype=torch.bfloat16, device="cuda")
    valid = torch.full((1,), 7, dtype=torch.int32, device="cuda")
    problem.matmul.prune_check(memory.data_ptr(), valid.data_ptr())
    assert valid.item() == 1
    problem.matmul.prune(memory.data_ptr(), out.data_ptr(), cslt.PruneAlg.STRIP)
    problem.matmul.prune_check(out.data_ptr(), valid.data_ptr())
    assert valid.item() == 0
    assert torch.equal(out.cpu(), prune_24(dense))


def test_every_algorithm_with_its_own_compress_is_right_or_refuses(gpu: cslt.Handle) -> None:
    case = Case(m=512, n=256, k=512)
    count = Problem(gpu, case, device="cuda").alg.get(AlgAttribute.CONFIG_MAX_ID)
    ran = []
    for alg_id in range(count):
        try:
            problem = Problem(gpu, case, alg_id, device="cuda")
            problem.run()
        except CusparseLtError:
            continue
        problem.assert_right()
        ran.append(alg_id)
    assert ran, "no algorithm ran"


def test_search_leaves_a_plan_that_still_runs(gpu: cslt.Handle) -> None:
    problem = Problem(gpu, Case(m=256, n=256, k=256), device="cuda")
    a, b, d = problem.pointers()
    problem.plan.search(1.0, a, b, 0.0, d, d)
    assert problem.alg.get(AlgAttribute.CONFIG_ID) >= 0
    problem.run()


def test_each_thread_with_its_own_handle(gpu: cslt.Handle) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            torch.zeros(1, device="cuda")
            with cslt.Handle(gpu.library) as handle:
                Problem(handle, Case(m=128, n=128, k=128), device="cuda").assert_right()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert not failures
