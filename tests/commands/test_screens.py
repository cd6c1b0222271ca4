"""What commands print at 60 and 80 columns, in pipes and on ASCII terminals, to the byte."""

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from sdgp_cusparselt.commands import check, train
from sdgp_cusparselt.commands.console import Output, print_any_text
from sdgp_cusparselt.commands.info import describe
from sdgp_cusparselt.commands.parser import build_parser, main
from sdgp_cusparselt.training.progress import SweepProgress
from sdgp_cusparselt.training.recipe import Recipe
from sdgp_cusparselt.training.report import terminal_table, verdict
from sdgp_cusparselt.training.run import RunSpec
from sdgp_cusparselt.training.tasks import TASKS
from tests.commands.golden import check_golden

ROOT = Path(__file__).parents[2]
TINY = [f"{__name__}:tiny", "--shape", "2048x1024", "--batch", "4", "--results", "nowhere"]

INFO = {
    "python": "3.12.3",
    "torch": "2.13.0",
    "device 0": "NVIDIA H100 80GB HBM3, sm_90, 79 GiB",
    "cusparselt": "0.8.1 at /opt/venv/lib/python3.12/site-packages/nvidia/lib/libcusparseLt.so.0",
    "backend cusparselt": "unavailable: the driver is older than the library asks for; update it",
    "empty": "",
    "layout: device NVIDIA H100 80GB HBM3, cusparselt 0.8.1, alg_id 0, rows>=256 rows%128": (
        "sm90-atom or learned, proven at 256x256, 512x256, 1024x256, 2048x256, 4096x256"
    ),
    "layout: device NVIDIA H100 80GB HBM3, cusparselt 0.8.1, alg_id 1, rows<256": (
        "not proven: the library refused the shape"
    ),
}


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 8192), nn.ReLU(), nn.Linear(8192, 1024))


def widest(text: str) -> int:
    """Columns of the widest line that could have been folded: one of several words."""
    return max((len(line) for line in text.splitlines() if " " in line.strip()), default=0)


@pytest.mark.parametrize("columns", [60, 80])
def test_plan(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["plan", "--model", *TINY]) == 0
    text = capsys.readouterr().out
    check_golden(f"plan-{columns}", text)
    assert widest(text) <= columns
    # The verdict: one sentence for each of the six cards, before anything else.
    sentences = " ".join(text.split("\n\n")[0].split()).split(". ")
    assert [sentence.split(":")[0] for sentence in sentences] == [
        *("A100", "H100", "H200", "L40S", "RTX4090", "B200")
    ]


def test_plan_in_a_pipe_and_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", *TINY]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) < 24 and not [x for x in short.splitlines() if x != x.rstrip()]
    assert main(["plan", "--model", *TINY, "--details", "--gpu", "H100"]) == 0
    text = capsys.readouterr().out
    assert "linear grad_input" in text and "assumption" in text and "data sheet" in text
    assert main(["plan", "--model", *TINY, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", [60, 80])
def test_info(columns: int) -> None:
    text = describe(INFO, columns)
    check_golden(f"info-{columns}", text + "\n")
    assert widest(text) <= columns


def test_info_counts_layouts_beyond_a_few() -> None:
    many = {f"layout: plan {number}": "blocked, proven" for number in range(40)}
    lines = describe({"python": "3.12"} | many, 80).splitlines()
    assert len(lines) < 20 and lines[-1] == "and 34 more layouts: sdgp info --json -"


@pytest.mark.parametrize("columns", [60, 80])
def test_check(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["check"]) == 0
    assert widest(capsys.readouterr().out) <= columns
    real = check.check

    def wrong(backend: Any, case: Any, dtype: Any, device: Any, seed: int) -> Any:
        outcome = real(backend, case, dtype, device, seed)
        return replace(outcome, status=check.MISMATCH, detail="3.1 times its bound")

    monkeypatch.setattr(check, "check", wrong)
    monkeypatch.setattr(check, "CASES", check.CASES[:1])
    assert main(["check", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert text.startswith("emulated is WRONG: 3 out of bound, of 3 products")
    assert text.count("MISMATCH") == 3


def document() -> dict[str, Any]:
    methods = ("dense", "mvue@2:4", "rescaled_magnitude@2:4")
    summary = [
        {
            "method": method,
            "label": method.replace("@", " "),
            "seeds": [0, 1, 2],
            "mean": 97.5 - number / 4,
            "std": 0.25,
            "min": 97.0 - number,
            "max": 98.0,
            "num_not_finite": int(number == 2),
            "difference_mean": -number / 4,
            "difference_std": 0.125,
            "train_loss": 0.5 + number,
            "ms_per_step": 25.5,
            "pruned_flop_share": 1.0 if number else 0.0,
            "backends": ["dense"] if number else ["torch autograd"],
        }
        for number, method in enumerate(methods)
    ]
    return {"task": "digits", "summary": summary}


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_results_of_training(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    metric = TASKS["digits"].metric
    output = Output(build_parser("train").parse_args(["train", "digits"]))
    output.prose(verdict(document(), metric))
    output.print(terminal_table(document(), metric, output.width))
    text = capsys.readouterr().out
    check_golden(f"train-{columns}", text)
    assert widest(text) <= columns


def test_a_verdict_where_nothing_ended() -> None:
    nothing = document()
    for entry in nothing["summary"]:
        entry["mean"] = None
    assert "no pruned run ended with a finite accuracy" in verdict(nothing, TASKS["digits"].metric)


def test_a_verdict_of_dense_alone() -> None:
    alone = document()
    alone["summary"] = [entry for entry in alone["summary"] if entry["method"] == "dense"]
    text = verdict(alone, TASKS["digits"].metric)
    assert text.startswith(f"{alone['task']}: dense ends at 97.50 % accuracy")
    assert text.endswith("nothing was pruned to set beside it.")


def test_a_verdict_says_its_unit_once() -> None:
    digits, code = (verdict(document(), TASKS[name].metric) for name in ("digits", "code-lm"))
    assert "97.25 % accuracy, dense at 97.50" in digits
    assert " bits per byte, dense at" in code and "bits bits" not in code


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    path = os.pathsep.join([environment.pop("first", ""), str(ROOT), str(ROOT / "bindings")])
    return subprocess.run(
        [sys.executable, "-m", "sdgp_cusparselt", *arguments],
        env=os.environ | {"PYTHONPATH": path.lstrip(os.pathsep)} | environment,
        capture_output=True,
        timeout=120,
    )


def test_an_ascii_terminal_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    print_any_text()
    metric = TASKS["digits"].metric
    output = Output(build_parser("train").parse_args(["train", "digits"]))
    output.print(terminal_table(document(), metric, 80))
    output.print("runs/größe \u00d7 2 …\udce9")
    sys.stdout.flush()
    text = written.getvalue().decode("ascii")
    assert "97.50 +- 0.25" in text and "runs/gr??e x 2 .?" in text


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bars_fit_and_carry_the_loss(columns: int, encoding: str) -> None:
    written = io.BytesIO()
    print_any_text()
    stream = io.TextIOWrapper(written, encoding=encoding, errors="sdgp")
    terminal = Console(file=stream, force_terminal=True, width=columns, legacy_windows=False)
    method = train.parse_methods("rescaled_magnitude+grad_weight=mvue")[0]
    with SweepProgress(3, terminal) as bars:
        bars.on_run(RunSpec("code-lm", method, 2, Recipe(steps=9)), 4, 9)
        bars.on_step(torch.tensor(1.25))
        bars.refresh()
    stream.flush()
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", written.getvalue().decode(encoding))
    lines = [line for line in re.split(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n", drawn) if line.strip()]
    assert max(map(len, lines)) <= columns
    assert any("loss 1.25" in line and "5/9" in line for line in lines)


def test_a_reader_that_leaves_is_no_error() -> None:
    command = (
        f"{sys.executable} -m sdgp_cusparselt info --layout plain | true; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'bindings'}"},
        capture_output=True,
        timeout=120,
    )
    assert done.stderr == b"" and done.returncode == 141


@pytest.mark.parametrize(
    "fault", ["raise OSError('libtorch.so: undefined symbol: x')", "import no_such_torch"]
)
def test_a_torch_that_does_not_load_is_reported(fault: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(fault)
    done = run("info", first=str(tmp_path))
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert b"failed: " in done.stdout and b"python" in done.stdout
    done = run("plan", "--model", "resnet-50", first=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr
    assert done.stderr.startswith(b"sdgp plan: ")


def test_a_forced_backend_that_cannot_run_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", "--backend", "cusparselt", "--device", "cpu"]) == 2
    assert "argument --backend: cusparselt cannot run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    config = train.parse_methods("mvue")[0].config("cusparselt")
    assert config is not None and config.on_unsupported == "raise"
