"""The kernels of heavy tokens against their reference, bit for bit, and what they are for."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import packing_cases as cases
import pytest
import torch
from torch import Tensor

from sdgp_cusparselt.packing import heavy_pack
from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing.heavy import heaviest, heavy_capacity, row_energies
from sdgp_cusparselt.packing.heavy_pack import pack_heavy, prepare_add, prepare_heavy
from sdgp_cusparselt.packing.layout import MetadataLayout
from sdgp_cusparselt.packing.packed import Packed24
from sdgp_cusparselt.packing.reference import Draws, pack_operand
from tests.helpers import same_bits
from tests.interpreting import needs_loops

SEEDS = torch.tensor([0x1234_5678_9ABC_DEF0, -(2**62) + 12345])
LAYOUTS = (*layouts.NAMED.values(), cases.random_layout(3, 5, 3, "groups"))
ROOT = Path(__file__).parents[2]
COMPILE = """
import json
import torch
from bench import sass
from bench.pack_budget import TARGETS
from bench.pack_count import compile_kernel
from sdgp_cusparselt.packing import heavy_pack, layout, variants
from sdgp_cusparselt.packing.tables import layout_table

found = []
for target in TARGETS:
    made = variants.Target("mvue", layout.BLOCKED)
    tile = variants.choose_tile(1 << 14, 1 << 12, made, None)
    name = variants.triton_dtype(torch.bfloat16)
    table = layout_table(made.layout, tile.block_m, tile.block_k // 4, 0)
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
    pack = {"IN_MEMORY": False, "DTYPE": name, "NATIVE": True, "LAYOUT": table, **blocks}
    energies = dict(zip(("BLOCK_M", "BLOCK_K"), heavy_pack.ENERGY_BLOCK), DTYPE=name)
    add = {"DTYPE": name, "NATIVE": True, "BLOCK": heavy_pack.SUM_BLOCK}
    kernels = [("pack_heavy_kernel", pack, tile.num_warps)]
    if target == 80:
        kernels += [("row_energies_kernel", energies, 4), ("add_rest_kernel", add, 4)]
        kernels += [("heaviest_kernel", {"BLOCK": heavy_pack.MOST_ROWS}, 32)]
    for kernel, constants, warps in kernels:
        code = sass.read(compile_kernel(kernel, constants, warps, target), target)
        widest = {
            kind: max([b for (op, b) in code.accesses if op == kind], default=0)
            for kind in ("LDG", "STG")
        }
        found.append({
            "target": target, "name": kernel, "stack": code.stack, "issued": code.issued,
            "registers": code.registers, "widest load": widest["LDG"],
            "widest store": widest["STG"],
        })
print(json.dumps(found))
"""


def gradient(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Small integers, whose squares add up exactly in any order; with zeros of both signs."""
    size = torch.randint(1, 9, (rows, 1))
    x = (torch.randint(-4, 5, (rows, cols)) * size).to(dtype)
    return x.masked_fill_(torch.rand(rows, cols) < 0.05, -0.0)


def heavy_rows(x: Tensor, share: float) -> Tensor:
    return heaviest(row_energies(x), heavy_capacity(len(x), share))


def run_kernel(
    x: Tensor, share: float, layout: MetadataLayout, *, in_memory: bool = False
) -> tuple[Packed24, Tensor]:
    """Launch on an operand filled with a byte that packing does not write by chance alone."""
    start = prepare_heavy(
        (x.shape[0], x.shape[1]),
        x.stride(0),
        x.dtype,
        x.device,
        share=share,
        layout=layout,
        seeds_in_memory=in_memory,
    )
    buffer = torch.full((start.nbytes,), 0x5A, dtype=torch.uint8)
    scratch = torch.full((start.choice.nbytes,), 0x5A, dtype=torch.uint8)
    seeds = (0, 0) if in_memory else SEEDS.tolist()
    address = SEEDS.data_ptr() if in_memory else 0
    start(x.data_ptr(), buffer.data_ptr(), scratch.data_ptr(), *seeds, 0, seeds=address)
    shape = (x.shape[0] + start.choice.capacity, x.shape[1])
    rows = scratch[start.choice.rows_at(0) :].view(torch.int32)
    assert start.choice.rows_at(0) % 16 == 0  # as the kernels are compiled for
    return Packed24(buffer, shape, x.dtype, layout), rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, share", [(64, 0.05), (37, 0.3), (16, 1.0), (5, 0.5)])
def test_pairs_of_rows_add_up_to_the_heavy_rows(
    rows: int, share: float, dtype: torch.dtype
) -> None:
    x = torch.randn(rows, 64).mul(torch.randn(rows, 1).exp()).to(dtype)
    heavy = heavy_rows(x, share)
    whole = pack_heavy(x, heavy, layouts.PLAIN, Draws(SEEDS, 0)).unpack()
    drawn = pack_operand(x, layouts.PLAIN, method="mvue", draws=Draws(SEEDS, 0)).unpack()
    assert whole.shape == (rows + len(heavy), 64)
    pairs = whole[heavy] + whole[rows:]  # one of both is zero
    assert torch.equal(pairs, x[heavy])
    assert ((whole[heavy] == 0) | (whole[rows:] == 0)).all()
    light = torch.ones(rows, dtype=torch.bool).index_fill(0, heavy, False)
    assert same_bits(whole[:rows][light], drawn[light])


@needs_loops
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_kernel_is_the_reference(layout: MetadataLayout) -> None:
    rows = max(64, layout.tile_rows)
    x, share = gradient(rows, max(64, 4 * layout.tile_groups), torch.bfloat16), 0.1
    while layout.misfit(rows + heavy_capacity(rows, share), x.shape[1]) and share < 1:
        share = 1.0  # twice as many rows fit where once did
    packed, found = run_kernel(x, share, layout)
    heavy = heavy_rows(x, share)
    assert found.tolist() == heavy.tolist()
    assert torch.equal(packed.buffer, pack_heavy(x, heavy, layout, Draws(SEEDS, 0)).buffer)


@needs_loops
@pytest.mark.parametrize(
    "shape, share, dtype",
    [
        *itertools.product([(1, 16), (5, 16)], [0.02, 0.4, 1.0], [torch.bfloat16]),
        *itertools.product([(37, 48)], [0.02, 0.4, 1.0], [torch.bfloat16, torch.float16]),
        ((100, 272), 0.4, torch.float16),
        ((64, 512), 1.0, torch.bfloat16),
    ],
)
def test_sizes_and_shares(shape: tuple[int, int], share: float, dtype: torch.dtype) -> None:
    x = gradient(*shape, dtype)
    packed, found = run_kernel(x, share, layouts.PLAIN)
    heavy = heavy_rows(x, share)
    assert found.tolist() == heavy.tolist()
    truth = pack_heavy(x, heavy, layouts.PLAIN, Draws(SEEDS, 0))
    assert torch.equal(packed.buffer, truth.buffer)


@needs_loops
def test_special_values_stay_visible_and_seeds_may_lie_in_memory() -> None:
    x = gradient(48, 64, torch.bfloat16)
    x[3, 5], x[9, 0], x[20, 63] = torch.inf, torch.nan, -torch.inf
    packed, found = run_kernel(x, 0.05, layouts.PLAIN, in_memory=True)
    heavy = heavy_rows(x, 0.05)
    assert {3, 9, 20} <= set(heavy.tolist()) == set(found.tolist())
    truth = pack_heavy(x, heavy, layouts.PLAIN, Draws(SEEDS, 0))
    assert torch.equal(packed.buffer, truth.buffer)
    dense = packed.unpack()
    assert dense[3, 5] == torch.inf and dense[9, 0].isnan() and dense[20, 63] == -torch.inf


@needs_loops
def test_energies_are_right_to_rounding_and_ties_go_to_lower_rows() -> None:
    x = torch.zeros(32, 32, dtype=torch.bfloat16)
    x[::3] = 1
    _, found = run_kernel(x, 0.25, layouts.PLAIN)
    assert found.tolist() == heavy_rows(x, 0.25).tolist() == sorted(found.tolist())
    x = torch.randn(40, 208).bfloat16()
    start = prepare_heavy((40, 208), 208, x.dtype, x.device, share=0.1, layout=layouts.PLAIN)
    scratch = torch.zeros(start.choice.nbytes, dtype=torch.uint8)
    buffer = torch.empty(start.nbytes, dtype=torch.uint8)
    start(x.data_ptr(), buffer.data_ptr(), scratch.data_ptr(), 1, 2, 0)
    energies, exact = scratch[:160].view(torch.float32).double(), x.double().square().sum(1)
    gamma = 209 * torch.finfo(torch.float32).eps / 2  # of 208 sums of exact squares, any order
    assert ((energies - exact).abs() <= gamma * exact).all()


@needs_loops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [8, 40, 1032])
def test_the_rests_are_added(columns: int, dtype: torch.dtype) -> None:
    product, rows = torch.randn(20, columns).to(dtype), torch.tensor([1, 4, 15], dtype=torch.int32)
    truth = product.clone()
    truth[rows] = (product[rows].float() + product[17:].float()).to(dtype)
    start = prepare_add(17, 3, columns, dtype, product.device)
    start(0, product.data_ptr(), rows.data_ptr())
    assert same_bits(product[:17], truth[:17])


@pytest.mark.slow
def test_every_target_compiles(tmp_path: Path) -> None:
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'bindings'}")
    environment.pop("TRITON_INTERPRET", None)
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.stdout, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert {one["target"] for one in found} == {80, 90, 100, 120}
    # The one program that holds 32,768 energies puts some on the stack.
    assert {one["name"] for one in found if one["stack"]} <= {"heaviest_kernel"}
    pack = [one for one in found if one["name"] == "pack_heavy_kernel"]
    assert pack and all(one["widest load"] == 16 and one["widest store"] == 16 for one in pack)


@needs_loops
def test_a_kernel_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gradient(64, 64, torch.bfloat16)
    monkeypatch.setattr(heavy_pack, "_found", {})
    assert heavy_pack.heavy_fault(x, 0.1, layouts.PLAIN) is None
    monkeypatch.setattr(heavy_pack, "_found", {})
    wrong = heavy_pack.pack_heavy
    monkeypatch.setattr(
        heavy_pack, "pack_heavy", lambda x, rows, *more: wrong(x, rows.flip(0) * 0 + rows[0], *more)
    )
    fault = heavy_pack.heavy_fault(x, 0.1, layouts.PLAIN)
    assert fault is not None and "differs from its reference in" in fault
    too_many = torch.empty(heavy_pack.MOST_ROWS + 1, 16, dtype=torch.bfloat16)
    assert "more than the 32768" in (heavy_pack.heavy_fault(too_many, 0.1, layouts.PLAIN) or "")
