"""``sdgp info`` reports what is there and survives what is not."""

import json
import subprocess
import sys

import pytest
import torch

from sdgp_cusparselt import cli
from sdgp_cusparselt.commands import info


def test_json_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
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
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "failed: OSError: no such thing" in printed and "backend dense" in printed


def test_a_library_that_does_not_load_is_reported(tmp_path, monkeypatch) -> None:
    junk = tmp_path / "libcusparseLt.so.0"
    junk.write_bytes(b"not a library")
    result = subprocess.run(
        [sys.executable, "-m", "sdgp_cusparselt", "info", "--json"],
        env={"CUSPARSELT_LIBRARY": str(junk), "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "not loaded" in json.loads(result.stdout)["cusparselt"]


def test_the_command_line_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name in printed
