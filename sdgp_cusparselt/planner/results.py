"""Efficiencies from this project's own result files, and how wrong the published ones were.

A result file is pytest-benchmark's JSON at ``bench/results/<gpu>/<name>.json``. The planner reads
the benchmarks whose ``extra_info`` names a ``part`` (dense_gemm, sparse_gemm or pack) and M, N, K,
unless it says ``rival``: those are times of other software or of slower choices. ``device_us`` in
``extra_info`` is preferred to the median wall time.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdgp_cusparselt.cards.efficiency import Curve, Efficiency
from sdgp_cusparselt.cards.gpus import GPU, gpu_of
from sdgp_cusparselt.cards.times import BYTES, PACKED_BYTES
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.planner.gemms import Gemm
from sdgp_cusparselt.planner.roofline import gemm_time

PARTS = ("dense_gemm", "sparse_gemm", "pack")


@dataclass(frozen=True)
class Point:
    """One measured kernel: ``part`` at [M, N, K] took ``us`` microseconds."""

    part: str
    m: int
    n: int
    k: int
    us: float


def result_files(folder: Path) -> list[tuple[GPU, Path]]:
    """List the result files below ``folder`` that belong to a GPU the planner knows.

    An empty one is no result: a run that was stopped may leave it.
    """
    found = []
    for path in sorted(folder.glob("*/*.json")):
        gpu = gpu_of(path.parent.name)
        if gpu is not None and path.stat().st_size:
            found.append((gpu, path))
    return found


def read_points(path: Path) -> list[Point]:
    """Return the measured kernels of a result file; other benchmarks in it are left out.

    Raises:
        ValueError: the file is not pytest-benchmark JSON, or a part lacks its sizes.
    """
    try:
        benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        fix = "Write it with pytest --benchmark-json."
        raise value_error("read_points", "path", "pytest-benchmark JSON", path, fix) from error
    return [_point(path, bench) for bench in benchmarks if _counts(bench["extra_info"])]


def _counts(info: Mapping[str, Any]) -> bool:
    return info.get("part") in PARTS and not info.get("rival", False)


def _point(path: Path, bench: Mapping[str, Any]) -> Point:
    info = bench["extra_info"]
    try:
        m, n, k = (int(info[name]) for name in "MNK")
    except KeyError as error:
        fix = "Give extra_info M, N and K."
        raise value_error("read_points", bench["name"], f"sized in {path}", info, fix) from error
    return Point(
        info["part"], m, n, k, float(info.get("device_us", bench["stats"]["median"] * 1e6))
    )


def measured_efficiency(gpu: GPU, folder: Path) -> Efficiency:
    """Return what was measured on ``gpu``; the published numbers where nothing was."""
    paths = [path for owner, path in result_files(folder) if owner is gpu]
    points = [point for path in paths for point in read_points(path)]
    rows = {part: [p for p in points if p.part == part] for part in PARTS}
    if not (rows["dense_gemm"] and rows["sparse_gemm"]):
        return gpu.published
    efficiency = Efficiency(
        dense=Curve.from_times([(p.m, p.n, p.k, p.us) for p in rows["dense_gemm"]], gpu.tflops),
        sparse=Curve.from_times(
            [(p.m, p.n, p.k, p.us) for p in rows["sparse_gemm"]], gpu.sparse_tflops
        ),
        source=", ".join(path.name for path in paths),
        measured=True,
    )
    if not rows["pack"]:
        return efficiency
    # The largest packs show the bandwidth; small ones are launch cost.
    largest = max(rows["pack"], key=lambda p: p.m * p.k)
    moved = (BYTES + PACKED_BYTES) * largest.m * largest.k
    fraction = moved / (largest.us * 1e-6) / (gpu.bandwidth * 1e9)
    launch = min(p.us for p in rows["pack"])
    return replace(efficiency, bandwidth=min(1.0, fraction), launch_us=launch)


@dataclass(frozen=True)
class PredictionError:
    """How far predictions from published efficiencies were from one result file.

    Args:
        path: the file.
        part: which kernel.
        count: measured points.
        bias: geometric mean of predicted / measured; 1 is right on average.
        spread: geometric mean of how far each is off, whichever way; 1 is right everywhere.
    """

    path: Path
    part: str
    count: int
    bias: float
    spread: float


def prediction_errors(gpu: GPU, path: Path) -> list[PredictionError]:
    """Compare every measured kernel with the prediction that the published numbers give."""
    logs: dict[str, list[float]] = {}
    for point in read_points(path):
        logs.setdefault(point.part, []).append(math.log(_predict(gpu, point) / point.us))
    return [
        PredictionError(
            path,
            part,
            len(values),
            math.exp(math.fsum(values) / len(values)),
            math.exp(math.fsum(map(abs, values)) / len(values)),
        )
        for part, values in logs.items()
    ]


def _predict(gpu: GPU, point: Point) -> float:
    elements = (point.m * point.k, point.k * point.n, point.m * point.n)
    gemm = Gemm("", "linear", "grad_input", point.m, point.n, point.k, 1, elements, prunable=True)
    time = gemm_time(gemm, gpu, gpu.published)
    return {"dense_gemm": time.dense, "sparse_gemm": time.sparse, "pack": time.pack}[point.part]
