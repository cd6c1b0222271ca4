"""The calls for a GPU are right before there is one: they parse, select something, and fit."""

import csv
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sdgp_cusparselt as sdgp
from bench import campaign
from bench.campaign import STAGES, Stage
from sdgp_cusparselt.commands import bench, parser, train
from sdgp_cusparselt.training.recipe_file import open_task
from sdgp_cusparselt.training.sweep import check_methods
from sdgp_cusparselt.tuning.shapes import read_shapes
from tests.bench.conftest import ROOT, run_python

COMMANDS = [(stage, command) for stage in STAGES for command in stage.commands]
OF_SDGP = [words[3:] for _, words in COMMANDS if words[:3] == campaign.SDGP]
OF_BENCH = [words for words in OF_SDGP if words[0] == "bench"]
OF_PYTEST = [words for _, words in COMMANDS if words[2] == "pytest"]


def named(words: tuple[str, ...]) -> str:
    return "-".join(word for word in words if "{" not in word)[:60]


def test_every_command_is_known() -> None:
    assert len(OF_SDGP) + len(OF_PYTEST) == len(COMMANDS)
    assert len({stage.name for stage in STAGES}) == len(STAGES)


def test_the_list_runs_anywhere_and_names_each_call_in_order() -> None:
    done = subprocess.run(
        [sys.executable, "bench/campaign.py", "--list"],
        cwd=ROOT,
        env={"OUT": "there"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    calls = [line.split()[-1] for line in done.stdout.split("\n") if "campaign.py" in line]
    assert calls == [stage.name for stage in STAGES]
    assert done.stdout.count("there/") == str(STAGES).count("{out}/")
    make = subprocess.run(
        ["make", "-s", "campaign", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert make.stdout == done.stdout.replace("there/", "build/campaign/")


def test_the_budget_is_kept() -> None:
    assert sum(stage.minutes for stage in STAGES) <= campaign.BUDGET_MINUTES
    assert max(stage.minutes for stage in STAGES) * 60 <= campaign.LIMIT_S <= 9 * 60
    limits = [words[words.index("--time-limit") + 1] for words in OF_BENCH if "--full" in words]
    assert len(limits) == len(OF_BENCH) - 1
    assert all(float(limit) <= campaign.LIMIT_S - 120 for limit in limits), "the last one has time"


@pytest.mark.parametrize("words", OF_SDGP, ids=named)
def test_the_command_line_takes_it(words: tuple[str, ...]) -> None:
    args = parser.build_parser(words[0]).parse_args(words)
    assert args.command == words[0]


@pytest.mark.slow  # collects the benchmarks once a call
@pytest.mark.parametrize("words", OF_BENCH, ids=named)
def test_it_selects_benchmarks_of_every_part_for_a_gpu(words: tuple[str, ...]) -> None:
    args = parser.build_parser("bench").parse_args(words)
    parts = bench._parts(args.parts)
    target = Path("results.json")
    done = run_python(
        *("-m", "pytest", "--collect-only"), *bench._arguments(args, ROOT, parts, target, True)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for part in parts:
        assert f"bench/{bench.PARTS[part]}::" in done.stdout
    for model in filter(None, args.models.split(",")):
        assert f"gpu-{model}" in done.stdout
    assert "cpu-" not in done.stdout


@pytest.mark.slow  # collects the whole suite three times
def test_the_gpu_tests_are_all_there_in_two_calls() -> None:
    def collected(*arguments: str) -> set[str]:
        done = run_python("-m", "pytest", "--collect-only", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return {line for line in done.stdout.split("\n") if "::" in line}

    words = [[w for w in words[3:] if not w.startswith("--junit")] for words in OF_PYTEST]
    first, second = (collected(*arguments) for arguments in words)
    assert first and second and not first & second
    assert first | second == collected("-q", "-m", "gpu", "tests")


def test_the_trained_methods_fit_and_their_products_are_the_tuned_ones() -> None:
    (words,) = (words for words in OF_SDGP if words[0] == "train")
    args = parser.build_parser("train").parse_args(words)
    task, methods = open_task(args.task), train._methods(args)
    check_methods(task, methods)
    (tune,) = (words for words in OF_SDGP if words[0] == "tune")
    path = ROOT / tune[tune.index("--shapes") + 1]
    listed = {
        (k.gemm.m, k.gemm.n, k.gemm.k, k.method, k.transpose)
        for k in read_shapes(path, torch.device("cpu"))
    }
    with torch.device("meta"):
        model = task.build_model()
    tokens = task.recipe.batch_size * model.position_embedding.num_embeddings
    needed = set()
    for method in methods[1:]:
        config = method.config()
        for name in sdgp.convert_(model, config, preset=method.preset).converted:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            n, k = layer.in_features, layer.out_features
            needed.add((tokens, n, k, config.prune, False))
            if config.grad_weight == "sparse":
                needed.add((k, n, tokens, config.grad_weight_prune, True))
        sdgp.revert_(model)
    assert needed == listed
    assert len(list(csv.DictReader(path.open()))) == len(listed)


def test_stages_have_names_and_numbers() -> None:
    assert campaign.find_stage("1") is campaign.find_stage(STAGES[0].name) is STAGES[0]
    with pytest.raises(SystemExit):
        campaign.main(["nothing"])


def python(code: str) -> tuple[str, ...]:
    return ("python", "-c", code)


def test_a_stage_goes_on_after_a_failure_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imports = "import sdgp_cusparselt, pycusparselt, os; print(os.environ['SDGP_REQUIRE_GPU'])"
    stage = Stage(
        "tried", 1, "", (python("raise SystemExit(3)"), python(imports), python("print('{out}')"))
    )
    assert campaign.run_stage(stage, tmp_path / "new") == 3
    logs = [(tmp_path / "new" / f"tried-{number}.log").read_text() for number in (1, 2, 3)]
    assert logs == ["", "1\n", f"{tmp_path / 'new'}\n"]
    printed = capsys.readouterr().out
    assert "exit code 3" in printed and printed.count("exit code 0") == 2


def test_a_stage_that_takes_too_long_is_interrupted_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "LIMIT_S", 3.0)
    code = (
        "import time\ntry:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('saved'); raise SystemExit(130)"
    )
    assert campaign.run_stage(Stage("long", 1, "", (python(code),)), tmp_path) == 130
    assert (tmp_path / "long-1.log").read_text() == "saved\n"
    monkeypatch.setattr(campaign, "GRACE_S", 1.0)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    assert (
        campaign.run_command([sys.executable, "-c", deaf], tmp_path / "log", 2) == -signal.SIGKILL
    )


def test_a_probe_of_ones_own_runs_in_the_first_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(STAGES[0].commands)
    assert len(campaign.commands_of(STAGES[0], Path("out"))) == count
    monkeypatch.setenv("SDGP_PROBE", "mine.py")
    probe = campaign.commands_of(STAGES[0], Path("out"))[-1]
    assert probe == [sys.executable, str(Path("mine.py").resolve()), "--json", "out/probe.json"]
    assert len(campaign.commands_of(STAGES[1], Path("out"))) == len(STAGES[1].commands)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "NEEDED", ("torch", "no_such_module", "no_such.module"))
    assert campaign.missing() == ["no_such_module", "no_such.module"]
