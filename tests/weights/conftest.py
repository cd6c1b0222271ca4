"""The emulator and a backend on it, for products of packed weights."""

import pytest

from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.products import packed_weights, routes
from sdgp_cusparselt.tuning import store
from tests.backends.conftest import backend, emulator

__all__ = ["backend", "emulator"]


@pytest.fixture
def emulated(
    backend: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> CusparseLtBackend:
    """The backend as dispatch sees it on a machine with a GPU, with a decision cache of its own."""
    monkeypatch.setattr(routes, "LIBRARY", backend)
    monkeypatch.setattr(store, "_default", store.TuningCache(tmp_path / "decisions"))
    packed_weights.forget()
    return backend
