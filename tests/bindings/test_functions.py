"""Every C function is called here: on success, and on every error status that it may return."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import pycusparselt as cslt
import pytest
import torch
from pycusparselt import CusparseLtError, DataType, Operation, Order, PruneAlg, Status
from pycusparselt import cusparselt as capi
from pycusparselt.abi import OpaqueStorage
from pycusparselt.cusparselt import FUNCTIONS

from tests.bindings.problem import Case, Problem, prune_24
from tests.emulator.build import build
from tests.emulator.control import Emulator

ERRORS = [status for status in Status if status != Status.SUCCESS]


@dataclass
class Scene:
    """Everything that any one call needs."""

    lib: cslt.Library
    handle: cslt.Handle
    problem: Problem

    def __post_init__(self) -> None:
        self.spare = [OpaqueStorage() for _ in range(6)]
        self.number, self.other = ctypes.c_int64(), ctypes.c_int64()
        self.valid = torch.zeros(4, dtype=torch.int32)
        self.pruned = torch.zeros_like(self.problem.a_memory)


def _matrix_arguments(scene: Scene, slot: int) -> tuple[int, ...]:
    address = scene.spare[slot].address
    return (scene.handle.address, address, 32, 32, 32, 16, DataType.R_16F, Order.ROW)


def _attribute(scene: Scene, owner: cslt.MatDescriptor, size: int) -> tuple[int, ...]:
    return (scene.handle.address, owner.address, 0, ctypes.addressof(scene.number), size)


def _run(scene: Scene) -> tuple[int, ...]:
    plan, handle = scene.problem.plan, scene.handle
    alpha, beta = ctypes.addressof(plan._alpha), ctypes.addressof(plan._beta)
    a, b, d = scene.problem.pointers()
    return (handle.address, plan.address, alpha, a, b, beta, d, d, 0, 0, 0)


def _sizes(scene: Scene) -> tuple[int, int]:
    return ctypes.addressof(scene.number), ctypes.addressof(scene.other)


def _compress(scene: Scene) -> tuple[int, ...]:
    p = scene.problem
    return (p.a_memory.data_ptr(), p.compressed.data_ptr(), p.scratch.data_ptr(), 0)


def _prune(scene: Scene) -> tuple[int, ...]:
    return (scene.problem.a_memory.data_ptr(), scene.pruned.data_ptr(), PruneAlg.STRIP, 0)


def _check(scene: Scene) -> tuple[int, ...]:
    return (scene.problem.a_memory.data_ptr(), scene.valid.data_ptr(), 0)


# Arguments of one successful call of every function; new structs go into spare storage.
CALLS: dict[str, Callable[[Scene], tuple[object, ...]]] = {
    "cusparseLtInit": lambda s: (s.spare[0].address,),
    "cusparseLtDestroy": lambda s: (s.spare[0].address,),
    "cusparseLtGetVersion": lambda s: (s.handle.address, ctypes.addressof(s.number)),
    "cusparseLtGetProperty": lambda s: (1, ctypes.addressof(s.number)),
    "cusparseLtDenseDescriptorInit": lambda s: _matrix_arguments(s, 1),
    "cusparseLtStructuredDescriptorInit": lambda s: (*_matrix_arguments(s, 2), 0),
    "cusparseLtMatDescriptorDestroy": lambda s: (s.spare[1].address,),
    "cusparseLtMatDescGetAttribute": lambda s: _attribute(s, s.problem.matmul.a, 4),
    "cusparseLtMatDescSetAttribute": lambda s: _attribute(s, s.problem.matmul.a, 4),
    "cusparseLtMatmulDescriptorInit": lambda s: (
        s.handle.address,
        s.spare[5].address,
        Operation.N,
        Operation.N,
        *(m.address for m in (s.problem.matmul.a, s.problem.matmul.b)),
        *(m.address for m in (s.problem.matmul.c, s.problem.matmul.d)),
        cslt.ComputeType.COMPUTE_32F,
    ),
    "cusparseLtMatmulDescGetAttribute": lambda s: _attribute(s, s.problem.matmul, 4),
    "cusparseLtMatmulDescSetAttribute": lambda s: _attribute(s, s.problem.matmul, 4),
    "cusparseLtMatmulAlgSelectionInit": lambda s: (
        s.handle.address,
        s.spare[3].address,
        s.problem.matmul.address,
        0,
    ),
    "cusparseLtMatmulAlgSelectionDestroy": lambda s: (s.spare[3].address,),
    "cusparseLtMatmulAlgGetAttribute": lambda s: _attribute(s, s.problem.alg, 4),
    "cusparseLtMatmulAlgSetAttribute": lambda s: _attribute(s, s.problem.alg, 4),
    "cusparseLtMatmulGetWorkspace": lambda s: (
        s.handle.address,
        s.problem.plan.address,
        ctypes.addressof(s.number),
    ),
    "cusparseLtMatmulPlanInit": lambda s: (
        s.handle.address,
        s.spare[4].address,
        s.problem.matmul.address,
        s.problem.alg.address,
    ),
    "cusparseLtMatmulPlanDestroy": lambda s: (s.spare[4].address,),
    "cusparseLtMatmul": _run,
    "cusparseLtMatmulSearch": _run,
    "cusparseLtSpMMAPrune": lambda s: (s.handle.address, s.problem.matmul.address, *_prune(s)),
    "cusparseLtSpMMAPruneCheck": lambda s: (
        s.handle.address,
        s.problem.matmul.address,
        *_check(s),
    ),
    "cusparseLtSpMMAPrune2": lambda s: (
        s.handle.address,
        s.problem.matmul.a.address,
        1,
        Operation.N,
        *_prune(s),
    ),
    "cusparseLtSpMMAPruneCheck2": lambda s: (
        s.handle.address,
        s.problem.matmul.a.address,
        1,
        Operation.N,
        *_check(s),
    ),
    "cusparseLtSpMMACompressedSize": lambda s: (
        s.handle.address,
        s.problem.plan.address,
        *_sizes(s),
    ),
    "cusparseLtSpMMACompress": lambda s: (
        s.handle.address,
        s.problem.plan.address,
        *_compress(s),
    ),
    "cusparseLtSpMMACompressedSize2": lambda s: (
        s.handle.address,
        s.problem.matmul.a.address,
        *_sizes(s),
    ),
    "cusparseLtSpMMACompress2": lambda s: (
        s.handle.address,
        s.problem.matmul.a.address,
        1,
        Operation.N,
        *_compress(s),
    ),
}
MAKES_AND_ENDS = {
    "cusparseLtInit": "cusparseLtDestroy",
    "cusparseLtDenseDescriptorInit": "cusparseLtMatDescriptorDestroy",
    "cusparseLtMatmulAlgSelectionInit": "cusparseLtMatmulAlgSelectionDestroy",
    "cusparseLtMatmulPlanInit": "cusparseLtMatmulPlanDestroy",
}
TEXTS = ("cusparseLtGetErrorName", "cusparseLtGetErrorString")


@pytest.fixture
def scene(lib: cslt.Library, handle: cslt.Handle) -> Scene:
    return Scene(lib, handle, Problem(handle, Case()))


def _call(scene: Scene, name: str) -> None:
    # Arguments that begin as 0 would be an invalid batch count where they are set.
    scene.number.value = 1 if "SetAttribute" in name else 0
    FUNCTIONS[name](scene.lib, *CALLS[name](scene), context="a scene")


def test_every_function_has_a_call() -> None:
    assert set(CALLS) | set(TEXTS) == set(FUNCTIONS)
    assert len(FUNCTIONS) == 31


@pytest.mark.parametrize("name", sorted(set(CALLS) - set(MAKES_AND_ENDS.values())))
def test_success(emulator: Emulator, scene: Scene, name: str) -> None:
    before = emulator.calls(name)
    _call(scene, name)
    if name in MAKES_AND_ENDS:
        _call(scene, MAKES_AND_ENDS[name])
    if name == "cusparseLtStructuredDescriptorInit":
        capi.mat_descriptor_destroy(scene.lib, scene.spare[2].address)
    assert emulator.calls(name) == before + 1


@pytest.mark.parametrize("name", sorted(CALLS))
def test_every_error_status_is_raised(emulator: Emulator, scene: Scene, name: str) -> None:
    for status in ERRORS:
        emulator.fail(name, status)
        with pytest.raises(CusparseLtError) as caught:
            _call(scene, name)
        error = caught.value
        assert (error.status, error.function) == (status, name)
        assert error.name == f"CUSPARSE_STATUS_{status.name}"
        assert error.text and error.text in str(error)
        assert "a scene" in str(error) and "library 0.8.1" in str(error)


def test_error_names_match_the_librarys(lib: cslt.Library) -> None:
    for status in Status:
        assert capi.get_error_name(lib, status) == f"CUSPARSE_STATUS_{status.name}"
        assert capi.get_error_string(lib, status)


def test_an_unknown_status_keeps_its_number(emulator: Emulator, lib: cslt.Library) -> None:
    emulator.fail("cusparseLtInit", 77)
    with pytest.raises(CusparseLtError, match=r"CUSPARSE_STATUS_77 \(77\)"):
        cslt.Handle(lib)


def test_init_without_gpu_says_so(emulator: Emulator, lib: cslt.Library) -> None:
    emulator.fail("cusparseLtInit", Status.NOT_INITIALIZED)
    with pytest.raises(CusparseLtError, match="no usable NVIDIA GPU or driver"):
        cslt.Handle(lib)


def test_a_refused_problem_names_shapes_and_dtypes(handle: cslt.Handle) -> None:
    with pytest.raises(CusparseLtError) as caught:
        cslt.MatDescriptor.structured(handle, 30, 64, dtype=DataType.R_16BF)
    assert "structured 30x64 R_16BF ROW ld=64" in str(caught.value)
    with pytest.raises(CusparseLtError) as caught:
        Problem(handle, Case(dtype=DataType.R_16F, out_dtype=DataType.R_16BF))
    assert "M=64, N=48, K=64" in str(caught.value)
    assert "NOT_SUPPORTED (10), operation not supported" in str(caught.value)


def test_functions_missing_before_0_8_raise_only_when_called() -> None:
    old = Emulator(build(old_api=True))
    old.version(0, 6, 2)
    lib = cslt.load(old.path)
    with cslt.Handle(lib) as handle:
        Problem(handle, Case()).assert_right()
        with pytest.raises(CusparseLtError, match=r"\(10\); structured") as caught:
            cslt.MatDescriptor.structured(handle, 30, 64, dtype=DataType.R_16BF)
        assert caught.value.text == ""
    assert set(old.live().values()) == {0}
    missing = (capi.matmul_alg_selection_destroy, capi.get_error_name, capi.get_error_string)
    for function in missing:
        with pytest.raises(cslt.FunctionNotAvailableError, match=r"0\.6\.2") as missed:
            function(lib, 0)
        assert missed.value.function == function.name


@pytest.mark.parametrize("alg", [PruneAlg.STRIP, PruneAlg.TILE])
def test_prune_and_check_in_both_forms(handle: cslt.Handle, alg: PruneAlg) -> None:
    problem = Problem(handle, Case(m=32, n=16, k=32))
    dense = torch.randn(32, 32).to(torch.bfloat16)
    valid = torch.full((4,), 7, dtype=torch.int32)
    a = problem.matmul.a
    problem.matmul.prune_check(dense.data_ptr(), valid.data_ptr())
    assert valid[0] == 1
    outs = [torch.empty_like(dense) for _ in range(2)]
    problem.matmul.prune(dense.data_ptr(), outs[0].data_ptr(), alg, stream=11)
    a.prune(dense.data_ptr(), outs[1].data_ptr(), alg, stream=12)
    assert torch.equal(outs[0], outs[1])
    for check in (problem.matmul.prune_check, a.prune_check):
        valid.fill_(7)
        check(outs[0].data_ptr(), valid.data_ptr())
        assert valid.tolist() == [0, 7, 7, 7]
    kept = outs[0] != 0
    assert torch.equal(outs[0][kept], dense[kept])
    if alg == PruneAlg.STRIP:
        assert torch.equal(outs[0], prune_24(dense))
    else:
        tiles = kept.unflatten(0, (-1, 4)).unflatten(2, (-1, 4))
        assert (tiles.sum(1) == 2).all() and (tiles.sum(3) == 2).all()


def test_the_deprecated_compress_agrees_with_the_plans(handle: cslt.Handle) -> None:
    problem = Problem(handle, Case(m=256, n=16, k=128))
    a = problem.matmul.a
    assert a.compressed_size() == problem.plan.compressed_size()
    again = torch.zeros_like(problem.compressed)
    a.compress(problem.a_memory.data_ptr(), again.data_ptr(), problem.scratch.data_ptr())
    assert torch.equal(again, problem.compressed)


def test_streams_and_workspace_reach_the_library(emulator: Emulator, handle: cslt.Handle) -> None:
    problem = Problem(handle, Case())
    a, b, d = problem.pointers()
    scratch = torch.empty(problem.plan.workspace_size, dtype=torch.uint8)
    assert problem.plan.workspace_size == 64 * 64 // 8  # as the metadata of A
    problem.plan.matmul(1.0, a, b, 0.0, d, d, scratch.data_ptr(), 0x7FFF_0000_1234)
    assert emulator.last_stream() == 0x7FFF_0000_1234
    assert emulator.last_workspace() == scratch.data_ptr()
    problem.plan.compress(
        problem.a_memory.data_ptr(), a, problem.scratch.data_ptr(), stream=0x7FFF_0000_5678
    )
    assert emulator.last_stream() == 0x7FFF_0000_5678


def test_search_takes_the_fastest_and_updates_plan_and_selection(
    emulator: Emulator, handle: cslt.Handle
) -> None:
    problem = Problem(handle, Case())
    for alg_id in (0, 1, 3):
        emulator.algorithm_delay(alg_id, 50)
    a, b, d = problem.pointers()
    problem.plan.search(1.0, a, b, 0.0, d, d)
    assert problem.alg.get(cslt.AlgAttribute.CONFIG_ID) == 2
    problem.assert_right()
    assert emulator.last_algorithm() == 2


def test_attributes_come_back_as_set(emulator: Emulator, handle: cslt.Handle) -> None:
    problem = Problem(handle, Case())
    attribute = cslt.MatmulDescAttribute
    values = {
        attribute.ACTIVATION_RELU: 1,
        attribute.ACTIVATION_RELU_UPPERBOUND: 6.5,
        attribute.BIAS_STRIDE: 64,
        attribute.BIAS_POINTER: 0x7FFF_1234_5670,
        attribute.A_SCALE_MODE: 1,
        attribute.D_OUT_SCALE_POINTER: 0x7FFF_0000_0010,
    }
    for key, value in values.items():
        problem.matmul.set(key, value)
    assert {key: problem.matmul.get(key) for key in values} == values
    problem.matmul.set(attribute.ACTIVATION_RELU, 2)
    assert problem.matmul.get(attribute.ACTIVATION_RELU) == 1
    with pytest.raises(CusparseLtError, match="INTERNAL_ERROR"):
        problem.matmul.get(attribute.SPARSE_MAT_POINTER)
    problem.alg.set(cslt.AlgAttribute.CONFIG_ID, 3)
    assert problem.alg.get(cslt.AlgAttribute.CONFIG_ID) == 3
    assert problem.alg.get(cslt.AlgAttribute.CONFIG_MAX_ID) == 4
    for bad in (4, -1):
        with pytest.raises(CusparseLtError, match=f"CONFIG_ID={bad}"):
            problem.alg.set(cslt.AlgAttribute.CONFIG_ID, bad)
    with pytest.raises(CusparseLtError, match="CONFIG_MAX_ID"):
        problem.alg.set(cslt.AlgAttribute.CONFIG_MAX_ID, 9)
    emulator.version(0, 6, 3)
    with pytest.raises(CusparseLtError, match="A_SCALE_MODE"):
        problem.matmul.get(attribute.A_SCALE_MODE)
