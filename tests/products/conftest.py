"""Fixtures of the products' tests."""

from collections.abc import Iterator
from pathlib import Path

import pycusparselt as cslt
import pytest

from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.products import routes
from sdgp_cusparselt.tuning import store
from tests.emulator.build import build
from tests.emulator.control import Emulator
from tests.products.worlds import World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    """The backend as routes see it on a machine with a GPU, with decisions of its own."""
    emulator = Emulator(build())
    emulator.reset()
    backend = CusparseLtBackend(Machine("cpu", cslt.load(emulator.path)))
    monkeypatch.setattr(routes, "LIBRARY", backend)
    monkeypatch.setattr(store, "_default", store.TuningCache(tmp_path / "decisions"))
    yield World(emulator=emulator, backend=backend, patch=monkeypatch)
    backend.plans.clear()
    emulator.reset()
