"""Shorter races, which decide nothing here, and a cache whose clock is the test's own."""

from pathlib import Path

import pytest

from sdgp_cusparselt.tuning import TuningCache, contest
from sdgp_cusparselt.tuning.session import Session
from tests.tuning.auto_cases import Clock


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "FINAL_ROUNDS", 7)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(tmp_path: Path, clock: Clock) -> TuningCache:
    return TuningCache(tmp_path, session=Session(clock=clock))
