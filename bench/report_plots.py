"""Plots of one card's results, legible at the width of a README."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.report_data import Results, Row, geometric_mean

DENSE, SPARSE, PACK, LOSS = "#7d8794", "#2f6db0", "#f2a03d", "#c0392b"
TOKEN_SHADES = ("#8fc1ea", "#2f6db0", "#0b2239", "#6a3d9a")
WIDTH, DPI = 9.5, 160
MOST_BARS = 24


def plot_all(results: Results, folder: Path) -> list[Path]:
    """Write every plot that the results have numbers for; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    title = str(results.conditions[0].get("gpu", "CPU, emulated: says nothing about speed"))
    written = []
    for name, draw in (("speedups", _speedups), ("roofline", _roofline), ("shares", _shares)):
        figure = draw(results, title)
        if figure is not None:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=DPI)
    return written


def _by_layer(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return layer -> rows, the layer with the best geometric mean first."""
    layers: dict[str, list[Row]] = {}
    for row in rows:
        layers.setdefault(f"{row.model}  {row.layer}", []).append(row)
    order = sorted(layers, key=lambda name: -geometric_mean([r.speedup for r in layers[name]]))
    return {name: layers[name] for name in order}


def _speedups(results: Results, title: str) -> Figure | None:
    """Whole grad_input (filled) and the product alone (open) against torch.mm, by layer."""
    layers = _by_layer(results.of("grad_input", "sdgp"))
    if not layers:
        return None
    figure = Figure(figsize=(WIDTH, 2.0 + 0.32 * len(layers)), layout="constrained")
    axes = figure.subplots()
    tokens = sorted({row.m for rows in layers.values() for row in rows})
    shades = dict(zip(tokens, TOKEN_SHADES, strict=False))
    for place, rows in enumerate(layers.values()):
        for offset, row in zip(_spread(len(rows)), sorted(rows, key=lambda r: r.m), strict=True):
            shade, height = shades.get(row.m, SPARSE), place + offset
            alone = results.find("sparse_gemm", "sdgp", row.case)
            if alone is not None:
                axes.plot([row.speedup, alone.speedup], [height] * 2, color=shade, lw=1, alpha=0.6)
                axes.plot(alone.speedup, height, "o", mfc="white", mec=shade, ms=6)
            axes.plot(row.speedup, height, "o", color=shade, ms=7)
    axes.axvline(1.0, color=LOSS, lw=1.2)
    left, right = axes.get_xlim()
    axes.axvspan(min(left, 0.98), 1.0, color=LOSS, alpha=0.06, lw=0)
    axes.set_xlim(min(left, 0.98), max(right, 1.02))
    axes.set_yticks(range(len(layers)), list(layers), fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("speedup over torch.mm, in one run (left of the red line: slower)")
    axes.set_title(f"grad_input on sparse tensor cores, {title}", fontsize=11)
    marks = [
        Line2D([], [], marker="o", ls="", color=shade, label=f"{count} tokens")
        for count, shade in shades.items()
    ]
    marks += [
        Line2D([], [], marker="o", ls="", color=DENSE, label="prune + pack + product"),
        Line2D([], [], marker="o", ls="", mfc="white", mec=DENSE, label="product alone"),
    ]
    figure.legend(handles=marks, ncols=5, fontsize=9, loc="outside lower center")
    return figure


def _spread(count: int) -> list[float]:
    """Return heights around 0 for points of one layer."""
    return [(index - (count - 1) / 2) * 0.8 / max(count, 3) for index in range(count)]


def _roofline(results: Results, title: str) -> Figure | None:
    """Achieved dense-equivalent TFLOP/s against intensity, under the ceilings of the same run."""
    points = (
        ("dense product", DENSE, results.of("dense_gemm", "torch.mm", "torch.mm grad_weight")),
        ("sparse product", SPARSE, results.of("sparse_gemm", "sdgp", "sdgp grad_weight")),
        ("prune + pack + product", PACK, results.of("grad_input", "sdgp")),
    )
    ceilings = {row.contender: row for row in results.of("ceiling")}
    if len(ceilings) < 2 or not any(rows for _, _, rows in points):
        return None
    peak = ceilings["torch.mm"].info["flops"] / ceilings["torch.mm"].us / 1e6
    copy = ceilings["clone"].info["bytes"] / ceilings["clone"].us / 1e6  # TB/s
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    axes = figure.subplots()
    intensities = [r.info["flops"] / r.info["bytes"] for _, _, rows in points for r in rows]
    x = np.geomspace(
        min(*intensities, peak / copy) / 2, max(*intensities, 2 * peak / copy) * 2, 200
    )
    axes.plot(
        x, np.minimum(copy * x, peak), color=DENSE, label=f"dense ceiling, {peak:.4g} TFLOP/s"
    )
    twice = np.minimum(copy * x, 2 * peak)
    axes.plot(x, twice, "--", color=SPARSE, label="twice that: what 2:4 promises")
    for name, color, rows in points:
        at = [r.info["flops"] / r.info["bytes"] for r in rows]
        reached = [r.info["flops"] / r.us / 1e6 for r in rows]
        axes.plot(at, reached, "o", color=color, ms=6, alpha=0.8, label=name)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("dense operations per byte that the contender must move")
    axes.set_ylabel("dense-equivalent TFLOP/s")
    axes.grid(alpha=0.3, which="both")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(fontsize=9, loc="lower right", title=f"copy bandwidth {copy:.4g} TB/s")
    axes.set_title(f"Roofline with measured ceilings, {title}", fontsize=11)
    return figure


def _shares(results: Results, title: str) -> Figure | None:
    """Pack and sparse product as shares of the dense product's time; 1 is break-even."""
    found = []
    for net in results.of("grad_input", "sdgp"):
        pack = results.find("pack", "sdgp", net.case)
        product = results.find("sparse_gemm", "sdgp", net.case)
        if pack is not None and product is not None:
            found.append((net, pack.us / net.reference_us, product.us / product.reference_us))
    if not found:
        return None
    found.sort(key=lambda entry: entry[1] + entry[2])
    middle = sorted(net.m for net, _, _ in found)[len(found) // 2]
    shown = found if len(found) <= MOST_BARS else [e for e in found if e[0].m == middle]
    figure = Figure(figsize=(WIDTH, 1.9 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(shown))
    products, packs = ([entry[index] for entry in shown] for index in (2, 1))
    axes.barh(places, products, 0.7, color=SPARSE, label="sparse product")
    axes.barh(places, packs, 0.7, left=products, color=PACK, label="prune + pack")
    whole = [net.us / net.reference_us for net, _, _ in shown]
    axes.plot(whole, places, "|", color="black", ms=12, mew=2, label="measured together")
    axes.axvline(1.0, color=LOSS, lw=1.2, label="break-even: dense torch.mm")
    axes.set_yticks(places, [net.case for net, _, _ in shown], fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("share of the dense product's time")
    axes.set_title(f"Where grad_input's time goes, {title}", fontsize=11)
    figure.legend(ncols=4, fontsize=9, loc="outside lower center")
    return figure
