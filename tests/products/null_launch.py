"""The hot path of a GPU on a CPU: launches and products that do nothing, seeds as CUDA has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pycusparselt as cslt
import pytest
import torch
from torch import Tensor

from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.packing.launch import PreparedPack
from sdgp_cusparselt.products import dispatch, packers, routes, sparse
from tests.emulator.build import build
from tests.emulator.control import Emulator

CUDA = torch.device("cuda:0")
#: Answers from C, as the generator of a CUDA device does.
GENERATOR = SimpleNamespace(device=CUDA, get_offset=int, set_offset=abs, initial_seed=int)


def launch(*arguments: object) -> None:
    """Stand in for Triton's launcher, a function in Python that calls C."""


def start(stream: int, *given: int) -> None:
    """Stand in for what ``prepare_pack`` compiles and folds."""
    launch(1, 1, 1, stream, 0, (), None, None, None, *given)


class NullPacker(packers.KernelPacker):
    """The kernel's packer, whose kernel is never started."""

    def __init__(self, x: Tensor, wanted: packers.Wanted) -> None:
        super().__init__(x, wanted)
        self.device = CUDA

    def _prepare(self, x: Tensor, in_memory: bool) -> PreparedPack:
        return PreparedPack(x.shape[1], None, 0, 0, self.draws, in_memory, start)


@contextmanager
def null_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let prepared products run their way to a launch and a C call that return at once.

    Yields a function that, called after the first products have proven the emulator right, makes
    the launches and products null.
    """
    emulator = Emulator(build())
    emulator.reset()
    backend = CusparseLtBackend(Machine("cpu", cslt.load(emulator.path)))
    monkeypatch.setattr(routes, "LIBRARY", backend)
    monkeypatch.setattr(torch.cuda, "default_generators", (GENERATOR,))
    monkeypatch.setattr("torch.cuda.graphs._cuda_isCurrentStreamCapturing", bool)

    def arm() -> None:
        emulator.noop()
        dispatch.forget()
        monkeypatch.setattr(sparse, "packer_for", NullPacker)

    try:
        yield arm
    finally:
        backend.plans.clear()
        emulator.reset()
