"""The drawings show the addresses that the layout gives."""

from pathlib import Path

import packing_oracle as oracle
import pytest
from PIL import Image

from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing.drawing import draw_png, draw_text


def test_text_lists_every_address_of_a_small_operand() -> None:
    lines = draw_text(layouts.PLAIN, 32, 64).splitlines()
    header = next(i for i, line in enumerate(lines) if "row\\group" in line)
    for row, line in enumerate(lines[header + 1 :]):
        numbers = [int(word) for word in line.split()]
        assert numbers == [row, *(oracle.plain(row, g, 32, 64) for g in range(16))]
    assert "group 0, group 1, row 3, group 2" in lines[1]


def test_text_of_a_large_operand_says_what_it_leaves_out() -> None:
    assert "of 256 rows x 32 groups" in draw_text(layouts.BLOCKED, 256, 128)


def test_png_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "layout.png"
    draw_png(layouts.BLOCKED, 256, 128, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert colours is not None and len(colours) > 100


def test_a_shape_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fits"):
        draw_text(layouts.BLOCKED, 320, 64)
    with pytest.raises(ValueError, match="fits"):
        draw_png(layouts.BLOCKED, 320, 64, tmp_path / "x.png")
