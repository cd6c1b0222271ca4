"""Fused models in two processes: judges what two_ranks_fused.py found."""

from typing import Any

import pytest

from tests.loops.launch import in_two_processes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fused")
    ranks: list[dict[str, Any]] = in_two_processes("two_ranks_fused", folder)[1]
    assert len(ranks) == 2
    return ranks


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
@pytest.mark.parametrize("order", ["fused before", "fused after", "reverted"])
def test_the_gradients_are_those_of_one_process(
    way: str, order: str, found: list[dict[str, Any]]
) -> None:
    assert all(rank[f"{way}, {order}"] for rank in found)


def test_a_wrapper_is_looked_through(found: list[dict[str, Any]]) -> None:
    assert found[0]["ddp, names"] == ["0.0", "1.gate", "1.up"]


def test_a_layer_that_is_sharded_by_itself_runs_apart(found: list[dict[str, Any]]) -> None:
    assert all(rank["fsdp2, a layer by itself"] for rank in found)


def test_tensor_parallel_layers_run_apart(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["tp, fused before"]
        assert "fuse_: model must be one with a layer to fuse" in rank["tp, fused after"]
        assert "something hooks into it" in rank["tp, fused after"]
