"""The kernels compile for every GPU generation, with 16-byte accesses and no spills."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="there is nothing to compile without Triton")
ROOT = Path(__file__).parents[2]
Reports = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'bindings'}")
    environment.pop("TRITON_INTERPRET", None)
    # A cache of its own: what is tested is this compiler, not what another one left behind.
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: Reports = json.loads(done.stdout)
    for name, report in found.items():
        print(f"{name}: {report['registers']} registers, {report['shared']} bytes shared")
    return found


def test_every_target_was_compiled(reports: Reports) -> None:
    compiled = {name.rpartition("sm_")[2] for name in reports}
    assert compiled == {"80", "86", "89", "90", "100", "120"}


def test_x_is_loaded_and_values_are_stored_16_bytes_at_a_time(reports: Reports) -> None:
    for name, report in reports.items():
        if name.startswith("unaligned"):
            continue
        narrow_loads = {"random": {"b64"}, "mvue": {"b64"}, "rescaled": {"b32"}}
        allowed = {"v4.b32"} | narrow_loads.get(name.split()[0], set())
        if name.startswith("rescaled"):
            allowed |= {"v2.b32"}
        assert report["loads"]["v4.b32"] >= 1 and set(report["loads"]) <= allowed, (name, report)
        # Metadata words and column sums are 32 bits; nothing is narrower.
        assert report["stores"]["v4.b32"] >= 1, (name, report)
        assert set(report["stores"]) <= {"v4.b32", "v2.b32", "b32"}, (name, report)


def test_nothing_spills(reports: Reports) -> None:
    for name, report in reports.items():
        assert report["stack"] == 0 and report["local"] == 0, (name, report)
        assert 0 < report["registers"] <= 168, (name, report)


def test_the_check_sees_lost_vectorisation(reports: Reports) -> None:
    """Without the promise of alignment the same kernel falls to narrow accesses."""
    assert "v4.b32" not in reports["unaligned sm_90"]["loads"]
