"""Fraction of the peak that a GEMM of a given size reaches: interpolated, never invented."""

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace


def gemm_size(m: int, n: int, k: int) -> float:
    """Return the edge of the cube with as many multiply-adds, (M N K)^(1/3)."""
    return math.exp(math.log(m * n * k) / 3)


@dataclass(frozen=True)
class Curve:
    """Efficiency against problem size, linear in log(size) between points and flat beyond them.

    Below the first point the *time* stays that of the first point: a tiny GEMM costs its launch.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def from_times(cls, rows: Iterable[tuple[int, int, int, float]], peak: float) -> "Curve":
        """Build a curve from (M, N, K, microseconds) rows and a peak in TFLOP/s.

        Rows of (nearly) one size are averaged, so that every measured shape counts.
        """
        sizes: dict[float, list[float]] = {}
        for m, n, k, us in rows:
            fraction = 2 * m * n * k / (us * 1e-6) / (peak * 1e12)
            sizes.setdefault(round(math.log2(gemm_size(m, n, k)), 2), []).append(fraction)
        return cls(tuple((2**s, math.fsum(f) / len(f)) for s, f in sorted(sizes.items())))

    def at(self, size: float) -> float:
        """Return the fraction of the peak at ``size``."""
        first, last = self.points[0], self.points[-1]
        if size <= first[0]:
            return first[1] * (size / first[0]) ** 3
        if size >= last[0]:
            return last[1]
        right = bisect.bisect_left([s for s, _ in self.points], size)
        (s0, e0), (s1, e1) = self.points[right - 1], self.points[right]
        weight = math.log(size / s0) / math.log(s1 / s0)
        return e0 + weight * (e1 - e0)


@dataclass(frozen=True)
class Efficiency:
    """What dense and sparse GEMMs and the pack kernel reach, and who says so.

    Args:
        dense: fraction of the dense peak.
        sparse: fraction of the 2:4 peak (twice the dense one), packing not included.
        source: a result file, or a publication.
        measured: True when it comes from this project's own result files.
        bandwidth: fraction of the data-sheet bandwidth that streaming kernels reach. 0.8 is an
            assumption: torch's clone ran at 1438 GB/s on an A100 (pytorch/ao PR 184), which is
            0.71 of the 80 GB card's bandwidth or 0.92 of the 40 GB card's.
        launch_us: fixed cost of one more kernel, in microseconds; an assumption.
        guessed: borrowed from another architecture: enough for a forecast, not for leaving a
            product out.
    """

    dense: Curve
    sparse: Curve
    source: str
    measured: bool = False
    bandwidth: float = 0.8
    launch_us: float = 3.0
    guessed: bool = False

    def borrowed(self, note: str, *, guessed: bool = False) -> "Efficiency":
        """Return the same numbers with a note that they were taken on another card."""
        return replace(self, source=f"{self.source}; {note}", guessed=guessed)
