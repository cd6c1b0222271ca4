"""float16 on sm90 is used only after a self-test in a process of its own."""

import pycusparselt as cslt
import pytest
import torch

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends import float16, selftest
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.gemm import Gemm
from tests.emulator.control import Bad, Emulator

GEMM = Gemm(64, 64, 64, torch.float16, "row", torch.device("cpu"))


def test_a_sound_library_passes_once(backend: CusparseLtBackend, monkeypatch) -> None:
    backend.machine.cpu_capability = (9, 0)
    assert backend.candidates(GEMM)
    monkeypatch.setattr(float16, "_run", None)  # a second test would raise
    assert backend.candidates(GEMM)


@pytest.mark.parametrize("kind", ["missing library", "hangs"])
def test_a_failing_self_test_is_named_and_remembered(
    backend: CusparseLtBackend, emulator: Emulator, monkeypatch, tmp_path, kind: str
) -> None:
    backend.machine.cpu_capability = (9, 0)
    if kind == "hangs":
        monkeypatch.setattr(float16, "TIMEOUT_S", 0.01)
        words = "did not end within"
    else:
        broken = cslt.load(emulator.path)
        monkeypatch.setattr(broken, "path", str(tmp_path / "nowhere.so"))
        words = "nowhere.so"
    for _ in range(2):
        with pytest.raises(sdgp.NotSupportedError, match=f"float16 failed its self-test.*{words}"):
            backend.candidates(GEMM)
        monkeypatch.setattr(float16, "_run", None)
    bf16 = Gemm(64, 64, 64, torch.bfloat16, "row", torch.device("cpu"))
    assert backend.candidates(bf16)


@pytest.mark.parametrize(
    "alg_id, kind, words",
    [
        (0, Bad.GIVES_NAN, "Candidate(alg_id=0"),
        (0, Bad.ALWAYS_WRONG, "out of bound"),
        (12, Bad.FAILS_AT_MATMUL, "EXECUTION_FAILED"),
        (17, Bad.ALWAYS_WRONG, ""),  # left to the proof before its use
        (20, Bad.NOT_SUPPORTED_AT_PLAN, ""),
        (3, Bad.FAILS_AT_MATMUL, ""),  # not offered in this process
    ],
)
@pytest.mark.parametrize("order", selftest.ORDERS)
def test_every_algorithm_that_will_be_offered_is_run(
    backend: CusparseLtBackend, emulator: Emulator, order: str, alg_id: int, kind: Bad, words: str
) -> None:
    backend.machine.cpu_capability = (9, 0)
    emulator.max_alg_id(21)
    emulator.bad_algorithm(alg_id, kind)
    gemm = Gemm(64, 24, 128, torch.float16, order, torch.device("cpu"))  # type: ignore[arg-type]
    found = selftest.product_fault(backend, gemm)
    assert words in found and bool(found) == bool(words)
    run = emulator.calls("cusparseLtMatmul")
    if not words:
        assert run == len(backend.offered(gemm)) - (kind == Bad.NOT_SUPPORTED_AT_PLAN)


def test_only_sm90_is_tested(backend: CusparseLtBackend, monkeypatch) -> None:
    monkeypatch.setattr(float16, "_run", None)
    assert backend.candidates(GEMM)
