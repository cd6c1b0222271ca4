"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest
import torch

# Without a GPU kernels run in Triton's interpreter. Triton reads this when it is first imported,
# by whichever test module comes first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none; fail it where SDGP_REQUIRE_GPU=1 promises one."""
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    reason = "torch sees no CUDA device"
    if os.environ.get("SDGP_REQUIRE_GPU") == "1":
        pytest.fail(f"SDGP_REQUIRE_GPU=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give each test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_prepared() -> None:
    """Let each test prepare its calls and hear its warnings, whatever ran before it."""
    from sdgp_cusparselt.products import dispatch

    dispatch.forget()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a test learns away from the user's cache and from other tests."""
    monkeypatch.setenv("SDGP_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print as into a pipe: what starts the tests may have told them a terminal's width."""
    monkeypatch.delenv("COLUMNS", raising=False)
