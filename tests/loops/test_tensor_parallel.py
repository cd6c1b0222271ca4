"""Tensor-parallel layers: judges what two_ranks_tp.py found in two processes."""

from typing import Any

import pytest

from tests.loops.launch import in_two_processes

CROSSES = "groups of 4 outputs would cross the 2 shards of its 12"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    ranks: list[dict[str, Any]] = in_two_processes(
        "two_ranks_tp", tmp_path_factory.mktemp("tensor")
    )[1]
    assert len(ranks) == 2
    return ranks


@pytest.mark.parametrize("name", ["none", "magnitude", "rescaled", "both"])
def test_shards_have_the_gradients_of_one_process(name: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank[f"{name} names"] == ["0", "2"]
        assert rank[f"{name} before"], "converted, then sharded"
        assert rank[f"{name} after"], "sharded, then converted"
        assert rank[f"{name} matters"] == (name != "none")
        assert rank[f"{name} revert"]


@pytest.mark.parametrize(
    "layout",
    [
        "sequence parallel",
        "replicated",
        "fsdp 1 tensor 2 before",
        "fsdp 1 tensor 2 after",
        "fsdp 2 tensor 1 before",
        "fsdp 2 tensor 1 after",
        "autocast",
    ],
)
def test_layouts(layout: str, found: list[dict[str, Any]]) -> None:
    assert all(rank[layout] for rank in found)


def test_groups_that_would_cross_shards_leave_a_layer_plain_and_say_so(
    found: list[dict[str, Any]],
) -> None:
    for rank in found:
        assert rank["uneven before"] and rank["uneven after"]
        assert rank["uneven reasons"] == [CROSSES]
        assert len(rank["uneven warning"]) == 1 and CROSSES in rank["uneven warning"][0]


def test_draws_differ_between_shards_and_agree_between_replicas(
    found: list[dict[str, Any]],
) -> None:
    for rank in found:
        assert rank["shards differ"], "from equal seeds"
        assert rank["replicas agree"], "from different seeds"
        assert rank["draws"] and rank["generator kept"]
