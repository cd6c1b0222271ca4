"""What the kernels cost by their machine code: every variant inside its budget, on every card.

The kernels are compiled in a process of their own, because Triton decides at import whether they
are interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="there is nothing to compile without Triton")
from bench import pack_budget, pack_count, pack_produced, sass
from bench.pack_model import CARDS, Pass, clones, partial_sectors
from sdgp_cusparselt.packing import halves, variants
from sdgp_cusparselt.packing import layout as layouts

ROOT = Path(__file__).parents[2]
Reports = list[dict[str, Any]]


def run(folder: Path, *arguments: str, timeout: int = 900) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'bindings'}")
    environment.pop("TRITON_INTERPRET", None)
    # A cache of its own: what is tested is this compiler, not what another one left behind.
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=timeout
    )


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    done = run(tmp_path_factory.mktemp("triton"), "-m", "bench.pack_budget", "--quick", "--json")
    assert done.stdout, done.stderr[-4000:]
    found: Reports = json.loads(done.stdout)
    assert done.returncode == int(any(one["over"] for one in found))
    return found


def test_no_common_variant_leaves_its_budget(reports: Reports) -> None:
    assert {one["name"]: one["over"] for one in reports if one["over"]} == {}
    compiled = {one["case"]["target"] for one in reports}
    assert compiled == set(pack_count.TARGETS)
    made = [one for one in reports if one["kind"] == "produced"]
    assert {one["case"]["producer"] for one in made} == set(variants.PRODUCER_CODES)
    for one in made:
        for card, ratio in one["modelled_floors"].items():
            assert ratio <= pack_produced.LIMIT or card not in pack_produced.LIMITED
    # The model is about bytes: it can promise no less than what they take.
    for one in reports:
        for ratio in one["modelled_clones"].values():
            assert ratio >= one["bytes"] / 4 - 1e-9


def test_every_branch_of_ptx_is_in_the_kernels(reports: Reports) -> None:
    """The instructions that the tests emulate are the ones that were assembled."""
    found: dict[str, set[str]] = {"bfloat16": set(), "float16": set()}
    for one in reports:
        found[one["case"]["dtype"]] |= set(one["ptx"])
    for dtype, suffix in (("bfloat16", "BF16"), ("float16", "FP16")):
        for name in ("PERMUTE", f"RAISE_{suffix}"):
            text = str(getattr(halves, f"PTX_{name}").value)
            for opcode in ("prmt", "cvt", "abs", "max", "lop3", "fma"):
                for word in text.replace(";", " ").split():
                    if word.startswith(f"{opcode}."):
                        assert word in found[dtype], (dtype, word)
    every = set().union(*(one["ptx"] for one in reports if one["kind"] != "produced"))
    assert {"setp.lt.f32", "setp.gt.and.f32", "selp.b32", "or.b32"} <= every
    assert not [opcode for opcode in every if ".ftz" in opcode]
    # The reference rounds after every operation; a contracted product would not.
    assert "fma.rn.f32" not in every
    # What makes gradients asks for each fused product by name; nothing is contracted behind it.
    made = set().union(*(one["ptx"] for one in reports if one["kind"] == "produced"))
    assert {"ex2.approx.ftz.f32", "rcp.approx.ftz.f32", "fma.rn.f32"} <= made
    assert not [op for op in made if ".ftz" in op and not op.startswith(("ex2.", "rcp."))]


def test_a_kernel_that_is_not_promised_alignment_is_caught(tmp_path: Path) -> None:
    script = """
import torch
from bench import pack_budget, pack_count, pack_produced, sass
from sdgp_cusparselt.packing import layout, variants
target = variants.Target("magnitude", layout.PLAIN)
tile = variants.choose_tile(4096, 4096, target, None)
constants = variants.PackVariant(torch.bfloat16, target, None, tile).constants(True)
compiled = pack_count.compile_kernel("pack_kernel", constants, tile.num_warps, 90, aligned=False)
print(sorted(sass.read(compiled, 90).accesses))
"""
    done = run(tmp_path, "-c", script)
    assert "('LDG', 4)" in done.stdout and "('LDG', 16)" not in done.stdout, done.stderr[-2000:]


def code(**pipes: int) -> sass.Code:
    counted = sass.Counter(pipes)
    return sass.Code(counted, sass.Counter(), 32, 0, 0, 4, 32, 0)


def test_the_model_takes_the_slower_of_instructions_and_bytes() -> None:
    h100 = next(card for card in CARDS if card.name == "H100")
    light = Pass(code(alu=10), 8192, 3.125)
    assert clones([light], h100) == pytest.approx(3.125 / 4)
    assert clones([light, light], h100) == pytest.approx(3.125 / 2)
    # 4 warps of 2,048 instructions each at half rate, 8,192 elements: one cycle of two per element.
    heavy = Pass(code(alu=2048), 8192, 3.125)
    seconds = 2 / (132 * 4 * 1.70e9)
    assert heavy.seconds_per_element(h100) == pytest.approx(seconds)


def test_a_producer_bound_by_instructions_is_named() -> None:
    h100 = next(card for card in CARDS if card.name == "H100")
    # 6.25 bytes take 60.9 cycles of a scheduler for 32 elements; 4 warps on 8,192 elements.
    light, heavy = (Pass(code(alu=n), 8192, 6.25) for n in (1900, 2100))
    assert pack_produced.floor_ratio(light, h100) == 1
    assert pack_produced.floor_ratio(heavy, h100) == pytest.approx(65.6 / 60.9, rel=1e-2)
    case = pack_produced.ProducedCase("gelu", "mvue", "mvue", 90)
    answer: dict[str, Any] = {
        "modelled_floors": {"H100": 1.06, "H200": 1.5},
        "stack": 8,
        "loads": [2, 16],
        "stores": [4, 16],
    }
    reasons = " ".join(pack_produced.over_budget(case, answer))
    assert "H100: 1.060 of the time of its bytes" in reasons and "H200" not in reasons
    assert "8 bytes of stack" in reasons and "accesses of [2] bytes" in reasons


def test_what_is_over_budget_is_named() -> None:
    case = pack_budget.Case("mvue", None, "blocked", 90)
    answer: dict[str, Any] = {
        "modelled_clones": {"H100": 0.81, "H200": 0.90},
        "stack": 8,
        "loads": [2, 16],
        "stores": [4, 16],
        "half_filled": 0.5,
    }
    reasons = " ".join(pack_budget.over_budget(case, answer))
    for words in ("H100: 0.810 clones", "8 bytes of stack", "loads of [2]", "0.50 of the sectors"):
        assert words in reasons
    assert "H200" not in reasons and "stores" not in reasons


def test_partial_sectors() -> None:
    assert partial_sectors(layouts.BLOCKED, 32, 256) == 0
    # 16 rows of PLAIN leave out row bit 4, a fourth of whose words is one of a sector's two halves.
    assert partial_sectors(layouts.PLAIN, 16, 256) == 1


def test_an_unknown_opcode_is_refused() -> None:
    with pytest.raises(ValueError, match="FOO.BAR"):
        sass._pipe("FOO.BAR")


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        pack_budget.main(["--quick"])


@pytest.mark.slow
def test_no_variant_leaves_its_budget(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "bench.pack_budget", "--json", timeout=7200)
    assert done.stdout, done.stderr[-4000:]
    assert {one["name"]: one["over"] for one in json.loads(done.stdout) if one["over"]} == {}


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in pack_budget.cases(quick=False)]
    assert len(set(names)) == len(names) > 300
    assert {case.name for case in pack_budget.cases(quick=True)} - set(names) == {
        "both mvue and magnitude sums fp16 plain sm_80"
    }
    made = [case.name for case in pack_produced.produced_cases(quick=False)]
    assert len(set(made)) == len(made) > 300
    assert torch.bfloat16 == getattr(torch, pack_budget.Case("mvue", None, "plain", 80).dtype)
