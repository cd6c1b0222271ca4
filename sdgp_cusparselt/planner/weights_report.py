"""What a plan says of 2:4 weights: tables of combinations and of inference, and who wins where."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from sdgp_cusparselt.planner.gemms import Trace
from sdgp_cusparselt.planner.roofline import Forecast
from sdgp_cusparselt.planner.weights import (
    COMBINATIONS,
    Inference,
    Memory,
    StepTime,
    fastest,
    inference,
    memory,
    step_times,
)

NOTES = (
    "weights: output = input @ weight.T with a 2:4 weight; double: grad_input too, of the weight "
    "pruned both ways; sdgp: grad_input of the pruned gradient; mvue: grad_weight of the gradient "
    "pruned along tokens. Weights are packed once a step. Steps to the same loss are not in it.",
    "All layers that SDGP may take, no pack fused. Decode: one token a sequence; reading a "
    "key-value cache and launching kernels one after another are not in it.",
)


@dataclass(frozen=True)
class CardPlan:
    """2:4 weights on one card.

    Attributes:
        name: of the card.
        steps: one a combination.
        prefill: a forward pass at the tokens of the step.
        decode: a forward pass at one token a sequence; None for a model that reads no tokens.
    """

    name: str
    steps: Sequence[StepTime]
    prefill: Inference
    decode: Inference | None


def card_plans(trace: Trace, decode: Trace | None, forecasts: Sequence[Forecast]) -> list[CardPlan]:
    """Return the plan of each card.

    Args:
        trace: of a training step.
        decode: of the same model at one token a sequence, or None.
        forecasts: name the cards and their efficiencies.
    """
    found = []
    for result in forecasts:
        card = result.gpu, result.efficiency
        token = None if decode is None else inference(decode, *card)
        steps = step_times(trace, *card)
        found.append(CardPlan(result.gpu.name, steps, inference(trace, *card), token))
    return found


def verdicts(plans: Sequence[CardPlan]) -> list[str]:
    """Return which combination wins on each card, in one sentence."""
    lines = []
    for plan in plans:
        best = fastest(plan.steps)
        if best.speedup <= 1:
            lines.append(f"{plan.name}: no combination of 2:4 operands is predicted to gain.")
            continue
        single = fastest([s for s in plan.steps if s.name in ("sdgp", "mvue", "weights")])
        lines.append(
            f"{plan.name}: {best.name} wins, {best.speedup:.3f}x a step; of one product alone "
            f"{single.name}, {single.speedup:.3f}x."
        )
    return lines


def steps_table(plans: Sequence[CardPlan]) -> Table:
    """Return speedups of a whole step: a row a combination, a column a card."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("2:4 operands")
    for plan in plans:
        shown.add_column(plan.name, justify="right")
    for row, name in enumerate(COMBINATIONS):
        shown.add_row(name, *(f"{plan.steps[row].speedup:.3f}x" for plan in plans))
    return shown


def inference_table(plans: Sequence[CardPlan]) -> Table:
    """Return speedups of a forward pass with packed weights: a row a card."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("inference")
    for title in ("dense ms", "packed ms", "speedup", "decode"):
        shown.add_column(title, justify="right")
    for plan in plans:
        once, token = plan.prefill, plan.decode
        times = f"{once.dense / 1e3:.2f}", f"{once.best / 1e3:.2f}", f"{once.speedup:.3f}x"
        shown.add_row(plan.name, *times, "" if token is None else f"{token.speedup:.3f}x")
    return shown


def memory_note(found: Memory) -> str:
    """Return what the weights take, dense and packed."""
    dense, packed = found.dense / 2**30, found.packed / 2**30
    return (
        f"Weights: {dense:.2f} GiB, {packed:.2f} GiB with packed layers, each of them at 9/16 of "
        "its size."
    )


def as_json(trace: Trace, plans: Sequence[CardPlan]) -> dict[str, Any]:
    """Return all of it as plain data."""
    found = memory(trace)
    return {
        "memory_bytes": {"dense": found.dense, "packed": found.packed},
        "gpus": [
            {
                "gpu": plan.name,
                "steps": {time.name: time.speedup for time in plan.steps},
                "fastest": fastest(plan.steps).name,
                "prefill": plan.prefill.speedup,
                "decode": None if plan.decode is None else plan.decode.speedup,
            }
            for plan in plans
        ],
    }
