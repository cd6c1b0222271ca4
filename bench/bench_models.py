"""Whole training steps: forward, backward, fused AdamW; a dense model beside the same one pruned.

    PYTHONPATH=.:bindings python -m pytest bench/bench_models.py -k cpu

Why the comparison is fair. There is one set of weights: every contender is a copy of the modules
around the same Parameters (``models.twin``), stepped by the same optimizer on the same batch, so
that a model whose copies would not fit is measured like any other. The copies differ in the class
of their layers alone. Compiled code is chosen by its guards: no contender is switched, or compiled
anew, between timed steps. Both sides compile the same parts, each block, and the head with its
loss, as is usual for deep models; one piece of code serves all blocks. The learning rate is so
small that every step is the same work and the losses can be compared. Steps of both are timed in
turns. Peak memory is all that is allocated during a step, weights and optimizer state included; the
dense peak is read before anything sparse has run on these weights.

Precision is bf16 autocast over float32 weights and optimizer state: 16 bytes a parameter, once.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from bench import models
from bench.bench_layers import CONFIGS as LAYER_CONFIGS
from bench.bench_layers import measured_on
from bench.contender import Contender, Work, measure, not_run, parameters
from bench.operands import UnavailableError, operands
from bench.shapes import Selection, Trained, trained_cases
from bench.verify import Check, WrongResultError
from sdgp_cusparselt.recording import records

pytestmark = pytest.mark.filterwarnings("default::sdgp_cusparselt.errors.SDGPFallbackWarning")

#: What a user gets by default: the random numbers that mvue draws are part of the time.
CONFIGS = {name: config.replace(prune="mvue") for name, config in LAYER_CONFIGS.items()}
#: Below the last bit of most float32 weights: a step costs what it costs, and moves nothing.
LEARNING_RATE = 1e-12
OUT_OF_MEMORY = "out of memory; pass --tokens for fewer than {} samples of {} tokens"


class Rig:
    """One model's weights, optimizer and batch, and its dense step.

    Args:
        case: the model and its batch.
        backend: torch.compile's, or None to leave every contender uncompiled.
    """

    def __init__(self, case: Trained, backend: str | None) -> None:
        self.case, self.backend = case, backend
        # What other cases compiled counts against torch's limit on versions of one function.
        torch.compiler.reset()
        self.model = models.build(case)
        self.batch = models.batch(case)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=True)
        self.dense = Step(self, models.twin(self.model))
        self.dense()
        self.dense_peak_mib = self.peak_mib(self.dense)

    def pruned(self, config: sdgp.SDGPConfig) -> "Step":
        """Return the step of a converted copy around the same weights."""
        module = models.twin(self.model)
        sdgp.convert_(module, {"blocks.*": config})
        return Step(self, module)

    def release(self) -> None:
        """Free weights, gradients and optimizer state, whoever still holds the rig."""
        self.optimizer.state.clear()
        for parameter in self.parameters:
            parameter.grad, parameter.data = None, parameter.data.new_empty(0)

    def gradient_norm(self) -> float:
        """Return the norm of the gradients that the last step left behind."""
        found = [p.grad.norm() for p in self.parameters if p.grad is not None]
        return float(torch.stack(found).norm())

    def peak_mib(self, step: "Step") -> float | None:
        """Return the most memory that is allocated during a step; None on a CPU."""
        if self.case.device_type != "cuda":
            return None
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20


class Step:
    """One training step of one contender: call it, and it returns the loss."""

    def __init__(self, rig: Rig, module: nn.Module) -> None:
        self.rig, self.module = rig, module
        if rig.backend is not None:
            models.compile_(module, rig.backend)

    def __call__(self) -> Tensor:
        rig = self.rig
        # Gradients stay until the next step of whichever contender, as the weights are shared.
        rig.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(rig.case.device_type, rig.case.dtype):
            loss = self.module(*rig.batch)
        loss.backward()
        rig.optimizer.step()
        return loss.detach()

    def calls_of_a_step(self) -> Counter[tuple[str, str]]:
        """Return (product, way) -> calls of one step of a converted module."""
        before = self._calls()
        self()
        return self._calls() - before

    def _calls(self) -> Counter[tuple[str, str]]:
        layers = [m for m in self.module.modules() if isinstance(m, sdgp.nn.SDGPModule)]
        compiled = self.rig.backend is not None
        found = [records.COMPILED] if compiled else [layer.sdgp_record for layer in layers]
        return sum((Counter(record.calls) for record in found), Counter())


#: The rig of the case at hand. Dropped before the next one is made: two do not fit on one card.
_RIG: dict[Trained, Rig] = {}


def rig_of(case: Trained) -> Rig:
    """Return the case's rig; that of the case before is dropped first."""
    if case not in _RIG:
        drop_rig()
        # Compiled code is what is compared, where there is time to wait for the compiler.
        _RIG[case] = Rig(case, "inductor" if case.device_type == "cuda" else None)
    return _RIG[case]


def drop_rig() -> None:
    """Free the weights of the case before, and the operands that other parts left behind."""
    for rig in _RIG.values():
        rig.release()
    _RIG.clear()
    operands.cache_clear()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _prepare(config: sdgp.SDGPConfig) -> Callable[[Trained], Work]:
    def prepare(case: Trained) -> Work:
        if case.dtype != torch.bfloat16:
            raise UnavailableError("whole models are trained in bf16; fp16 needs a loss scaler")
        rig = rig_of(case)
        step = rig.pruned(config)
        return Work(
            step,
            lambda loss: check(loss, rig),
            rig.dense,
            "the dense step" if rig.backend is None else "the dense step, compiled",
            info={
                **measured_on(case.device_type),
                "compiled": rig.backend is not None,
                "parameters": sum(p.numel() for p in rig.parameters),
            },
            after=lambda: afterwards(rig, step),
        )

    return prepare


def check(loss: Tensor, rig: Rig) -> Check:
    """Compare a pruned step's loss with the dense one's: the forward pass is the same.

    Up to roundings, because a compiler may fuse it differently: two in the dtype of autocast are
    allowed for. Gradients are compared layer by layer in ``bench_layers.py``; here they are finite.

    Raises:
        WrongResultError: the loss is another, or a gradient or a weight is not finite.
    """
    norm, value = rig.gradient_norm(), float(loss)
    expected = float(rig.dense())
    error, bound = abs(value - expected), 2 * torch.finfo(rig.case.dtype).eps * abs(expected)
    if not error <= bound:
        raise WrongResultError(f"wrong: the loss is {value}, not {expected}")
    if not 0 < norm < float("inf"):
        raise WrongResultError(f"wrong: the gradients' norm is {norm}")
    if not all(bool(torch.isfinite(p).all()) for p in rig.parameters):
        raise WrongResultError("wrong: a parameter is not finite after a step")
    return Check(error, error / bound, "the dense step's loss")


def afterwards(rig: Rig, step: Step) -> dict[str, Any]:
    """Return which backends ran in one step, the gradients' norms, and on a GPU the memory."""
    calls = step.calls_of_a_step()
    norms = {"gradient_norm": rig.gradient_norm()}
    rig.dense()
    norms["reference_gradient_norm"] = rig.gradient_norm()
    found: dict[str, Any] = {"backends": {" ".join(key): n for key, n in calls.items()}, **norms}
    peak = rig.peak_mib(step)
    if peak is not None:
        found |= {"peak_mib": peak, "reference_peak_mib": rig.dense_peak_mib}
    return found


def _sizes(case: Trained) -> tuple[int, int, int]:
    """A step has many products: tokens and width stand for them."""
    return case.batch * case.sequence, case.width, case.width


def _contenders(case: Trained) -> list[Contender]:
    return [
        Contender("model_step", name, _prepare(config), _sizes) for name, config in CONFIGS.items()
    ]


def pairs(selection: Selection) -> list[object]:
    return parameters(trained_cases(selection), _contenders)


@pytest.fixture(scope="module", autouse=True)
def _released() -> Iterator[None]:
    yield
    drop_rig()


def test_model(request: pytest.FixtureRequest, case: Trained, contender: Contender) -> None:
    """Time a whole training step of a converted model beside the dense one."""
    try:
        measure(request, case, contender)
        return
    except torch.cuda.OutOfMemoryError:
        drop_rig()
    # Outside of the handler, so that nothing holds the frames and their tensors any more.
    not_run(request, case, contender, OUT_OF_MEMORY.format(case.batch, case.sequence))
