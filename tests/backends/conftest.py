"""The cuSPARSELt backend on CPU tensors, against the emulator."""

from collections.abc import Iterator

import pycusparselt as cslt
import pytest

from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.machine import Machine
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
