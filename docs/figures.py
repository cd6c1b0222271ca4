"""Draw the figures of how-it-works.md from the code that they explain.

python docs/figures.py [FOLDER]
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sdgp_cusparselt.packing.layout import PLAIN
from sdgp_cusparselt.packing.reference import pack_operand

INK, KEPT, DROPPED, PLAIN_CELL, ACCENT = "#12355b", "#7fb3d5", "#f0f0f0", "#dce6ee", "#c0504d"
#: SVG without dates and random ids, so that the same code draws the same bytes.
matplotlib.rcParams.update({"svg.hashsalt": "sdgp", "font.size": 11, "svg.fonttype": "path"})


def main(folder: Path) -> None:
    """Write every figure."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in {"three-gemms": three_gemms, "packing": packing, "layout": layout}.items():
        draw().savefig(folder / f"{name}.svg", metadata={"Date": None})


def three_gemms() -> Figure:
    """Draw the products of a linear layer; only grad_input has a pruned operand."""
    figure, axes = _canvas(3, height=3.4)
    tokens, out, inside = 3.0, 2.0, 2.6
    _product(
        axes[0],
        "output = input @ weight.T",
        "dense",
        ("input", tokens, inside),
        ("weight.T", inside, out),
        ("output", tokens, out),
    )
    _product(
        axes[1],
        "grad_input = prune(grad_output) @ weight",
        "2:4 along out_features",
        ("grad_output", tokens, out),
        ("weight", out, inside),
        ("grad_input", tokens, inside),
        pruned=True,
    )
    _product(
        axes[2],
        "grad_weight = grad_output.T @ input",
        "dense, as in the paper",
        ("grad_output.T", out, tokens),
        ("input", tokens, inside),
        ("grad_weight", out, inside),
    )
    return figure


def _product(
    axes: Axes, title: str, note: str, *matrices: tuple[str, float, float], pruned: bool = False
) -> None:
    """Draw left @ right = result, each given as (name, rows, columns)."""
    x = 0.0
    signs = ("@", "=", "")
    for index, (name, rows, columns) in enumerate(matrices):
        sparse = pruned and index == 0
        axes.add_patch(Rectangle((x, -rows / 2), columns, rows, fc=PLAIN_CELL, ec=INK, lw=1.2))
        if sparse:
            _stripes(axes, x, rows, columns)
        axes.text(x + columns / 2, rows / 2 + 0.15, name, ha="center", va="bottom", fontsize=9)
        axes.text(x + columns + 0.4, 0, signs[index], ha="center", va="center", fontsize=13)
        x += columns + 0.8
    axes.set_title(title, fontsize=10, color=INK)
    axes.text((x - 0.8) / 2, -2.2, note, ha="center", color=ACCENT if pruned else INK, fontsize=10)
    axes.set_xlim(-0.2, x - 0.4)
    axes.set_ylim(-2.5, 2.2)


def _stripes(axes: Axes, x: float, rows: float, columns: float) -> None:
    """Fill a matrix with a 2:4 pattern: two of four cells of each group are kept."""
    torch.manual_seed(0)
    high, wide = 12, 8
    kept = torch.rand(high, wide // 4, 4).argsort(-1).lt(2).reshape(high, wide)
    for i, j in kept.nonzero().tolist():
        corner = (x + columns * j / wide, rows / 2 - rows * (i + 1) / high)
        axes.add_patch(Rectangle(corner, columns / wide, rows / high, fc=KEPT, ec="white", lw=0.5))
    axes.add_patch(Rectangle((x, -rows / 2), columns, rows, fill=False, ec=INK, lw=1.2))


def packing() -> Figure:
    """Draw one row of 16 elements, what is kept of it, and the words that are stored."""
    torch.manual_seed(4)
    row = (torch.randn(16, 64) * 4).round() / 4 + 0.0
    packed = pack_operand(row.to(torch.bfloat16), PLAIN)
    dense, kept = row[0, :16], packed.unpack()[0, :16].float()
    values = packed.values[0, :8].float()
    figure, (axes,) = _canvas(1, height=3.6)
    _cells(axes, 2.9, dense.tolist(), [KEPT if v else DROPPED for v in kept.tolist()])
    _cells(axes, 0.0, values.tolist(), [KEPT] * 8)
    positions = kept.reshape(4, 4).ne(0)
    for group in range(4):
        axes.plot([4 * group] * 2, [2.7, 4.1], color=INK, lw=2)
        pair = _pair(positions[group])
        axes.annotate(
            "",
            (2 * group + 1, 1.1),
            (4 * group + 2, 2.8),
            arrowprops={"arrowstyle": "->", "color": INK},
        )
        x = 9.2 + 1.75 * group
        nibble = pair[0] | pair[1] << 2
        axes.add_patch(Rectangle((x, 0), 1.6, 1, fc="#f7e3b5", ec=INK))
        axes.text(x + 0.8, 0.5, f"{pair[1]:02b}{pair[0]:02b}", ha="center", va="center")
        axes.text(x + 0.8, 1.15, f"{pair[0]}, {pair[1]}", ha="center", fontsize=9)
        axes.text(x + 0.8, -0.15, f"0x{nibble:X}", ha="center", va="top", fontsize=9)
    axes.plot([16] * 2, [2.7, 4.1], color=INK, lw=2)
    axes.text(0, 4.25, "one row of grad_output, groups of four out_features", color=INK)
    axes.text(0, -0.2, "values: 2 of 4, half the bytes", color=INK, va="top")
    axes.text(9.2, -0.55, "metadata: i0 | i1 << 2, a nibble a group", color=INK, va="top")
    axes.set_xlim(-0.2, 16.4)
    axes.set_ylim(-1.2, 4.8)
    return figure


def _pair(positions: torch.Tensor) -> tuple[int, int]:
    """Return the two kept places of a group that has two."""
    first, second = positions.nonzero().flatten().tolist()
    return first, second


def _cells(axes: Axes, y: float, numbers: list[float], colors: list[str]) -> None:
    for x, (number, color) in enumerate(zip(numbers, colors, strict=True)):
        axes.add_patch(Rectangle((x, y), 1, 1, fc=color, ec=INK, lw=0.8))
        text = f"{number:g}"
        axes.text(
            x + 0.5,
            y + 0.5,
            text,
            ha="center",
            va="center",
            fontsize=8.5,
            color=INK if color == KEPT else "#999999",
        )


def layout() -> Figure:
    """Draw where the nibbles of the first 32 rows and 32 columns lie in memory."""
    rows, cols = 32, 32
    row, group = torch.arange(rows)[:, None], torch.arange(cols // 4)[None]
    address = PLAIN.address(row, group, rows, cols)
    figure, (axes, side) = _canvas(2, height=6.4, ratios=(1.5, 1))
    axes.imshow(address, cmap="viridis", aspect="auto", norm=Normalize(0, int(address.max())))
    for (i, j), value in zip(
        torch.cartesian_prod(row[:, 0], group[0]).tolist(), address.flatten().tolist(), strict=True
    ):
        color = "white" if value < 0.6 * int(address.max()) else "black"
        axes.text(j, i, str(value), ha="center", va="center", fontsize=7.5, color=color)
    axes.axis("on")
    axes.set_xlabel("group of four columns")
    axes.set_ylabel("row")
    axes.set_title("nibble address in the metadata", fontsize=11, color=INK)
    axes.set_xticks(range(cols // 4))
    axes.set_yticks(range(0, rows, 4))
    _strides(side)
    return figure


def _strides(axes: Axes) -> None:
    """List the stride of every index bit: the whole layout in eight numbers."""
    lines = [(f"row bit {bit}", stride) for bit, stride in enumerate(PLAIN.row_strides)]
    lines += [(f"group bit {bit}", stride) for bit, stride in enumerate(PLAIN.group_strides)]
    axes.set_title(f"the layout '{PLAIN.name}': a stride per bit", fontsize=11, color=INK)
    for place, (name, stride) in enumerate(lines):
        axes.text(0.12, 0.9 - 0.08 * place, name)
        axes.text(0.88, 0.9 - 0.08 * place, f"{stride}", ha="right", family="monospace")
    axes.text(0.12, 0.12, "address = sum of the strides\nof the bits that are set", color=INK)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)


def _canvas(columns: int, *, height: float, ratios: Any = None) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, width_ratios=ratios)[0]
    for each in axes:
        each.set_axis_off()
    return figure, list(axes)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "img")
