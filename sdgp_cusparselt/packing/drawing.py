"""Draw a metadata layout: which group's indices lie where, as text or as a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.packing.layout import MetadataLayout

# More than this is not looked at on a terminal.
_TEXT_ROWS, _TEXT_GROUPS = 32, 16


def places(layout: MetadataLayout, rows: int, cols: int) -> Tensor:
    """Return the nibble address of each group, int64 [rows, cols / 4].

    Raises:
        ValueError: if the layout does not fit the shape.
    """
    misfit = layout.misfit(rows, cols)
    if misfit is not None:
        raise value_error(
            "places",
            "rows, cols",
            "a shape that the layout fits",
            (rows, cols),
            f"{misfit[0].upper()}{misfit[1:]}.",
        )
    row, group = torch.arange(rows)[:, None], torch.arange(cols // 4)[None, :]
    return layout.address(row, group, rows, cols)


def draw_text(layout: MetadataLayout, rows: int, cols: int) -> str:
    """Return a table of nibble addresses, and the bits of an address in words.

    Args:
        layout: what to draw.
        rows: rows of the operand.
        cols: columns of the operand.

    Returns:
        str: one line per row and one number per group of four columns; the first 32 rows and 16
        groups of a larger operand.

    Raises:
        ValueError: if the layout does not fit the shape.
    """
    table = places(layout, rows, cols)
    shown = table[:_TEXT_ROWS, :_TEXT_GROUPS]
    width = max(len(str(int(shown.max()))), len(str(shown.shape[1] - 1)), 2) + 1
    lines = [
        f"layout {layout.name!r}, {rows} x {cols}: {layout.nbytes(rows, cols)} bytes of metadata,"
        f" tiles of {layout.tile_rows} x {4 * layout.tile_groups}, next tile along"
        f" {layout.order}, padding 0x{layout.padding:X}",
        "address bit, lowest first: " + ", ".join(_bit_names(layout)),
        "nibble of (row, group of four columns):",
        " row\\group" + "".join(f"{group:{width}}" for group in range(shown.shape[1])),
    ]
    for row, addresses in enumerate(shown.tolist()):
        lines.append(f"{row:10}" + "".join(f"{address:{width}}" for address in addresses))
    if shown.shape != table.shape:
        left_out = f"{table.shape[0]} rows x {table.shape[1]} groups"
        lines.append(f"(the first {shown.shape[0]} x {shown.shape[1]} of {left_out})")
    return "\n".join(lines)


def draw_png(layout: MetadataLayout, rows: int, cols: int, path: str | Path) -> None:
    """Write a picture in which colour is the place in memory, dark first.

    Args:
        layout: what to draw.
        rows: rows of the operand.
        cols: columns of the operand.
        path: the file to write; its ending chooses the format.

    Raises:
        ValueError: if the layout does not fit the shape.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = places(layout, rows, cols)
    figure = Figure(figsize=(7, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(table.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
    for step, line in ((layout.tile_rows, axes.axhline), (layout.tile_groups, axes.axvline)):
        count = table.shape[0] if line == axes.axhline else table.shape[1]
        for edge in range(step, count, step):
            line(edge - 0.5, color="white", linewidth=0.8)
    axes.set(
        title=f"{layout.name}: {rows} x {cols}",
        xlabel="group of four columns",
        ylabel="row",
    )
    figure.colorbar(picture, label="nibble address in the metadata")
    figure.savefig(path)


def _bit_names(layout: MetadataLayout) -> list[str]:
    return [f"{kind} {bit}" for kind, bit in layout.bit_sources()]
