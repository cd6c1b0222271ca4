"""Shorter races: what these tests decide does not depend on the number of rounds."""

import pytest

from sdgp_cusparselt.tuning import contest


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "FINAL_ROUNDS", 7)
