"""sdgp tune: what to tune, from a file, a model or a recorded run, and what it says."""

import json
from collections.abc import Iterator
from pathlib import Path

import pycusparselt as cslt
import pytest
import torch
from torch import nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.gemm import Gemm
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.commands.parser import main
from sdgp_cusparselt.products import routes
from sdgp_cusparselt.tuning import note, record_shapes, store
from sdgp_cusparselt.tuning.shapes import read_shapes
from tests.emulator.build import build
from tests.emulator.control import Emulator
from tests.tuning.fakes import CPU

#: In this process, whose calls the emulator counts.
TUNE = ("tune", "--in-process")


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 48), nn.Linear(48, 5))


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Emulator]:
    emulator = Emulator(build())
    emulator.reset()
    emulator.max_alg_id(2)
    backend = CusparseLtBackend(Machine("cpu", cslt.load(emulator.path)))
    monkeypatch.setattr(routes, "LIBRARY", backend)
    monkeypatch.setattr(store, "_default", store.TuningCache(tmp_path / "cache"))
    yield emulator
    backend.plans.clear()
    emulator.reset()


def test_a_file_of_shapes(
    emulator: Emulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = tmp_path / "shapes.csv"
    shapes.write_text(
        "m, n, k, dtype, method, transpose\n"
        "32, 16, 48, bfloat16, ,\n"
        "32, 16, 48, bfloat16, magnitude, false\n"
        "48, 16, 48, bfloat16, magnitude, false\n"
        "64, 16, 32, float16, mvue, true\n"
    )
    out = tmp_path / "out.json"
    assert main([*TUNE, "--shapes", str(shapes), "--json", str(out)]) == 0
    decisions = json.loads(out.read_text())["decisions"]
    # Tokens are those of the bucket: M of grad_input, K of grad_weight.
    assert [(d["m"], d["k"], d["dtype"], d["method"], d["transpose"]) for d in decisions] == [
        (64, 48, "bfloat16", "mvue", False),
        (64, 48, "bfloat16", "magnitude", False),
        (64, 64, "float16", "mvue", True),
    ]
    captured = capsys.readouterr()
    assert "M=64 N=16 K=48 bfloat16 row" in captured.out and "mvue transposed" in captured.out
    assert captured.err == "", "no progress bar where stderr is no terminal"
    before = emulator.calls("cusparseLtMatmul")
    assert main([*TUNE, "--shapes", str(shapes)]) == 0
    assert emulator.calls("cusparseLtMatmul") == before, "the cache has them"
    assert main([*TUNE, "--shapes", str(shapes), "--force"]) == 0
    assert emulator.calls("cusparseLtMatmul") > before


def test_a_model_gives_the_products_that_dispatch_would_ask_for(
    emulator: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "tests.tuning.test_command:tiny", "--batch", "24", "--shape", "16"]
    assert main([*TUNE, *arguments, "--json", "-"]) == 0
    decisions = json.loads(capsys.readouterr().out)["decisions"]
    # The first layer reads the data and the last writes 5 outputs, which 16 does not divide.
    assert [(d["m"], d["n"], d["k"], d["dense_order"]) for d in decisions] == [(64, 32, 48, "row")]


def test_grad_weight_and_an_interruption(
    emulator: Emulator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--model", "tests.tuning.test_command:tiny", "--batch", "40", "--shape", "16"]
    arguments += ["--grad-weight", "mvue"]
    assert main([*TUNE, *arguments, "--json", "-"]) == 0
    decisions = json.loads(capsys.readouterr().out)["decisions"]
    found = [(d["m"], d["n"], d["k"], d["method"]) for d in decisions if d["transpose"]]
    assert found == [(32, 16, 64, "mvue"), (48, 32, 64, "mvue")]

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sdgp_cusparselt.commands.tune.tune", interrupted)
    assert main([*TUNE, *arguments]) == 130
    assert "interrupted; 0 decisions are stored" in capsys.readouterr().err


def test_transformers_conv1d_is_column_major(
    emulator: Emulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    config.write_text(json.dumps({"model_type": "gpt2", **sizes}))
    arguments = ["--model", f"transformers:{config}", "--batch", "2", "--sequence", "8"]
    assert main([*TUNE, *arguments, "--json", "-"]) == 0
    decisions = json.loads(capsys.readouterr().out)["decisions"]
    assert {(d["n"], d["k"], d["dense_order"]) for d in decisions} == {
        (32, 96, "col"),
        (32, 32, "col"),
        (32, 128, "col"),
        (128, 32, "col"),
    }


def test_without_a_usable_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = CusparseLtBackend(Machine("cuda"))
    reasons = ["torch sees no CUDA device"]
    monkeypatch.setattr(absent.machine, "hardware_reasons", lambda *_: reasons)
    monkeypatch.setattr(routes, "LIBRARY", absent)
    assert main([*TUNE, "--shapes", "nothing.json"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "sdgp tune: nothing to tune on this machine: torch sees no CUDA device\n"
    )
    assert captured.out == ""


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.json", "[", "must be JSON or CSV"),
        ("a.json", "{}", "must be a list of objects"),
        ("a.json", '[{"m": 1, "n": 2}]', "number 1 ('k')"),
        ("a.json", '[{"m": 1, "n": 2, "k": "3"}]', "a size must be an int, got '3'"),
        ("a.json", '[{"m": 1, "n": 2, "k": 3, "dtype": "bfloat"}]', "got 'bfloat'"),
        ("a.json", '[{"m": 1, "n": 2, "k": 3, "dtype": "int"}]', "bfloat16 or float16, got int"),
        ("a.csv", "m,n,k,method\n1,2,3,best", "method must be one of none, random"),
        ("a.csv", "m,n,k,transpose\n1,2,3,maybe", "transpose must be true or false"),
        ("a.json", "[]", "no product to tune"),
    ],
)
def test_bad_files(
    emulator: Emulator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    words: str,
) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert main([*TUNE, "--shapes", str(path)]) == 2
    assert words in capsys.readouterr().err
    assert main([*TUNE, "--shapes", str(tmp_path / "missing.json")]) == 2
    assert "missing.json" in capsys.readouterr().err


def test_what_a_run_asked_for_can_be_tuned(tmp_path: Path) -> None:
    first = Gemm(24, 32, 48, torch.bfloat16, "row", CPU)
    second = Gemm(48, 32, 16, torch.float16, "col", CPU)
    note(first, method="magnitude", transpose=False)
    with record_shapes() as outer, sdgp.record_shapes() as inner:
        note(first, method="magnitude", transpose=False)
        for _ in range(3):
            note(second, method="mvue", transpose=True)
    note(first, method="magnitude", transpose=False)
    assert len(outer) == len(inner) == 2 and sum(inner.counts.values()) == 4
    path = tmp_path / "shapes.json"
    inner.write(path)
    assert [row["calls"] for row in json.loads(path.read_text())] == [3, 1]
    assert read_shapes(path, CPU) == [
        (second, "mvue", True, "mm"),
        (first, "magnitude", False, "mm"),
    ]


def test_recorded_in_one_run_tuned_and_read_in_the_next(emulator: Emulator, tmp_path: Path) -> None:
    def step(**kwargs: object) -> nn.Module:
        model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 48)).bfloat16()
        sdgp.convert_(model, sdgp.SDGPConfig(tune="ahead", grad_weight="sparse", **kwargs))
        input = torch.randn(3, 7, 16, dtype=torch.bfloat16, requires_grad=True)
        model(input).float().square().sum().backward()
        return model

    with sdgp.record_shapes() as shapes, pytest.warns(sdgp.SDGPFallbackWarning) as caught:
        step()
    assert len(caught) == 1 and "run sdgp tune" in str(caught[0].message)
    shapes.write(tmp_path / "shapes.json")
    assert main([*TUNE, "--shapes", str(tmp_path / "shapes.json")]) == 0
    store.default_cache().forget()
    for entry in sdgp.telemetry(step(backend="cusparselt", telemetry_every=1)).layers:
        assert entry["calls"] == {"sparse": 1} and not entry["fallbacks"]
        assert set(entry["median_us"]) == {"pack", "matmul", "total"}
        assert 0 < entry["gradient_error"]["relative_l2"] < 1


def test_products_of_a_pruned_weight_are_tuned_ahead(emulator: Emulator, tmp_path: Path) -> None:
    config = sdgp.SDGPConfig(
        prune="none", forward="sparse_weight", grad_input="weight", tune="ahead"
    )

    def step(**kwargs: object) -> nn.Module:
        model = nn.Sequential(nn.Linear(32, 64)).bfloat16()
        sdgp.convert_(model, config.replace(**kwargs))
        input = torch.randn(24, 32, dtype=torch.bfloat16, requires_grad=True)
        model(input).float().square().sum().backward()
        return model

    with sdgp.record_shapes() as shapes, pytest.warns(sdgp.SDGPFallbackWarning):
        step()
    path = tmp_path / "shapes.json"
    shapes.write(path)
    assert {entry["rival"] for entry in json.loads(path.read_text())} == {"linear"}
    assert main([*TUNE, "--shapes", str(path)]) == 0
    store.default_cache().forget()
    calls = step(backend="cusparselt")[0].sdgp_record.calls
    assert calls["output", "sparse"] == 1 and calls["grad_input", "sparse"] == 1


def test_products_with_another_rival_are_left_out(
    emulator: Emulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "shapes.json"
    entry = {"m": 16, "n": 16, "k": 32}
    path.write_text(json.dumps([entry, {**entry, "rival": "conv 3x3 stride 1"}]))
    assert main([*TUNE, "--shapes", str(path)]) == 0
    assert "1 products left out: k x k convolutions run plain" in capsys.readouterr().err


def test_a_search_in_a_process_of_its_own(
    emulator: Emulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The child opens the library anew: what this process made of the emulator is not there."""
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps([{"m": 16, "n": 16, "k": 32}, {"m": 50, "n": 16, "k": 32}]))
    assert main(["tune", "--shapes", str(path), "--json", "-"]) == 0
    (decision,) = json.loads(capsys.readouterr().out)["decisions"]
    assert decision["candidate"] is not None and decision["conditions"]["candidates_timed"] == 4
    assert emulator.calls("cusparseLtMatmul") == 0, "nothing is tried in this process"
    (stored,) = store.default_cache().decisions(routes.LIBRARY, CPU)
    assert stored.as_dict() == decision


@pytest.mark.gpu
def test_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_default", store.TuningCache(tmp_path))
    path = tmp_path / "shapes.json"
    path.write_text('[{"m": 4096, "n": 4096, "k": 4096}, {"m": 17, "n": 64, "k": 64}]')
    assert main(["tune", "--shapes", str(path), "--json", str(tmp_path / "out.json")]) == 0
    decisions = json.loads((tmp_path / "out.json").read_text())["decisions"]
    for decision in decisions:
        assert decision["candidate"] is not None, decision["rejected"]
        wins = decision["sparse_us"] <= 0.98 * decision["dense_us"]
        assert decision["use"] == ("sparse" if wins else "dense")
