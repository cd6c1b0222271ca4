"""MetadataLayout: addresses, sizes, serialisation, and what it refuses."""

import dataclasses
import json

import packing_cases as cases
import packing_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing.layout import MetadataLayout

SHAPES = ((16, 16), (32, 32), (64, 64), (48, 80), (128, 128), (256, 128), (384, 192))


@pytest.mark.parametrize("name", sorted(layouts.NAMED))
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_named_layouts_follow_the_published_formulas(name: str, rows: int, cols: int) -> None:
    layout = layouts.NAMED[name]
    got = layout.address(torch.arange(rows)[:, None], torch.arange(cols // 4)[None, :], rows, cols)
    want = [[oracle.ADDRESS[name](r, g, rows, cols) for g in range(cols // 4)] for r in range(rows)]
    assert got.tolist() == want


@pytest.mark.parametrize("rows, cols", SHAPES)
def test_an_int_address_equals_the_tensor_address(rows: int, cols: int) -> None:
    layout = layouts.BLOCKED
    grid = layout.address(torch.arange(rows)[:, None], torch.arange(cols // 4), rows, cols)
    assert grid[rows - 1, cols // 4 - 1] == layout.address(rows - 1, cols // 4 - 1, rows, cols)


def test_blocked_and_plain_agree_at_128_rows_and_differ_from_256() -> None:
    def table(layout: MetadataLayout, rows: int) -> torch.Tensor:
        return layout.address(torch.arange(rows)[:, None], torch.arange(32)[None], rows, 128)

    assert torch.equal(table(layouts.PLAIN, 128), table(layouts.BLOCKED, 128))
    assert not torch.equal(table(layouts.PLAIN, 256), table(layouts.BLOCKED, 256))


@pytest.mark.parametrize(
    "rows, cols, nbytes",
    [(16, 16, 256), (16, 64, 256), (32, 96, 512), (96, 64, 768), (144, 208, 5120)],
)
def test_region_is_as_large_as_a_plan_of_a_card_has_it(rows: int, cols: int, nbytes: int) -> None:
    assert layouts.PLAIN.nbytes(rows, cols) == nbytes
    assert oracle.metadata_nbytes("plain", rows, cols) == nbytes


def test_the_region_of_eight_bit_operands_is_twice_their_nibbles() -> None:
    assert layouts.EIGHT_BIT.nbytes(64, 64) == 2048 and layouts.EIGHT_BIT.nbytes(96, 64) == 4096
    assert layouts.EIGHT_BIT.used_nbytes(64, 128) == 1024


def test_an_order_takes_every_region_rule_that_gives_the_size() -> None:
    for nbytes, rules in ((256, 2), (512, 3)):
        found = layouts.PLAIN.fitted(16, 64, nbytes)
        assert {layout.nbytes(16, 64) for layout in found} == {nbytes} and len(found) == rules
    assert layouts.PLAIN.fitted(16, 64, 256)[0] is not layouts.PLAIN
    assert layouts.PLAIN.fitted(16, 64, 256)[0] == layouts.PLAIN
    assert layouts.PLAIN.fitted(16, 64, 12345) == ()
    assert layouts.BLOCKED.fitted(320, 64, layouts.PLAIN.nbytes(320, 64)) == ()  # no whole tiles


def test_layouts_are_compared_at_a_shape() -> None:
    assert layouts.PLAIN.reads_as(layouts.BLOCKED, 128, 64)
    assert not layouts.PLAIN.reads_as(layouts.BLOCKED, 256, 64)
    wide = dataclasses.replace(layouts.PLAIN, region=layouts.BARE_REGION)
    assert layouts.PLAIN.reads_as(wide, 128, 64) and not layouts.PLAIN.reads_as(wide, 16, 64)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    row_bits=st.integers(0, 7),
    group_bits=st.integers(1, 6),
    order=st.sampled_from(["rows", "groups"]),
    row_tiles=st.integers(1, 3),
    group_tiles=st.integers(1, 3),
)
def test_every_layout_is_a_bijection_onto_its_bytes(
    seed: int, row_bits: int, group_bits: int, order: str, row_tiles: int, group_tiles: int
) -> None:
    layout = cases.random_layout(seed, row_bits, group_bits, order)
    rows, cols = row_tiles << row_bits, 4 * (group_tiles << group_bits)
    table = layout.address(
        torch.arange(rows)[:, None], torch.arange(cols // 4)[None, :], rows, cols
    )
    assert sorted(table.flatten().tolist()) == list(range(rows * cols // 4))
    assert layout.used_nbytes(rows, cols) == -(-rows * cols // 4 // 2)
    again = MetadataLayout.from_json(layout.to_json())
    assert again == layout and hash(again) == hash(layout)


def test_json_ignores_fields_of_the_future_and_refuses_other_objects() -> None:
    fields = json.loads(layouts.PLAIN.to_json()) | {"colour": "blue"}
    assert MetadataLayout.from_json(json.dumps(fields)) == layouts.PLAIN
    with pytest.raises(ValueError, match="row_strides"):
        MetadataLayout.from_json("[1, 2]")
    with pytest.raises(ValueError):
        MetadataLayout.from_json("not json")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"row_strides": (1, 2), "group_strides": (2,)}, "every power of two"),
        ({"row_strides": (), "group_strides": ()}, "every power of two"),
        ({"order": "cols"}, "'rows' or 'groups'"),
        ({"padding": 16}, "a nibble"),
        ({"region": ((32, 6),)}, "divisible by 4"),
        ({"region": ()}, "divisible by 4"),
        ({"region_factor": 0}, "at least 1"),
    ],
)
def test_bad_layouts_are_refused(change: dict[str, object], words: str) -> None:
    fields = {"name": "x", "row_strides": (1,), "group_strides": (2,)} | change
    with pytest.raises(ValueError, match=words):
        MetadataLayout(**fields)  # type: ignore[arg-type]


def test_misfit_says_why() -> None:
    assert layouts.BLOCKED.misfit(256, 128) is None
    assert "need" in str(layouts.BLOCKED.misfit(320, 128))
    assert "groups of four" in str(layouts.PLAIN.misfit(32, 30))


def test_default_layout_is_blocked_from_256_rows_where_its_tiles_fit() -> None:
    assert layouts.default_layout(128, 64) is layouts.PLAIN
    assert layouts.default_layout(256, 64) is layouts.BLOCKED
    assert layouts.default_layout(320, 64) is layouts.PLAIN
    assert layouts.default_layout(320, 64, torch.int8) is layouts.EIGHT_BIT
