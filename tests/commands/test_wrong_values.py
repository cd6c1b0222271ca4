"""Every option of every command, given values that make no sense: one sentence, no traceback."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sdgp_cusparselt.commands import bench, check, quality, train
from sdgp_cusparselt.commands.parser import build_parser, main
from sdgp_cusparselt.training.run import Stopped

#: What a command needs besides the option under test; none of it does any work.
BASE = {
    "plan": ["--model", f"{__name__}:tiny", "--shape", "16x16", "--gpu", "A100"],
    "check": ["--device", "cpu"],
    "info": ["--layout", "plain"],
    "bench": ["--parts", "machine"],
    "train": ["digits", "--methods", "dense", "--steps", "1"],
    "quality": ["digits", "--steps", "2"],
    "tune": ["--model", f"{__name__}:tiny", "--shape", "16x16"],
}
NASTY = ["", " ", "0", "-1", "-", "x", "1.5", "nan", "inf", "-inf", "1e400", "9" * 30, "3x", "x3"]
NASTY += [
    "0x3",
    "3x-1",
    "1_0",
    "None",
    "é",
    "\udce9",
    "a" * 5000,
    "/proc/version/x",
    "/",
    ".",
    "..",
]
NASTY += ["/dev/null/x", "dense,dense", "magnitude@0:0", "cuda:99", "cuda:-1", "meta", "cpu:3", ":"]
NASTY += [
    "os:",
    ":path",
    "os:no_such",
    "builtins:int",
    "transformers:",
    "transformers:/",
    "mine.toml",
]


def tiny() -> nn.Module:
    return nn.Linear(16, 16)


def options(command: str) -> list[str]:
    parser = build_parser(command)
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    own = commands.choices[command]._actions
    return [a.option_strings[0] for a in own if a.option_strings and a.nargs != 0]


OPTIONS = [(command, option) for command in BASE for option in options(command)]


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Arguments are read and checked, then nothing is trained or measured."""

    def stop(*_: Any) -> None:
        raise Stopped("stopped")

    monkeypatch.setattr(train, "run_sweep", stop)
    monkeypatch.setattr(quality, "_print", lambda *_: None)
    monkeypatch.setattr(quality, "dense_trainer", lambda *_: argparse.Namespace(model=tiny()))
    monkeypatch.setattr(quality, "measure", lambda *_: [])
    monkeypatch.setattr(bench, "_measure", lambda *_: (1, "nothing"))
    monkeypatch.setattr(check, "CASES", ())
    monkeypatch.setattr("sdgp_cusparselt.planner.plot.plot", lambda *_: None)
    monkeypatch.setattr("sdgp_cusparselt.packing.drawing.draw_png", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    yield


def run(command: str, *arguments: str) -> int:
    """Run a command to its exit code; --help and --version are the only SystemExit."""
    return main([command, *BASE[command], *arguments])


def assert_said_in_one_sentence(code: int, command: str, err: str) -> None:
    assert "Traceback" not in err
    if code == 2:
        said = err.splitlines()
        assert said[-1].startswith("sdgp"), err
        assert len(said) == 1 + (command == "bench" and "No CUDA device" in said[0]), err


@pytest.mark.parametrize("command, option", OPTIONS)
def test_nasty_values(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    codes = set()
    for value in NASTY:
        code = run(command, f"{option}={value}")
        codes.add(code)
        assert_said_in_one_sentence(code, command, capsys.readouterr().err)
    assert codes <= {0, 1, 2, 128, 130, 143} and (2 in codes or option in FREE), codes


#: Options whose values mean something to others: patterns, folders that need not exist, and what
#: pytest reads (tests/bench/test_command.py).
FREE = ("--exclude", "--results", "--data", "--models", "--tokens")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    place=st.sampled_from([pair for pair in OPTIONS if pair[1] != "--model"]),
    value=st.text(max_size=12) | st.integers().map(str) | st.floats().map(str),
)
def test_any_text(place: tuple[str, str], value: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, option = place
    code = run(command, f"{option}={value.replace(chr(0), '0')}")
    assert_said_in_one_sentence(code, command, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["--batch", "--sequence", "--resolution", "--limit"])
def test_numbers_out_of_range_are_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", f"{name}=-3") == 2
    least = 0 if name == "--limit" else 1
    words = f"sdgp plan: argument {name}: must be a whole number of at least {least}, got '-3'"
    assert capsys.readouterr().err == f"{words}; see sdgp plan --help\n"


def test_a_model_that_fails_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", f"{__name__}:tiny", "--shape", "3x5"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sdgp plan: {__name__}:tiny cannot be planned: RuntimeError: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["plan"], ["train"], ["no-such"], [], ["plan", "--no-such"]])
def test_what_is_missing_or_unknown(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("sdgp") and "--help" in err


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDGP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="--parts must be some of"):
        run("bench", "--parts=none")


@pytest.mark.parametrize("command", ["info", "check", "plan"])
def test_json_means_the_same_everywhere(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "out.json"
    assert run(command, "--json", str(path)) == 0
    assert capsys.readouterr().out, "the report is printed beside the file"
    written = path.read_text()
    assert run(command, "--json", "-") == 0
    assert capsys.readouterr().out == written, "and stdout is the JSON alone"
    assert run(command, "--json", "-", "--quiet") == 0
    assert capsys.readouterr().out == written
    assert run(command, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "-").exists()
