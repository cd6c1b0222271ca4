"""Fixtures that every test may use."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give each test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a test learns away from the user's cache and from other tests."""
    monkeypatch.setenv("SDGP_CACHE_DIR", str(tmp_path / "cache"))
