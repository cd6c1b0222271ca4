"""The emulator as the library, and a check after every test that nothing leaked."""

import gc
from collections.abc import Iterator

import pycusparselt as cslt
import pytest

from tests.emulator.build import build
from tests.emulator.control import Emulator


@pytest.fixture(scope="session")
def emulator_library() -> Emulator:
    return Emulator(build())


@pytest.fixture
def emulator(emulator_library: Emulator) -> Iterator[Emulator]:
    """Give the emulator in its initial state; fail where objects outlive the test."""
    emulator_library.reset()
    yield emulator_library
    if any(emulator_library.live().values()):
        gc.collect()  # a tenth of a second with torch loaded, so only where a cycle may be left
    assert emulator_library.live() == {"handle": 0, "mat": 0, "alg": 0, "plan": 0}
    assert emulator_library.order_violations() == 0
    emulator_library.reset()


@pytest.fixture
def lib(emulator: Emulator) -> cslt.Library:
    return cslt.load(emulator.path)


@pytest.fixture
def handle(lib: cslt.Library) -> Iterator[cslt.Handle]:
    with cslt.Handle(lib) as handle:
        yield handle
