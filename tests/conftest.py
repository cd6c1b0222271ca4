"""Fixtures that every test may use."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give each test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
