"""The cuSPARSELt backend on CPU tensors, against the emulator."""

from collections.abc import Iterator
from pathlib import Path

import pycusparselt as cslt
import pytest
from torch import Tensor

from sdgp_cusparselt.backends import masking
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.products import packed_weights, routes
from sdgp_cusparselt.tuning import store
from tests.emulator.build import build
from tests.emulator.control import Emulator


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """The emulator, as new; a leaked object fails the test."""
    emulator = Emulator(build())
    emulator.reset()
    before = emulator.live()
    yield emulator
    assert emulator.live() == before
    emulator.reset()


@pytest.fixture
def backend(emulator: Emulator) -> Iterator[CusparseLtBackend]:
    """A backend that runs on CPU tensors through the emulator."""
    backend = CusparseLtBackend(Machine("cpu", cslt.load(emulator.path)))
    yield backend
    backend.plans.clear()


@pytest.fixture
def emulated(
    backend: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> CusparseLtBackend:
    """The backend as dispatch sees it on a machine with a GPU, with a decision cache of its own."""
    monkeypatch.setattr(routes, "LIBRARY", backend)
    monkeypatch.setattr(store, "_default", store.TuningCache(tmp_path / "decisions"))
    packed_weights.forget()
    return backend


@pytest.fixture
def packs(emulated: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each weight that was packed was packed along its outputs."""
    found: list[bool] = []
    real = packed_weights.PrunedWeight._packed

    def counting(weight: packed_weights.PrunedWeight, along: int, pack: object) -> Tensor:
        found.append(along == masking.OUTPUTS)
        return real(weight, along, pack)

    monkeypatch.setattr(packed_weights.PrunedWeight, "_packed", counting)
    return found
