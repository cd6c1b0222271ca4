"""Result files as rows: one a contender and case, with the times that were taken in turns."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdgp_cusparselt.errors import value_error


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        part, contender, case, model, layer: what was measured.
        m, n, k: sizes of the product.
        us, reference_us: medians of times taken in turns; device time on a GPU, else wall time.
        reference: what ``reference_us`` is the time of.
        wall_us: pytest-benchmark's median, with the host's cost and a warm cache.
        rival: not this project's code.
        info: the file's whole ``extra_info``.
    """

    part: str
    contender: str
    case: str
    model: str
    layer: str
    m: int
    n: int
    k: int
    us: float
    reference_us: float
    reference: str
    wall_us: float
    rival: bool
    info: dict[str, Any]

    @property
    def speedup(self) -> float:
        """Time of the reference over time of the contender; above 1 the contender wins."""
        return self.reference_us / self.us


@dataclass(frozen=True)
class Results:
    """Rows of one card, the newest of each kind, and the conditions of every file.

    Attributes:
        rows: in the order of the files.
        not_run: part, contender, case and reason of what has no time.
        conditions: per file: its name, date, command, and the machine.
    """

    rows: tuple[Row, ...]
    not_run: tuple[dict[str, str], ...]
    conditions: tuple[dict[str, Any], ...]

    def of(self, part: str, *contenders: str) -> list[Row]:
        """Return the rows of a part; of the named contenders, or of all."""
        return [
            row
            for row in self.rows
            if row.part == part and (not contenders or row.contender in contenders)
        ]

    def find(self, part: str, contender: str, case: str) -> Row | None:
        """Return one row, or None where it did not run."""
        return next((row for row in self.of(part, contender) if row.case == case), None)


def result_paths(paths: Iterable[Path]) -> list[Path]:
    """Return files as they are and the JSON files directly inside folders."""
    return [
        file
        for path in paths
        for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])
    ]


def load(paths: Iterable[Path]) -> Results:
    """Read result files of one card; a later measurement replaces an earlier one of the same kind.

    Raises:
        ValueError: a file is not this suite's JSON, or the files are of different cards.
    """
    documents = [(path, _read(path)) for path in result_paths(paths)]
    documents = [(path, data) for path, data in documents if data is not None]
    documents.sort(key=lambda pair: pair[1]["datetime"])
    cards = {data["machine_info"]["sdgp"].get("gpu", "cpu") for _, data in documents}
    if len(cards) != 1:
        fix = "Give the files of one card."
        raise value_error("load", "paths", "results of one card", sorted(cards) or "none", fix)
    rows: dict[tuple[str, ...], Row] = {}
    missing: dict[tuple[str, ...], dict[str, str]] = {}
    for _, data in documents:
        for row in map(_row, (b for b in data["benchmarks"] if "us" in b["extra_info"])):
            key = (row.part, row.contender, row.case, row.info["dtype"])
            rows[key] = row
            missing.pop(key[:3], None)
        for entry in data["not_run"]:
            missing[entry["part"], entry["contender"], entry["case"]] = entry
    return Results(
        tuple(rows.values()),
        tuple(missing.values()),
        tuple(_conditions(path, data) for path, data in documents),
    )


def _read(path: Path) -> dict[str, Any] | None:
    """Return a document; None for JSON of another kind, such as a probe's, in the same folder.

    None as well for an empty file: pytest-benchmark makes it before it measures, and leaves it
    where it measured nothing.
    """
    text = path.read_text(encoding="utf-8")
    if not text:
        return None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        fix = "Write it with sdgp bench."
        raise value_error("load", "paths", "JSON", path, fix) from error
    ours = isinstance(data, dict) and "benchmarks" in data and "not_run" in data
    return data if ours else None


def _row(benchmark: dict[str, Any]) -> Row:
    info = benchmark["extra_info"]
    return Row(
        info["part"],
        info["contender"],
        info["case"],
        info["model"],
        info["layer"],
        info["M"],
        info["N"],
        info["K"],
        info["us"],
        info["reference_us"],
        info["reference"],
        benchmark["stats"]["median"] * 1e6,
        info["rival"],
        info,
    )


def _conditions(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "file": f"{path.parent.name}/{path.name}",
        "date": data["datetime"][:16],
        "command": data.get("command", ""),
        "commit": data["commit_info"].get("id") or "unknown",
        **data["machine_info"]["sdgp"],
    }


def geometric_mean(values: Sequence[float]) -> float:
    """Return exp of the mean logarithm."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return count, geometric mean, median, extremes and losses of the rows' speedups."""
    speedups = [row.speedup for row in rows]
    if not speedups:
        return {"shapes": 0}
    return {
        "shapes": len(speedups),
        "geometric_mean": geometric_mean(speedups),
        "median": statistics.median(speedups),
        "lowest": min(speedups),
        "highest": max(speedups),
        "losing": sum(s < 1 for s in speedups),
    }


def break_even(rows: Sequence[Row]) -> int | None:
    """Return the narrowest N from which on every measured shape gains; None if the widest loses."""
    narrowest = None
    for n in sorted({row.n for row in rows}, reverse=True):
        if any(row.speedup <= 1 for row in rows if row.n == n):
            break
        narrowest = n
    return narrowest
