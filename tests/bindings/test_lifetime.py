"""Objects end once, children first, on every path out: close, with, collection, exit, threads."""

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pycusparselt as cslt
import pytest
from pycusparselt import AlgAttribute, CusparseLtError, DataType, PlanStateError, Status, lifetime
from pycusparselt.lifetime import Owned

from tests.bindings.problem import Case, Problem
from tests.emulator.build import build
from tests.emulator.control import Emulator

ROOT = Path(__file__).parents[2]


def test_closing_the_handle_closes_everything_children_first(
    emulator: Emulator, lib: cslt.Library
) -> None:
    handle = cslt.Handle(lib)
    problem = Problem(handle, Case())
    assert emulator.live() == {"handle": 1, "mat": 3, "alg": 1, "plan": 1}
    handle.close()
    assert set(emulator.live().values()) == {0}
    assert emulator.order_violations() == 0
    assert problem.plan.closed and problem.alg.closed and problem.matmul.closed


def test_the_emulator_sees_a_wrong_order(lib: cslt.Library, emulator: Emulator) -> None:
    handle = cslt.Handle(lib)
    problem = Problem(handle, Case())
    assert emulator.cdll.cusparseLtDestroy(_pointer(handle)) == Status.SUCCESS
    assert emulator.order_violations() == 1
    with pytest.raises(CusparseLtError, match="INVALID_VALUE"):
        handle.close()
    assert problem.plan.closed
    emulator.reset()


def _pointer(owner: Owned) -> object:
    return owner._resource.storage.pointer


def test_close_is_idempotent_and_use_after_it_raises(handle: cslt.Handle) -> None:
    problem = Problem(handle, Case())
    plan = problem.plan
    for _ in range(2):
        plan.close()
    assert plan.closed
    a, b, d = problem.pointers()
    uses = [
        lambda: plan.matmul(1.0, a, b, 0.0, d, d),
        lambda: plan.search(1.0, a, b, 0.0, d, d),
        lambda: plan.compress(a, b, d),
        lambda: plan.compressed_size(),
        lambda: plan.workspace_size,
        lambda: plan.address,
        lambda: plan.__enter__(),
    ]
    for use in uses:
        with pytest.raises(PlanStateError, match="MatmulPlan must be open"):
            use()


def test_a_closed_descriptor_closes_its_plan(handle: cslt.Handle) -> None:
    problem = Problem(handle, Case())
    problem.matmul.b.close()
    a, b, d = problem.pointers()
    with pytest.raises(PlanStateError):
        problem.plan.matmul(1.0, a, b, 0.0, d, d)
    with pytest.raises(PlanStateError):
        problem.alg.get(AlgAttribute.CONFIG_ID)
    with pytest.raises(PlanStateError):
        cslt.MatmulPlan(handle, problem.matmul, problem.alg)
    assert not problem.matmul.a.closed


def test_a_plan_keeps_its_descriptors_alive(emulator: Emulator, handle: cslt.Handle) -> None:
    problem = Problem(handle, Case())
    plan, expected, bound = problem.plan, problem.expected(), problem.bound()
    a, b, d = problem.pointers()
    memory = problem.compressed, problem.b_memory, problem.d_memory
    del problem
    gc.collect()
    assert emulator.live()["mat"] == 3
    plan.matmul(1.0, a, b, 0.0, d, d)
    assert ((memory[2].double() - expected).abs() <= bound).all()


def test_collection_ends_objects(emulator: Emulator, handle: cslt.Handle) -> None:
    problem = Problem(handle, Case())
    seen = weakref.ref(problem.plan)
    del problem
    gc.collect()
    assert seen() is None
    assert emulator.live() == {"handle": 1, "mat": 0, "alg": 0, "plan": 0}


def test_a_cycle_ends_in_order(emulator: Emulator, lib: cslt.Library) -> None:
    problem = Problem(cslt.Handle(lib), Case())
    problem.plan.cycle = problem  # type: ignore[attr-defined]
    problem.handle.cycle = problem  # type: ignore[attr-defined]
    del problem
    gc.collect()
    assert set(emulator.live().values()) == {0}
    assert emulator.order_violations() == 0


def test_with_blocks_end_on_an_exception(emulator: Emulator, lib: cslt.Library) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        cslt.Handle(lib) as handle,
        cslt.MatDescriptor.dense(handle, 16, 16, dtype=DataType.R_16F),
    ):
        assert emulator.live()["mat"] == 1
        raise ZeroDivisionError
    assert set(emulator.live().values()) == {0}


CONSTRUCTORS = [
    ("cusparseLtInit", 0),
    ("cusparseLtStructuredDescriptorInit", 0),
    ("cusparseLtDenseDescriptorInit", 0),
    ("cusparseLtDenseDescriptorInit", 1),
    ("cusparseLtMatmulDescriptorInit", 0),
    ("cusparseLtMatmulAlgSelectionInit", 0),
    ("cusparseLtMatmulPlanInit", 0),
    ("cusparseLtSpMMACompressedSize", 0),
    ("cusparseLtSpMMACompress", 0),
]


@pytest.mark.parametrize("function, after", CONSTRUCTORS)
def test_a_construction_that_fails_half_way_leaks_nothing(
    emulator: Emulator, lib: cslt.Library, function: str, after: int
) -> None:
    emulator.fail(function, Status.ALLOC_FAILED, after=after)
    with pytest.raises(CusparseLtError, match=f"{function} failed"):
        Problem(cslt.Handle(lib), Case())
    gc.collect()
    assert set(emulator.live().values()) == {0}


def test_a_failing_destroy_raises_once_and_ends_the_rest(
    emulator: Emulator, lib: cslt.Library
) -> None:
    handle = cslt.Handle(lib)
    problem = Problem(handle, Case())
    emulator.fail("cusparseLtMatmulPlanDestroy", Status.EXECUTION_FAILED)
    with pytest.raises(CusparseLtError, match="MatmulPlanDestroy") as caught:
        handle.close()
    assert caught.value.status == Status.EXECUTION_FAILED
    assert handle.closed and problem.plan.closed
    assert emulator.live() == {"handle": 0, "mat": 0, "alg": 0, "plan": 1}
    assert emulator.cdll.cusparseLtMatmulPlanDestroy(_pointer(problem.plan)) == Status.SUCCESS
    emulator.reset()


def test_threads_with_their_own_handles(emulator: Emulator, lib: cslt.Library) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                with cslt.Handle(lib) as handle:
                    Problem(handle, Case(m=32, n=16, k=32)).assert_right()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert set(emulator.live().values()) == {0}


def test_a_handle_on_another_thread_is_refused(emulator: Emulator, handle: cslt.Handle) -> None:
    seen: list[object] = []

    def work() -> None:
        try:
            handle.version()
        except CusparseLtError as error:
            seen.append(error.status)
        emulator.thread_check(False)
        seen.append(handle.version())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [Status.INTERNAL_ERROR, 801]


EXIT = """
import atexit, sys
# Registered first, so run last: after the hook of weakref.finalize.
atexit.register(lambda: print(emulator.live(), emulator.order_violations()))
import pycusparselt as cslt
from tests.bindings.problem import Case, Problem
from tests.emulator.control import Emulator
emulator = Emulator(sys.argv[1])
problem = Problem(cslt.Handle(cslt.load(sys.argv[1])), Case())
problem.assert_right()
how = sys.argv[2]
if how == "exception":
    raise SystemExit(3)
"""


@pytest.mark.parametrize("how", ["end", "exception"])
def test_interpreter_exit_without_cleaning_up(how: str) -> None:
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'bindings'}")
    finished = subprocess.run(
        [sys.executable, "-c", EXIT, str(build()), how],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert finished.returncode == (3 if how == "exception" else 0), finished.stderr
    assert finished.stderr == ""
    assert finished.stdout.strip() == "{'handle': 0, 'mat': 0, 'alg': 0, 'plan': 0} 0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_leaves_the_parents_objects_alone(
    emulator: Emulator, lib: cslt.Library
) -> None:
    handle = cslt.Handle(lib)
    before = emulator.calls("cusparseLtDestroy")
    child = os.fork()
    if child == 0:
        handle.close()
        os._exit(emulator.calls("cusparseLtDestroy") - before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    handle.close()
    assert emulator.calls("cusparseLtDestroy") == before + 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_during_a_release_does_not_block_the_child(lib: cslt.Library) -> None:
    handle = cslt.Handle(lib)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lifetime._lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends the child where it would wait for ever
        handle.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    done.set()
    thread.join()
    handle.close()


def test_structs_fit_and_stay_where_they_are(emulator: Emulator, lib: cslt.Library) -> None:
    for version in ((0, 6, 2), (0, 7, 1), (0, 8, 1), (0, 10, 0)):
        emulator.version(*version)
        with cslt.Handle(lib) as handle:
            problem = Problem(handle, Case())
            assert problem.plan.address % 16 == 0
            problem.assert_right()
