"""``sdgp info`` reports what is there and survives what is not."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pycusparselt
import pytest
import torch
from pycusparselt import loader

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.commands import info, parser
from sdgp_cusparselt.products.operands import LinearGradInput
from sdgp_cusparselt.products.sparse import sparse_product
from tests.emulator.build import build
from tests.emulator.control import Emulator


def test_json_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert parser.main(["info", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"].startswith(torch.__version__.split("+")[0])
    assert report["backend dense"] == "available"
    assert "backend cusparselt" in report and "cusparselt" in report


def test_a_broken_probe_gets_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def _broken() -> dict[str, str]:
        raise OSError("no such thing")

    monkeypatch.setattr(info, "PROBES", (_broken, *info.PROBES))
    assert parser.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "failed: OSError: no such thing" in printed and "backend dense" in printed


def test_a_library_that_does_not_load_is_reported(tmp_path, monkeypatch) -> None:
    junk = tmp_path / "libcusparseLt.so.0"
    junk.write_bytes(b"not a library")
    result = subprocess.run(
        [sys.executable, "-m", "sdgp_cusparselt", "info", "--json", "-"],
        env={"CUSPARSELT_LIBRARY": str(junk), "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "not loaded" in json.loads(result.stdout)["cusparselt"]


def test_a_version_with_known_faults_is_a_line_of_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    emulator = Emulator(build())
    emulator.reset()
    emulator.version(0, 8, 0)
    monkeypatch.setattr(loader, "_libraries", {})
    monkeypatch.setenv(loader.ENVIRONMENT_VARIABLE, str(emulator.path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parser.main(["info", "--json", "-"]) == 0
    emulator.reset()
    report = json.loads(capsys.readouterr().out)
    assert report["cusparselt"].startswith("0.8.0 at ")
    assert "regressions on H100" in report["cusparselt warning"]


def wheel(folder: Path, name: str, version: str) -> None:
    """Write what pip leaves of a wheel that installed libcusparseLt.so.0 into ``folder``."""
    library = folder / "nvidia/cusparselt/lib/libcusparseLt.so.0"
    library.parent.mkdir(parents=True, exist_ok=True)
    library.touch()  # importlib.metadata leaves out what is not there
    record = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (record / "RECORD").write_text("nvidia/cusparselt/lib/libcusparseLt.so.0,,\n")


def test_two_wheels_that_own_one_library_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    wheel(tmp_path, "nvidia-cusparselt-cu13", "0.8.1")
    assert "cusparselt conflict" not in info.collect()
    wheel(tmp_path, "nvidia-cusparselt-cu12", "0.7.1")
    line = info.collect()["cusparselt conflict"]
    assert line.startswith("nvidia-cusparselt-cu12 0.7.1 and nvidia-cusparselt-cu13 0.8.1 both own")
    assert str(tmp_path / "nvidia") in line
    assert "pip uninstall nvidia-cusparselt-cu12 nvidia-cusparselt-cu13," in line


def test_the_command_line_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parser.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in parser.COMMANDS:
        assert name in printed


def test_a_layout_is_drawn(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    png = tmp_path / "layout.png"
    arguments = ["info", "--layout", "blocked", "--rows", "256", "--png", str(png)]
    assert parser.main(arguments) == 0
    assert "blocked" in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")
    assert parser.main(["info", "--layout", "spiral"]) == 2
    assert "must be one of plain, blocked" in capsys.readouterr().err
    assert parser.main(["info", "--layout", "plain", "--cols", "30"]) == 2
    assert parser.main(["info", "--layout"]) == 0
    assert "nothing was learned" in capsys.readouterr().out


def test_learned_layouts_are_listed(
    capsys: pytest.CaptureFixture[str], emulated_backend: CusparseLtBackend
) -> None:
    grad_output, weight = torch.randn(256, 64).bfloat16(), torch.randn(64, 32).bfloat16()
    operands = LinearGradInput(grad_output, weight)
    sparse_product(emulated_backend, operands, sdgp.SDGPConfig(prune="magnitude"))
    assert parser.main(["info", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    (line,) = [value for key, value in report.items() if key.startswith("layout: ")]
    assert line.endswith("proven for 1 plans of 256x64")
    assert parser.main(["info", "--layout", "--rows", "256", "--cols", "64"]) == 0
    assert "256x64 n=32 dense=row alg_id=0" in capsys.readouterr().out


@pytest.fixture
def emulated_backend():
    """A backend on the emulator, which learns a layout by being used."""
    emulator = Emulator(build())
    emulator.reset()
    backend = CusparseLtBackend(Machine("cpu", pycusparselt.load(emulator.path)))
    yield backend
    backend.plans.clear()
