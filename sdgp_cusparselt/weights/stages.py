"""WeightStage: what a recipe says about a layer's weight at one optimizer step."""

from dataclasses import dataclass
from typing import Literal

Pattern = Literal["n:m", "transposable", "unstructured"]
#: What reaches a weight that is not kept: its gradient as if it were, or none.
Gradient = Literal["straight_through", "masked"]


@dataclass(frozen=True, kw_only=True)
class WeightStage:
    """What holds at one step; a recipe is a pure function from steps to these.

    effective weight = weight where mask, else beta * weight
    gradient         = gradient of the effective weight [where mask] + decay * weight where not mask

    Attributes:
        masked: whether the mask counts at all; else the layer is dense.
        pattern: how a mask is chosen.
        n: kept per group of m; 2 for transposable masks.
        m: group size; 4 for transposable masks.
        sparsity: share that an unstructured mask removes.
        beta: share of a weight that is not kept which still counts.
        refresh: whether the mask is chosen anew from the weight as it is at this step.
        gradient: "straight_through", or "masked", where weights that are not kept stay zero.
        decay: pulls weights that are not kept towards zero, once an optimizer step.
        both_ways: whether grad_input uses the weight pruned along out_features, too.
        sparse_grad_weight: whether grad_weight prunes grad_output along tokens by mvue; None
            leaves it as the layer was converted.
        adapters: whether the low-rank adapters count.
    """

    masked: bool
    pattern: Pattern = "n:m"
    n: int = 2
    m: int = 4
    sparsity: float = 0.0
    beta: float = 0.0
    refresh: bool = False
    gradient: Gradient = "straight_through"
    decay: float = 0.0
    both_ways: bool = False
    sparse_grad_weight: bool | None = None
    adapters: bool = False
