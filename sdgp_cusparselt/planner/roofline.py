"""Predicted time of each GEMM, dense and with SDGP: the larger of arithmetic and memory time.

t = max(flops / (peak * efficiency(size)), bytes / (bandwidth * efficiency))

SDGP: prune and pack grad_output, multiply on sparse tensor cores, and for a convolution that is
not 1 x 1 add the columns up into an image; dense wherever that is faster.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sdgp_cusparselt.cards.efficiency import Efficiency, gemm_size
from sdgp_cusparselt.cards.gpus import GPU
from sdgp_cusparselt.cards.times import (
    BYTES,
    both_packs_us,
    dense_us,
    fused_pack_us,
    pack_us,
    sparse_us,
    stream_us,
)
from sdgp_cusparselt.planner.gemms import SPARSE_MULTIPLE, Gemm, Trace

#: Forward traffic of norms and activations, times this, is that of the step: the backward pass
#: reads about two tensors and writes one for each one that the forward pass writes.
STEP_TO_FORWARD = 3
#: Rows of the layer that the break-even width is stated for.
BREAK_EVEN_TOKENS = 8192


@dataclass(frozen=True)
class GemmTime:
    """Predicted microseconds of one GEMM.

    Args:
        gemm: what is timed.
        dense: the dense GEMM.
        pack: pruning and packing the left operand; 0 when SDGP cannot take it.
        sparse: the sparse GEMM alone; 0 when SDGP cannot take it.
        fold: spreading the pixels of a strided convolution into an image, or adding the second rows
            of heavy tokens.
        taken: whether SDGP's path is; None where that follows from this GEMM alone.
    """

    gemm: Gemm
    dense: float
    pack: float = 0.0
    sparse: float = 0.0
    fold: float = 0.0
    taken: bool | None = None

    @property
    def path(self) -> float:
        """All of SDGP's work for this GEMM, whether it pays or not."""
        return self.pack + self.sparse + self.fold

    @property
    def gains(self) -> bool:
        """SDGP's path is faster than dense, alone or with the other product of its layer."""
        if self.taken is not None:
            return self.taken
        return self.gemm.prunable and self.path < self.dense

    @property
    def best(self) -> float:
        """What the dispatcher would choose: SDGP where it gains, else dense."""
        return self.path if self.gains else self.dense


def gemm_time(gemm: Gemm, gpu: GPU, efficiency: Efficiency) -> GemmTime:
    """Predict one GEMM.

    Args:
        gemm: sizes and operands.
        gpu: peak and bandwidth.
        efficiency: fractions of them that kernels reach.

    Returns:
        Microseconds of the dense GEMM and of each part of SDGP's path.
    """
    size = gemm_size(gemm.m, gemm.n, gemm.k) * float(gemm.batch) ** (1 / 3)
    left, right, result = gemm.elements
    dense = dense_us(gpu, efficiency, gemm.flops, size, gemm.elements)
    if not gemm.prunable:
        return GemmTime(gemm, dense)
    columns = gemm.fold_elements or result
    sparse = sparse_us(gpu, efficiency, gemm.flops, size, (left, right, columns))
    fold = 0.0
    if gemm.fold_elements:
        fold = stream_us(gpu, efficiency, BYTES * (columns + result)) + efficiency.launch_us
    return GemmTime(gemm, dense, pack_us(gpu, efficiency, left), sparse, fold)


@dataclass(frozen=True)
class Packing:
    """How gradients are packed.

    Attributes:
        fuse: by the backward of the activation that makes them, where one does.
        heavy: share of the tokens that is kept exactly, as pairs of 2:4 rows.
    """

    fuse: bool = False
    heavy: float = 0.0


DEFAULT_PACKING = Packing()


def layer_times(
    gemms: Sequence[Gemm],
    gpu: GPU,
    efficiency: Efficiency,
    how: Packing = DEFAULT_PACKING,
    *,
    fused: bool = False,
) -> list[GemmTime]:
    """Predict the GEMMs of one call of a layer, whose two sparse products may share a pack.

    Of all ways to run the prunable ones sparse or dense the fastest is taken. Where both are
    sparse, each bears half of the one pack.

    Args:
        gemms: of the call.
        gpu: peak and bandwidth.
        efficiency: fractions of them that kernels reach.
        how: gradients are packed.
        fused: whether the kernel that makes the gradient packs it.
    """
    times = [gemm_time(gemm, gpu, efficiency) for gemm in gemms]
    places = [i for i, gemm in enumerate(gemms) if gemm.prunable]
    if not places:
        return times
    for i in places:
        if how.heavy and gemms[i].kind == "linear" and gemms[i].role == "grad_input":
            times[i] = _with_heavy_tokens(times[i], gpu, efficiency, how.heavy)
        elif fused:
            alone = fused_pack_us(gpu, efficiency, gemms[i].elements[0], both=False)
            times[i] = replace(times[i], pack=alone)
    best = [replace(t, taken=t.gains) if t.gemm.prunable else t for t in times]
    if len(places) == 2 and not how.heavy:
        elements = gemms[places[0]].elements[0]
        pack = both_packs_us(gpu, efficiency, elements)
        if fused:
            pack = fused_pack_us(gpu, efficiency, elements, both=True)
        shared = [replace(t, pack=pack / 2, taken=True) if t.gemm.prunable else t for t in times]
        if sum(t.best for t in shared) < sum(t.best for t in best):
            return shared
    return best


def _with_heavy_tokens(time: GemmTime, gpu: GPU, efficiency: Efficiency, share: float) -> GemmTime:
    """Return grad_input's time with the heaviest tokens exact: two 2:4 rows for each of them.

    Their norms take a read of the gradient, their choice a launch, their rows a longer operand and
    product, and their second rows are added to their first.
    """
    gemm = time.gemm
    extra = heavy_rows(gemm.m, share)
    rows = gemm.m + extra
    left, right, result = (rows * gemm.k, gemm.elements[1], rows * gemm.n)
    flops = 2 * gemm.batch * rows * gemm.n * gemm.k
    size = gemm_size(rows, gemm.n, gemm.k)
    packs = pack_us(gpu, efficiency, left) + 2 * efficiency.launch_us
    packs += stream_us(gpu, efficiency, BYTES * gemm.m * gemm.k)
    adds = stream_us(gpu, efficiency, 3 * BYTES * extra * gemm.n) + efficiency.launch_us
    sparse = sparse_us(gpu, efficiency, flops, size, (left, right, result))
    return replace(time, pack=packs, sparse=sparse, fold=adds)


def heavy_rows(tokens: int, share: float) -> int:
    """Return how many rows heavy tokens add: at least their share, up to a multiple of 16 rows."""
    if not share:
        return 0
    wanted = tokens + math.ceil(share * tokens - 1e-9)
    return min(tokens, -(-wanted // SPARSE_MULTIPLE) * SPARSE_MULTIPLE - tokens)


@dataclass(frozen=True)
class Forecast:
    """Predicted step of one model on one GPU.

    Args:
        gpu: the card.
        efficiency: where its fractions of the peak come from.
        times: one entry a GEMM, in the order of the trace.
        other: microseconds of every other op of the step, unfused.
        packing: how gradients are packed.
    """

    gpu: GPU
    efficiency: Efficiency
    times: tuple[GemmTime, ...]
    other: float
    packing: Packing = DEFAULT_PACKING

    @property
    def dense_us(self) -> float:
        """GEMMs of the dense step."""
        return sum(t.dense for t in self.times)

    @property
    def sdgp_us(self) -> float:
        """GEMMs of the step with SDGP where it gains."""
        return sum(t.best for t in self.times)

    @property
    def speedup(self) -> float:
        """Whole step, other ops included."""
        return (self.dense_us + self.other) / (self.sdgp_us + self.other)


def forecast(
    trace: Trace, gpu: GPU, efficiency: Efficiency, how: Packing = DEFAULT_PACKING
) -> Forecast:
    """Predict every GEMM of ``trace`` on ``gpu``.

    Args:
        trace: of the model.
        gpu: the card.
        efficiency: fractions of its peaks.
        how: gradients are packed.
    """
    times: list[GemmTime] = []
    for call, gemms in itertools.groupby(trace.gemms, key=lambda gemm: gemm.call):
        fused = how.fuse and call in trace.activations
        times += layer_times(list(gemms), gpu, efficiency, how, fused=fused)
    other = STEP_TO_FORWARD * stream_us(gpu, efficiency, trace.other_bytes)
    return Forecast(gpu, efficiency, tuple(times), other, how)


def paper_saving(share: float, speedup: float = 2.0, overhead: float = 0.0) -> float:
    """Return the fraction of a step that pruned GEMMs save.

    saved = share * (1 - 1 / speedup) - overhead

    Args:
        share: of the dense step's time in the GEMMs that become sparse.
        speedup: of those GEMMs.
        overhead: pruning and packing, as a fraction of the dense step.

    Source: arithmetic behind the 15-25 % of McDanel et al. 2022, which assumes speedup 2 and no
        overhead; a share of 1/3 then gives 1/6.
    """
    return share * (1 - 1 / speedup) - overhead


@dataclass(frozen=True)
class Rung:
    """One step on the way from the paper's assumption to what is left: fraction of time saved."""

    assumption: str
    saved: float


def ladder(result: Forecast) -> list[Rung]:
    """Replace the paper's assumptions one by one by this model's and this card's numbers.

    Returns:
        Saved fractions, each rung keeping all earlier replacements.
    """
    pruned = [t for t in result.times if t.gemm.prunable]
    flops = sum(t.gemm.flops for t in result.times)
    share_flops = sum(t.gemm.flops for t in pruned) / flops
    gemms, step = result.dense_us, result.dense_us + result.other
    dense = sum(t.dense for t in pruned)
    sparse = sum(t.sparse for t in pruned)
    path = sum(t.path for t in pruned)
    saved = result.dense_us - result.sdgp_us
    return [
        Rung("the paper: a third of the step, twice as fast, pruning free", paper_saving(1 / 3)),
        Rung(f"this model's share of FLOPs, {share_flops:.1%}", paper_saving(share_flops)),
        Rung(f"its share of dense GEMM time, {dense / gemms:.1%}", paper_saving(dense / gemms)),
        Rung(f"sparse GEMMs {_ratio(dense, sparse)} as fast, not 2x", (dense - sparse) / gemms),
        Rung("pruning, packing and folding cost time", (dense - path) / gemms),
        Rung("layers that would lose stay dense", saved / gemms),
        Rung(f"GEMMs are {gemms / step:.0%} of the step, the rest is memory traffic", saved / step),
    ]


def _ratio(dense: float, sparse: float) -> str:
    return f"{dense / sparse:.2f}x" if sparse else "not used, none is pruned"


def break_even(
    gpu: GPU,
    efficiency: Efficiency,
    tokens: int = BREAK_EVEN_TOKENS,
    widths: Iterable[int] = range(256, 32769, 128),
) -> int | None:
    """Return the narrowest square layer whose grad_input SDGP speeds up, and every wider one too.

    grad_input [tokens, n] = prune(grad_output [tokens, n]) @ weight [n, n]

    Returns:
        n, or None when the widest layer tried still loses.
    """
    narrowest = None
    for n in sorted(widths, reverse=True):
        gemm = square_layer(tokens, n)
        if not gemm_time(gemm, gpu, efficiency).gains:
            break
        narrowest = n
    return narrowest


def square_layer(tokens: int, width: int) -> Gemm:
    """Return grad_input of a Linear(width, width) over ``tokens`` rows."""
    elements = (tokens * width, width * width, tokens * width)
    return Gemm("", "linear", "grad_input", tokens, width, width, 1, elements, prunable=True)


def merge(times: Sequence[GemmTime]) -> list[tuple[int, GemmTime]]:
    """Count equal GEMMs: (how many, one of them), largest dense total first."""
    groups: dict[tuple[object, ...], list[GemmTime]] = {}
    for t in times:
        g = t.gemm
        groups.setdefault((g.kind, g.role, g.m, g.n, g.k, g.batch, g.prunable), []).append(t)
    counted = [(len(group), group[0]) for group in groups.values()]
    return sorted(counted, key=lambda pair: -pair[0] * pair[1].dense)
