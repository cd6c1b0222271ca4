"""Predicted time of each GEMM, dense and with SDGP: the larger of arithmetic and memory time.

t = max(flops / (peak * efficiency(size)), bytes / (bandwidth * efficiency))

SDGP: prune and pack grad_output, multiply on sparse tensor cores, and for a convolution that is
not 1 x 1 add the columns up into an image; dense wherever that is faster.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sdgp_cusparselt.cards.efficiency import Efficiency, gemm_size
from sdgp_cusparselt.cards.gpus import GPU
from sdgp_cusparselt.cards.times import BYTES, dense_us, pack_us, sparse_us, stream_us
from sdgp_cusparselt.planner.gemms import Gemm, Trace

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
        fold: spreading the pixels of a strided convolution into an image.
    """

    gemm: Gemm
    dense: float
    pack: float = 0.0
    sparse: float = 0.0
    fold: float = 0.0

    @property
    def path(self) -> float:
        """All of SDGP's work for this GEMM, whether it pays or not."""
        return self.pack + self.sparse + self.fold

    @property
    def gains(self) -> bool:
        """SDGP's path is faster than dense."""
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
class Forecast:
    """Predicted step of one model on one GPU.

    Args:
        gpu: the card.
        efficiency: where its fractions of the peak come from.
        times: one entry a GEMM, in the order of the trace.
        other: microseconds of every other op of the step, unfused.
    """

    gpu: GPU
    efficiency: Efficiency
    times: tuple[GemmTime, ...]
    other: float

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


def forecast(trace: Trace, gpu: GPU, efficiency: Efficiency) -> Forecast:
    """Predict every GEMM of ``trace`` on ``gpu``."""
    times = tuple(gemm_time(gemm, gpu, efficiency) for gemm in trace.gemms)
    other = STEP_TO_FORWARD * stream_us(gpu, efficiency, trace.other_bytes)
    return Forecast(gpu, efficiency, times, other)


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
