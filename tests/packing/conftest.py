"""Kernels run on the GPU where there is one, and otherwise in Triton's interpreter on the CPU."""

import os

import pytest
import torch

# Read when the kernel module is imported, which happens at the first launch.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where kernels run in this test."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are compiled for it, not interpreted")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return str(request.param)
