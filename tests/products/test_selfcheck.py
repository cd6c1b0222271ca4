"""sdgp check passes what is right, fails what is wrong, and says what it did not run."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pycusparselt as cslt
import pytest
import torch
from torch import Tensor

from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.commands.parser import main
from sdgp_cusparselt.products import routes
from sdgp_cusparselt.products.operands import (
    Conv2dGradInput,
    Conv2dGradWeight,
    LinearGradInput,
    LinearGradWeight,
    Operands,
)
from sdgp_cusparselt.products.selfcheck import CASES, COMPUTE, CONFIG, DTYPES, check
from tests.emulator.build import build
from tests.emulator.control import Bad, Emulator

CPU = torch.device("cpu")


def forgetful(kind: type[Operands]) -> Callable[[Operands], Tensor]:
    """Emulate, and forget the last pixel, token or feature of one product."""

    def compute(operands: Operands) -> Tensor:
        result = operands.emulated(CONFIG)
        if isinstance(operands, kind):
            result = result.clone()
            result[-1, -1] = 0
        return result

    return compute


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    emulator = Emulator(build())
    emulator.reset()
    backend = CusparseLtBackend(Machine("cpu", cslt.load(emulator.path)))
    monkeypatch.setattr(routes, "LIBRARY", backend)
    yield emulator
    backend.plans.clear()
    emulator.reset()


def outcomes(path: Path, *arguments: str) -> tuple[int, dict[str, object]]:
    code = main(["check", "--device", "cpu", "--json", str(path), *arguments])
    return code, json.loads(path.read_text())


def test_every_backend_passes_and_cases_it_cannot_run_have_reasons(
    emulator: Emulator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One of each kind and product, with odd tokens and strides, and a 3x3.
    cases = (*CASES[1::4], CASES[10])
    monkeypatch.setattr("sdgp_cusparselt.commands.check.CASES", cases)
    code, document = outcomes(tmp_path / "check.json")
    assert code == 0 and document["mismatches"] == 0 and document["unavailable"] == {}
    lines = document["outcomes"]
    assert len(lines) == 2 * len(cases) * len(DTYPES)
    for line in lines:
        assert line["status"] == "ok" or (line["status"], bool(line["detail"])) == ("not run", True)
    dense = [line["status"] for line in lines if line["way"] == "emulated"]
    assert set(dense) == {"ok"}
    sparse = [line for line in lines if line["way"] == "sparse"]
    assert all("float32 runs 1:2" in s["detail"] for s in sparse if s["dtype"] == "float32")
    ok = {(s["product"], s["case"].split()[0]) for s in sparse if s["status"] == "ok"}
    assert ok == {(p, kind) for p in ("grad_input", "grad_weight") for kind in ("linear", "conv")}
    products = sum(s["status"] == "ok" for s in sparse)
    assert emulator.calls("cusparseLtMatmul") == 2 * products  # one of each proves its plan
    text = capsys.readouterr().out
    assert "sparse is right: none out of bound" in text and "emulated is right" in text


def test_a_wrong_library_fails_and_the_element_is_named(
    emulator: Emulator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdgp_cusparselt.commands.check.CASES", CASES[:2])
    emulator.bad_algorithm(0, Bad.WRONG_FROM_256_ROWS)
    code, document = outcomes(tmp_path / "check.json")
    assert code == 1 and document["mismatches"] == 2, "bf16 and fp16 with 257 tokens"
    wrong = [line for line in document["outcomes"] if line["status"] == "MISMATCH"]
    assert {line["way"] for line in wrong} == {"sparse"}
    assert all("out of bound; worst (" in line["detail"] for line in wrong)
    assert "MISMATCH" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind", [LinearGradInput, LinearGradWeight, Conv2dGradInput, Conv2dGradWeight]
)
def test_each_product_is_really_compared(
    kind: type[Operands], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMPUTE, "emulated", forgetful(kind))
    for case in CASES:
        found = check("emulated", case, torch.bfloat16, CPU).status
        layer = "Conv2d" if case.kernel else "Linear"
        expected = kind.product == case.product and kind.__name__.startswith(layer)
        assert found == ("MISMATCH" if expected else "ok"), case.name


def test_an_unavailable_backend_is_listed_and_does_not_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = CusparseLtBackend(Machine("cuda"))
    reasons = ["torch sees no CUDA device"]
    monkeypatch.setattr(absent.machine, "hardware_reasons", lambda *_: reasons)
    monkeypatch.setattr(routes, "LIBRARY", absent)
    monkeypatch.setattr("sdgp_cusparselt.commands.check.CASES", CASES[:1])
    assert main(["check", "--device", "cpu"]) == 0
    assert "sparse is not checked: torch sees no CUDA device" in capsys.readouterr().out


def test_json_on_stdout_and_a_device_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sdgp_cusparselt.commands.check.CASES", CASES[:1])
    assert main(["check", "--device", "cpu", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["outcomes"]
    assert main(["check", "--device", "abacus"]) == 2
    assert "--device: must be" in (said := capsys.readouterr().err) and "'abacus'" in said


def test_precision_flags_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    seen = []

    def look(*args: object) -> None:
        seen.append(matmul.allow_bf16_reduced_precision_reduction)
        raise KeyError

    monkeypatch.setattr("sdgp_cusparselt.commands.check.check", look)
    before = matmul.allow_bf16_reduced_precision_reduction
    with pytest.raises(KeyError):
        main(["check", "--device", "cpu"])
    assert seen == [False] and matmul.allow_bf16_reduced_precision_reduction == before


@pytest.mark.gpu
def test_this_gpu() -> None:
    assert main(["check", "--device", "cuda"]) == 0
