"""Learning and proving metadata orders, against the emulator through pycusparselt."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import packing_oracle as oracle
import pycusparselt as cslt
import pytest
import torch

from sdgp_cusparselt import cache
from sdgp_cusparselt.errors import SDGPCacheWarning
from sdgp_cusparselt.packing import certify as certification
from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing.certify import certify, plan_compress, prove
from sdgp_cusparselt.packing.layout import MetadataLayout
from sdgp_cusparselt.packing.learn import Compress, learn
from sdgp_cusparselt.packing.pack import pack
from tests.emulator.build import build
from tests.emulator.control import LAYOUTS, Emulator

BF16, CPU = torch.bfloat16, torch.device("cpu")
IDENTITY = {"library": "emulator", "device": "cpu", "alg_id": 0}
CSLT_DTYPE = {torch.bfloat16: cslt.DataType.R_16BF, torch.float16: cslt.DataType.R_16F}

Planner = Callable[..., Compress]


@pytest.fixture(scope="module")
def emulator_library() -> Emulator:
    return Emulator(build())


@pytest.fixture
def emulator(emulator_library: Emulator) -> Iterator[Emulator]:
    emulator_library.reset()
    yield emulator_library
    emulator_library.reset()


def make_plan(
    stack: ExitStack,
    handle: cslt.Handle,
    rows: int,
    cols: int,
    dtype: torch.dtype = BF16,
    alg_id: int = 0,
) -> cslt.MatmulPlan:
    """A plan whose structured operand is [rows, cols], row-major; the dense width is 32."""
    kind = CSLT_DTYPE[dtype]
    row = cslt.Order.ROW
    a = cslt.MatDescriptor.structured(
        handle, rows, cols, ld=cols, dtype=kind, order=row, alignment=16
    )
    b = cslt.MatDescriptor.dense(handle, cols, 32, ld=32, dtype=kind, order=row, alignment=16)
    c = cslt.MatDescriptor.dense(handle, rows, 32, ld=32, dtype=kind, order=row, alignment=16)
    for descriptor in (a, b, c):
        stack.enter_context(descriptor)
    matmul = cslt.MatmulDescriptor(
        handle,
        op_a=cslt.Operation.N,
        op_b=cslt.Operation.N,
        a=a,
        b=b,
        c=c,
        d=c,
        compute_type=cslt.ComputeType.COMPUTE_32F,
    )
    selection = stack.enter_context(cslt.AlgSelection(handle, matmul))
    selection.set(cslt.AlgAttribute.CONFIG_ID, alg_id)
    return stack.enter_context(cslt.MatmulPlan(handle, matmul, selection))


@pytest.fixture
def planner(emulator: Emulator) -> Iterator[Planner]:
    with ExitStack() as stack:
        handle = stack.enter_context(cslt.Handle(cslt.load(emulator.path)))

        def compress(rows: int, cols: int, dtype: torch.dtype = BF16, alg_id: int = 0) -> Compress:
            return plan_compress(make_plan(stack, handle, rows, cols, dtype, alg_id))

        yield compress


def counted(compress: Compress) -> tuple[Compress, list[int]]:
    calls: list[int] = []

    def count(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.numel())
        return compress(x)

    return count, calls


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "random"])
@pytest.mark.parametrize(
    "rows, cols", [(16, 16), (32, 64), (64, 64), (48, 80), (128, 128), (256, 128), (384, 192)]
)
def test_every_named_order_is_learned_and_proven(
    emulator: Emulator,
    planner: Planner,
    tmp_path: Path,
    name: str,
    rows: int,
    cols: int,
) -> None:
    emulator.layout(name)
    dtype = torch.float16 if cols == 80 else torch.bfloat16
    compress = planner(rows, cols, dtype)
    certificate = certify(compress, rows, cols, dtype, CPU, IDENTITY, folder=tmp_path)
    assert certificate.layout is not None, certificate.reason
    table = certificate.layout.address(
        torch.arange(rows)[:, None], torch.arange(cols // 4)[None], rows, cols
    )
    assert table.flatten().tolist() == emulator.layout_addresses(name, rows, cols)
    bits = (rows - 1).bit_length() + (cols // 4 - 1).bit_length()
    assert certificate.probes <= 2 * bits


@pytest.mark.parametrize("seed", range(12))
def test_random_bit_permutations_are_learned(
    emulator: Emulator, planner: Planner, tmp_path: Path, seed: int
) -> None:
    rows, cols = ((128, 64), (256, 192), (96, 64), (64, 128))[seed % 4]
    emulator.layout("random", seed)
    compress, calls = counted(planner(rows, cols))
    learned = learn(compress, rows, cols, BF16, CPU)
    bits = (rows - 1).bit_length() + (cols // 4 - 1).bit_length()
    assert len(calls) == learned.probes <= 2 * bits
    certificate = certify(compress, rows, cols, BF16, CPU, IDENTITY, folder=tmp_path)
    assert certificate.layout is not None, certificate.reason
    table = certificate.layout.address(
        torch.arange(rows)[:, None], torch.arange(cols // 4)[None], rows, cols
    )
    assert table.flatten().tolist() == emulator.layout_addresses("random", rows, cols, seed)


def test_a_known_class_is_proven_at_a_new_shape_without_probes(
    emulator: Emulator, planner: Planner, tmp_path: Path
) -> None:
    emulator.layout("random", 3)
    first = certify(planner(256, 128), 256, 128, BF16, CPU, IDENTITY, folder=tmp_path)
    second = certify(planner(384, 320), 384, 320, BF16, CPU, IDENTITY, folder=tmp_path)
    assert first.probes > 0 and second.proven and second.probes == 0
    compress, calls = counted(planner(384, 320))
    assert certify(compress, 384, 320, BF16, CPU, IDENTITY, folder=tmp_path).proven
    assert calls == []  # the proof on disk is enough


def test_a_second_shape_decides_between_layouts_that_agree_on_the_first(
    emulator: Emulator, planner: Planner, tmp_path: Path
) -> None:
    """One tile fits either order of tiles; the wrong one must not survive a wider operand."""
    emulator.layout("random", 8)
    assert certify(planner(128, 64), 128, 64, BF16, CPU, IDENTITY, folder=tmp_path).proven
    second = certify(planner(128, 192), 128, 192, BF16, CPU, IDENTITY, folder=tmp_path)
    assert second.proven, second.reason
    again = certify(planner(128, 64), 128, 64, BF16, CPU, IDENTITY, folder=tmp_path)
    assert again.layout == second.layout


def test_an_order_that_changes_between_shapes_is_refused(
    emulator: Emulator, planner: Planner, tmp_path: Path
) -> None:
    emulator.layout("random", 1)
    assert certify(planner(256, 128), 256, 128, BF16, CPU, IDENTITY, folder=tmp_path).proven
    emulator.layout("random", 2)
    other = certify(planner(384, 128), 384, 128, BF16, CPU, IDENTITY, folder=tmp_path)
    assert not other.proven and "does not hold here" in other.reason
    # The class is refused from now on, without asking the library again.
    compress, calls = counted(planner(640, 128))
    third = certify(compress, 640, 128, BF16, CPU, IDENTITY, folder=tmp_path)
    assert not third.proven and third.reason == other.reason and calls == []


def test_an_order_that_changes_between_plans_is_told_apart(
    emulator: Emulator, planner: Planner, tmp_path: Path
) -> None:
    emulator.layout_per_plan()
    found = [
        certify(
            planner(256, 128, alg_id=alg_id),
            256,
            128,
            BF16,
            CPU,
            IDENTITY | {"alg_id": alg_id},
            folder=tmp_path,
        ).layout
        for alg_id in (0, 1)
    ]
    assert found[0] is not None and found[1] is not None and found[0] != found[1]
    left, why = prove(planner(256, 128, alg_id=1), [found[0]], 256, 128, BF16, CPU)
    assert left == [] and "metadata byte" in why


def test_a_library_that_does_something_else_is_refused(tmp_path: Path) -> None:
    def swapped(x: torch.Tensor) -> torch.Tensor:
        buffer = pack(x, layout=layouts.PLAIN, method="none").buffer.clone()
        values = buffer[: x.numel()]
        values[:4] = values[:4].flip(0)
        return buffer

    certificate = certify(swapped, 64, 64, BF16, CPU, IDENTITY, folder=tmp_path)
    assert not certificate.proven
    assert "value byte 0" in certificate.reason


def test_an_order_that_is_no_bit_permutation_is_refused(tmp_path: Path) -> None:
    def rotated(x: torch.Tensor) -> torch.Tensor:
        buffer = pack(x, layout=layouts.PLAIN, method="none").buffer.clone()
        buffer[x.numel() :] = buffer[x.numel() :].roll(1)
        return buffer

    certificate = certify(rotated, 64, 64, BF16, CPU, IDENTITY, folder=tmp_path)
    assert not certificate.proven and "sum" in certificate.reason


def test_a_packer_that_is_wrong_is_refused(planner: Planner, tmp_path: Path) -> None:
    def keeps_minus_zero(x: torch.Tensor, layout: MetadataLayout) -> list[torch.Tensor]:
        buffer = pack(x, layout=layout).buffer.clone()
        pruned = oracle.prune_magnitude(x)
        if bool((pruned.view(torch.int16) == -0x8000).any()):
            buffer[1] = 0x80
        return [buffer]

    certificate = certify(
        planner(64, 64), 64, 64, BF16, CPU, IDENTITY, folder=tmp_path, pack=keeps_minus_zero
    )
    assert not certificate.proven and "special matrix" in certificate.reason


def test_proofs_are_listed_and_a_corrupt_one_is_learned_again(
    planner: Planner, tmp_path: Path
) -> None:
    certify(planner(64, 64), 64, 64, BF16, CPU, IDENTITY, folder=tmp_path)
    (known,) = certification.learned_layouts(tmp_path)
    assert known["identity"]["library"] == "emulator" and known["proven"] == [[64, 64]]
    path = certification.proof_path(IDENTITY, 64, 64, BF16, tmp_path)
    path.write_text("{broken")
    with pytest.warns(SDGPCacheWarning, match="corrupt"):
        again = certify(planner(64, 64), 64, 64, BF16, CPU, IDENTITY, folder=tmp_path)
    assert again.proven and again.probes > 0
    assert cache.load(path) is not None


def test_eight_bit_operands_are_left_to_the_library(tmp_path: Path) -> None:
    certificate = certify(lambda x: x, 64, 64, torch.int8, CPU, IDENTITY, folder=tmp_path)
    assert not certificate.proven and "by the library" in certificate.reason


def test_an_unpadded_shape_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="padded shape"):
        certify(lambda x: x, 60, 64, BF16, CPU, IDENTITY, folder=tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, cols",
    [(64, 64), (128, 128), (256, 128), (144, 208), (384, 256), (1024, 4096), (4096, 1024)],
)
def test_the_real_library_on_this_gpu(
    tmp_path: Path, rows: int, cols: int, dtype: torch.dtype
) -> None:
    """Every plan's order is learned, and kernel bytes equal the library's Compress."""
    with ExitStack() as stack:
        handle = stack.enter_context(cslt.Handle(cslt.load()))
        plan = make_plan(stack, handle, rows, cols, dtype)
        device = torch.device("cuda", torch.cuda.current_device())
        certificate = certify(
            plan_compress(plan), rows, cols, dtype, device, IDENTITY, folder=tmp_path
        )
        print(f"{rows} x {cols} {dtype}: {certificate}")
        assert certificate.proven, certificate.reason
