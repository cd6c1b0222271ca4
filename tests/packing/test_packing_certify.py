"""Learning and proving metadata orders, against the emulator through pycusparselt."""

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pycusparselt as cslt
import pytest
import torch

from sdgp_cusparselt import cache
from sdgp_cusparselt.errors import SDGPCacheWarning
from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing import proofs as storage
from sdgp_cusparselt.packing.certify import Certificate, certify, plan_compress, prove
from sdgp_cusparselt.packing.layout import MetadataLayout
from sdgp_cusparselt.packing.learn import Compress, learn
from sdgp_cusparselt.packing.pack import pack
from sdgp_cusparselt.packing.proofs import Proofs
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


@pytest.fixture
def proofs(tmp_path: Path) -> Proofs:
    return Proofs(IDENTITY, BF16, tmp_path)


def places(layout: MetadataLayout | None, rows: int, cols: int) -> list[int]:
    assert layout is not None
    row, group = torch.arange(rows)[:, None], torch.arange(cols // 4)[None]
    return layout.address(row, group, rows, cols).flatten().tolist()


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "random"])
@pytest.mark.parametrize(
    "rows, cols", [(16, 16), (32, 64), (64, 64), (48, 80), (128, 128), (256, 128), (384, 192)]
)
def test_every_named_order_is_proven_without_a_probe_and_can_be_learned(
    emulator: Emulator, planner: Planner, tmp_path: Path, name: str, rows: int, cols: int
) -> None:
    emulator.layout(name)
    dtype = torch.float16 if cols == 80 else torch.bfloat16
    compress = planner(rows, cols, dtype)
    certificate = certify(compress, rows, cols, dtype, CPU, Proofs(IDENTITY, dtype, tmp_path))
    assert certificate.packer == "ours" and certificate.probes == 0, certificate.reason
    assert places(certificate.layout, rows, cols) == emulator.layout_addresses(name, rows, cols)
    learned = learn(compress, rows, cols, dtype, CPU)
    bits = (rows - 1).bit_length() + (cols // 4 - 1).bit_length()
    assert learned.candidates and learned.probes == bits + 2, learned.reason
    for layout in learned.candidates:
        assert places(layout, rows, cols) == places(certificate.layout, rows, cols)
        assert layout.nbytes(rows, cols) == certificate.layout.nbytes(rows, cols)


#: 17 x 12 operands with every power of two and odd multiple of 16 on both sides of 256 rows.
ROWS = (16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 224, 256, 272, 288, 320, 384)
COLS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
GRID = [(rows, cols) for rows in ROWS for cols in COLS]
ORDERINGS = {
    "up": GRID,
    "down": GRID[::-1],
    "mixed": random.Random(4).sample(GRID, len(GRID)),
}


@pytest.mark.parametrize(
    "ordering, full_sizes",
    [
        ("mixed", False),
        ("up", True),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in itertools.product(ORDERINGS, (False, True))
            if pair not in (("mixed", False), ("up", True))
        ),
    ],
)
def test_every_one_of_204_shapes_is_proven_whatever_came_before(
    emulator: Emulator,
    planner: Planner,
    proofs: Proofs,
    ordering: str,
    full_sizes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a library as sm8x's, whose order changes at 256 rows, and which sizes by either rule."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # 204 times
    emulator.full_sizes(full_sizes)
    refused = {}
    for rows, cols in ORDERINGS[ordering]:
        found = certify(planner(rows, cols), rows, cols, BF16, CPU, proofs)
        if not found.proven or found.probes:
            refused[rows, cols] = found
    assert len(GRID) == 204 and refused == {}


@pytest.mark.parametrize("seed", range(12))
def test_random_bit_permutations_are_learned(
    emulator: Emulator, planner: Planner, proofs: Proofs, seed: int
) -> None:
    rows, cols = ((128, 64), (256, 192), (96, 64), (64, 128))[seed % 4]
    emulator.layout("random", seed)
    compress, calls = counted(planner(rows, cols))
    learned = learn(compress, rows, cols, BF16, CPU)
    bits = (rows - 1).bit_length() + (cols // 4 - 1).bit_length()
    assert len(calls) == learned.probes == bits + 2
    certificate = certify(compress, rows, cols, BF16, CPU, proofs)
    want = emulator.layout_addresses("random", rows, cols, seed)
    assert places(certificate.layout, rows, cols) == want, certificate.reason


def test_a_learned_order_is_known_at_the_next_shape(
    emulator: Emulator, planner: Planner, proofs: Proofs, tmp_path: Path
) -> None:
    emulator.layout("random", 3)
    first = certify(planner(256, 128), 256, 128, BF16, CPU, proofs)
    second = certify(planner(384, 320), 384, 320, BF16, CPU, proofs)
    assert first.probes > 0 and second.proven and second.probes == 0
    compress, calls = counted(planner(384, 320))
    again = certify(compress, 384, 320, BF16, CPU, Proofs(IDENTITY, BF16, tmp_path))
    assert again.proven and calls == []  # the proof on disk is enough


def test_a_shape_on_which_a_known_order_fails_learns_its_own_and_spoils_no_other(
    emulator: Emulator, planner: Planner, proofs: Proofs
) -> None:
    emulator.layout("random", 1)
    first = certify(planner(256, 128), 256, 128, BF16, CPU, proofs)
    emulator.layout("random", 2)
    second = certify(planner(384, 128), 384, 128, BF16, CPU, proofs)
    assert second.probes > 0
    assert places(second.layout, 384, 128) == emulator.layout_addresses("random", 384, 128, 2)
    kept = certify(planner(256, 128), 256, 128, BF16, CPU, proofs)
    assert kept.layout == first.layout and kept.reason == "proven before"
    assert proofs.layouts() == [first.layout, second.layout]


def test_a_refusal_is_one_plans_own(
    emulator: Emulator, planner: Planner, proofs: Proofs, tmp_path: Path
) -> None:
    good = certify(planner(64, 64), 64, 64, BF16, CPU, proofs)
    wrong = certify(lambda x: planner(96, 64)(x).roll(1), 96, 64, BF16, CPU, proofs)
    assert wrong.packer == "library" and not wrong.proven
    compress, calls = counted(planner(96, 64))
    disk = Proofs(IDENTITY, BF16, tmp_path)
    assert certify(compress, 96, 64, BF16, CPU, disk).reason == wrong.reason and calls == []
    assert certify(compress, 96, 64, BF16, CPU, disk, "alg_id=1").proven  # another plan
    assert disk.find("64x64") == Certificate(good.layout, "proven before")


def test_an_order_that_changes_between_plans_is_told_apart(
    emulator: Emulator, planner: Planner, proofs: Proofs
) -> None:
    emulator.layout_per_plan()
    found = [
        certify(planner(256, 128, alg_id=i), 256, 128, BF16, CPU, proofs, f"alg_id={i}").layout
        for i in (0, 1)
    ]
    assert found[0] is not None and found[1] is not None and found[0] != found[1]
    left, why = prove(planner(256, 128, alg_id=1), [found[0]], 256, 128, BF16, CPU)
    assert left is None and "the library's buffer" in why


@pytest.mark.parametrize("pair", [(0, 1), (1, 3), (3, 0)])
@pytest.mark.parametrize("layout", ["blocked", "random"])
def test_another_pair_in_groups_that_hold_nothing_does_not_matter(
    emulator: Emulator, planner: Planner, proofs: Proofs, pair: tuple[int, int], layout: str
) -> None:
    emulator.layout(layout, 5)
    emulator.empty_pair(*pair)
    certificate = certify(planner(256, 128), 256, 128, BF16, CPU, proofs)
    want = emulator.layout_addresses(layout, 256, 128, 5)
    assert places(certificate.layout, 256, 128) == want, certificate.reason


@pytest.mark.parametrize("filler", [0x44, 0x88, 0x1E, None])
def test_what_the_library_leaves_in_padding_does_not_matter(
    emulator: Emulator, planner: Planner, proofs: Proofs, filler: int | None
) -> None:
    """Also nibbles that read like a probe's answer, and others in every call."""
    emulator.layout("sm90_interleaved")
    emulator.full_sizes()
    compress = planner(48, 80)
    used = max(emulator.layout_addresses("sm90_interleaved", 48, 80)) // 2 + 1

    def padded(x: torch.Tensor) -> torch.Tensor:
        buffer = compress(x)
        rest = buffer[x.numel() + used :]
        assert rest.numel()
        if filler is None:
            rest.random_()
        else:
            rest.fill_(filler)
        return buffer

    assert certify(padded, 48, 80, BF16, CPU, proofs).proven
    learned = learn(padded, 48, 80, BF16, CPU)
    assert learned.candidates, learned.reason


def test_a_library_that_does_something_else_is_refused(proofs: Proofs) -> None:
    def swapped(x: torch.Tensor) -> torch.Tensor:
        buffer = pack(x, layout=layouts.PLAIN, method="none").buffer.clone()
        values = buffer[: x.numel()]
        values[:4] = values[:4].flip(0)
        return buffer

    certificate = certify(swapped, 64, 64, BF16, CPU, proofs)
    assert not certificate.proven and "first (0, " in certificate.reason


def test_an_order_that_is_no_bit_permutation_is_refused(proofs: Proofs) -> None:
    def rotated(x: torch.Tensor) -> torch.Tensor:
        buffer = pack(x, layout=layouts.PLAIN, method="none").buffer.clone()
        buffer[x.numel() :] = buffer[x.numel() :].roll(1)
        return buffer

    certificate = certify(rotated, 64, 64, BF16, CPU, proofs)
    assert not certificate.proven and "sum" in certificate.reason


def _spoiled(x: torch.Tensor, layout: MetadataLayout, at: int, byte: int) -> list[torch.Tensor]:
    buffer = pack(x, layout=layout).buffer.clone()
    buffer[at] = byte
    return [buffer]


@pytest.mark.parametrize(
    "at, byte, words",
    [
        (1, 0x7F, "ours along features: 1 elements differ, first (0, "),
        (64 * 64, 0x44, "elements differ"),  # the metadata's first byte
        (64 * 64, 0x45, "indices that do not increase"),  # 1 and 1
    ],
)
def test_a_packer_that_is_wrong_is_refused(
    planner: Planner, proofs: Proofs, at: int, byte: int, words: str
) -> None:
    certificate = certify(
        planner(64, 64),
        64,
        64,
        BF16,
        CPU,
        proofs,
        pack=lambda x, layout: _spoiled(x, layout, at, byte),
    )
    assert not certificate.proven and words in certificate.reason


def test_the_product_decides(planner: Planner, proofs: Proofs) -> None:
    seen: list[torch.Tensor] = []

    def check(packed: torch.Tensor, left: torch.Tensor) -> str | None:
        assert ((left != 0).view(64, -1, 4).sum(-1) == 2).all()
        assert torch.equal(packed, planner(64, 64)(left))
        seen.append(left)
        return "3 of 4096 elements are wrong"

    refused = certify(planner(64, 64), 64, 64, BF16, CPU, proofs, check=check)
    assert seen and not refused.proven and "3 of 4096" in refused.reason
    passed = certify(planner(64, 64), 64, 64, BF16, CPU, proofs, "b", check=lambda p, x: None)
    assert passed.proven


def test_proofs_are_listed_and_a_corrupt_file_is_made_anew(
    planner: Planner, proofs: Proofs, tmp_path: Path
) -> None:
    certify(planner(64, 64), 64, 64, BF16, CPU, proofs)
    (known,) = storage.learned_layouts(tmp_path)
    assert known["identity"]["library"] == "emulator" and list(known["plans"]) == ["64x64"]
    proofs.path.write_text("{broken")
    with pytest.warns(SDGPCacheWarning, match="corrupt"):
        fresh = Proofs(IDENTITY, BF16, tmp_path)
    assert fresh.find("64x64") is None
    assert certify(planner(64, 64), 64, 64, BF16, CPU, fresh).proven
    assert cache.load(proofs.path) is not None


def test_two_processes_add_to_one_file(planner: Planner, tmp_path: Path) -> None:
    first, second = Proofs(IDENTITY, BF16, tmp_path), Proofs(IDENTITY, BF16, tmp_path)
    certify(planner(64, 64), 64, 64, BF16, CPU, first)
    certify(planner(32, 64), 32, 64, BF16, CPU, second)
    both = Proofs(IDENTITY, BF16, tmp_path)
    assert both.find("64x64") and both.find("32x64") and second.find("64x64")
    other = Proofs(IDENTITY | {"library": "another"}, BF16, tmp_path)
    assert other.find("64x64") is None and other.path != both.path
    assert Proofs(IDENTITY, torch.float16, tmp_path).path != both.path


def test_entries_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    known = Proofs(IDENTITY, BF16, tmp_path)
    broken = {"a": {"layout": "{}"}, "b": {}, "c": "x", "d": {"refused": "so"}, "e": {"layout": 3}}
    cache.store(known.path, {"plans": broken})
    assert Proofs(IDENTITY, BF16, tmp_path).find("d") == Certificate(None, "so")
    assert all(Proofs(IDENTITY, BF16, tmp_path).find(name) is None for name in "abce")


def test_without_a_folder_to_write_to_proofs_stay_in_memory(
    planner: Planner, tmp_path: Path
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    with pytest.warns(SDGPCacheWarning, match="kept for this process") as warned:
        proofs = Proofs(IDENTITY, BF16, blocked / "layouts")
        for rows in (32, 64):
            assert certify(planner(rows, 64), rows, 64, BF16, CPU, proofs).proven
    assert len(warned) == 1
    compress, calls = counted(planner(64, 64))
    assert certify(compress, 64, 64, BF16, CPU, proofs).proven and calls == []


def test_eight_bit_operands_are_left_to_the_library(proofs: Proofs) -> None:
    certificate = certify(lambda x: x, 64, 64, torch.int8, CPU, proofs)
    assert not certificate.proven and "by the library" in certificate.reason


def test_an_unpadded_shape_is_an_error(proofs: Proofs) -> None:
    with pytest.raises(ValueError, match="padded shape"):
        certify(lambda x: x, 60, 64, BF16, CPU, proofs)


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
        proofs = Proofs(IDENTITY, dtype, tmp_path)
        certificate = certify(plan_compress(plan), rows, cols, dtype, device, proofs)
        print(f"{rows} x {cols} {dtype}: {certificate}")
        assert certificate.proven, certificate.reason
