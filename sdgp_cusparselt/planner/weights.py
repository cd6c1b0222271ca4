"""2:4 weights: which operand of which product is sparse, and what a step or an inference gains.

output      = input @ weight.T          the weight may be 2:4, along in_features
grad_input  = grad_output @ weight      the weight, along out_features, or the gradient
grad_weight = grad_output.T @ input     the gradient, along tokens

A weight is packed once a step, or once for ever for inference. As everywhere, a product that would
not gain runs dense: of the masked weight that is the same product.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sdgp_cusparselt.cards.efficiency import Efficiency, gemm_size
from sdgp_cusparselt.cards.gpus import GPU
from sdgp_cusparselt.cards.times import (
    BYTES,
    PACKED_BYTES,
    both_packs_us,
    dense_us,
    pack_us,
    sparse_us,
    stream_us,
)
from sdgp_cusparselt.planner.gemms import Gemm, Trace
from sdgp_cusparselt.planner.roofline import STEP_TO_FORWARD

Operand = Literal["dense", "weight", "grad_output"]
#: Name -> the 2:4 operand of output, grad_input and grad_weight.
COMBINATIONS: dict[str, tuple[Operand, Operand, Operand]] = {
    "mvue": ("dense", "dense", "grad_output"),
    "sdgp": ("dense", "grad_output", "dense"),
    "sdgp+mvue": ("dense", "grad_output", "grad_output"),
    "weights": ("weight", "dense", "dense"),
    "weights+mvue": ("weight", "dense", "grad_output"),
    "weights+sdgp": ("weight", "grad_output", "dense"),
    "weights+sdgp+mvue": ("weight", "grad_output", "grad_output"),
    "double": ("weight", "weight", "dense"),
    "double+mvue": ("weight", "weight", "grad_output"),
}
ROLES = ("forward", "grad_input", "grad_weight")


@dataclass(frozen=True)
class StepTime:
    """A training step with one combination, on one card.

    Args:
        name: of the combination.
        dense: microseconds of the dense step.
        best: microseconds with every sparse product that gains.
    """

    name: str
    dense: float
    best: float

    @property
    def speedup(self) -> float:
        """Of the whole step."""
        return self.dense / self.best


def step_times(trace: Trace, gpu: GPU, efficiency: Efficiency) -> list[StepTime]:
    """Predict a step with each combination of 2:4 operands, in the layers that SDGP may take.

    Args:
        trace: of the model's step.
        gpu: the card.
        efficiency: fractions of its peaks.
    """
    other = STEP_TO_FORWARD * stream_us(gpu, efficiency, trace.other_bytes)
    everything = other + sum(_dense(gemm, gpu, efficiency) for gemm in trace.gemms)
    found = []
    for name, operands in COMBINATIONS.items():
        saved = sum(_saved(layer, operands, gpu, efficiency) for layer in _layers(trace.gemms))
        found.append(StepTime(name, everything, everything - saved))
    return found


def _layers(gemms: Iterable[Gemm]) -> list[dict[str, Gemm]]:
    """Return role -> product for each layer whose grad_input SDGP may take."""
    calls = [list(group) for _, group in itertools.groupby(gemms, key=lambda gemm: gemm.call)]
    layers = [{gemm.role: gemm for gemm in call} for call in calls]
    return [x for x in layers if "grad_input" in x and x["grad_input"].prunable]


def _saved(
    layer: dict[str, Gemm],
    operands: tuple[Operand, Operand, Operand],
    gpu: GPU,
    efficiency: Efficiency,
) -> float:
    """Return microseconds that the best choice of sparse products saves; packs are shared."""
    gains: dict[str, float] = {}
    which: dict[str, Operand] = {}
    for role, operand in zip(ROLES, operands, strict=True):
        if operand != "dense" and role in layer:
            gemm = layer[role]
            gains[role] = _dense(gemm, gpu, efficiency)
            gains[role] -= _sparse(gemm, operand, gpu, efficiency)
            which[role] = operand
    sizes = {"weight": _elements(layer, "weight"), "grad_output": _elements(layer, "grad_output")}
    best = 0.0
    for count in range(1, len(gains) + 1):
        for chosen in itertools.combinations(gains, count):
            saved = sum(gains[role] for role in chosen)
            for operand, elements in sizes.items():
                packs = sum(which[role] == operand for role in chosen)
                saved -= (0.0, pack_us(gpu, efficiency, elements))[packs > 0]
                if packs > 1:
                    saved += pack_us(gpu, efficiency, elements)
                    saved -= both_packs_us(gpu, efficiency, elements)
            best = max(best, saved)
    return best


def _elements(layer: dict[str, Gemm], operand: str) -> int:
    """Return the size of a layer's weight or grad_output."""
    left, right, _ = layer["grad_input"].elements
    return right if operand == "weight" else left


def _size(gemm: Gemm) -> float:
    return gemm_size(gemm.m, gemm.n, gemm.k) * float(gemm.batch) ** (1 / 3)


def _dense(gemm: Gemm, gpu: GPU, efficiency: Efficiency) -> float:
    return dense_us(gpu, efficiency, gemm.flops, _size(gemm), gemm.elements)


def _sparse(gemm: Gemm, operand: Operand, gpu: GPU, efficiency: Efficiency) -> float:
    """Predict a product whose weight or gradient is packed, without the packing."""
    left, right, result = gemm.elements
    weight = operand == "weight"
    packed, other = (right, left) if weight else (left, right)
    return sparse_us(gpu, efficiency, gemm.flops, _size(gemm), (packed, other, result))


@dataclass(frozen=True)
class Inference:
    """A forward pass with packed weights, on one card.

    Args:
        dense: microseconds of the dense forward pass.
        best: microseconds with every packed weight that gains.
    """

    dense: float
    best: float

    @property
    def speedup(self) -> float:
        """Of the forward pass."""
        return self.dense / self.best


def inference(trace: Trace, gpu: GPU, efficiency: Efficiency) -> Inference:
    """Predict a forward pass whose weights were packed before.

    Args:
        trace: of the model at the tokens of a prefill, or at one token a sequence.
        gpu: the card.
        efficiency: fractions of its peaks.
    """
    dense = best = stream_us(gpu, efficiency, trace.other_bytes)
    takes = {gemm.call for gemm in trace.gemms if gemm.prunable and gemm.role == "grad_input"}
    for gemm in trace.gemms:
        if gemm.role != "forward":
            continue
        plain = _dense(gemm, gpu, efficiency)
        packed = _sparse(gemm, "weight", gpu, efficiency) if gemm.call in takes else plain
        dense, best = dense + plain, best + min(plain, packed)
    return Inference(dense, best)


@dataclass(frozen=True)
class Memory:
    """Bytes of the weights of a model at rest.

    Args:
        dense: of 16-bit weights.
        packed: with those packed that SDGP may take, at 9/16 of their size.
    """

    dense: int
    packed: int


def memory(trace: Trace) -> Memory:
    """Return what packing the weights saves."""
    weights = {
        gemm.fqn: gemm.elements[1]
        for gemm in trace.gemms
        if gemm.role == "grad_input" and gemm.prunable
    }
    dense = BYTES * trace.parameters
    return Memory(dense, round(dense - (BYTES - PACKED_BYTES) * sum(weights.values())))


def fastest(times: Sequence[StepTime]) -> StepTime:
    """Return the combination whose step is predicted shortest; the first of equals."""
    return min(times, key=lambda time: time.best)
