"""DDP, FSDP2 and tuning ranks: judges what two_ranks.py found in two processes."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from tests.loops.examples import LOSS_TOLERANCE, TOKENS
from tests.loops.launch import in_two_processes

STEPS, LEARNING_RATE, ADAM_EPS = 3, 3e-3, 1e-8
#: A gradient is a sum of at most this many products, each of which stays below 1 here.
SUMMANDS = TOKENS * 256
#: Another order of summation moves a gradient by at most SUMMANDS * 2**-53, and that moves an AdamW
#: step, lr * g / (|g| + eps), by at most lr / eps times as much. What an element loses by that is
#: far below the distance of any two magnitudes, so the same elements survive the pruning.
WEIGHT_TOLERANCE = STEPS * LEARNING_RATE / ADAM_EPS * SUMMANDS * 2**-53


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    return in_two_processes("two_ranks", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def found(launch: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return launch[1]


def test_the_scripts_run_under_torchrun(launch: tuple[str, dict[str, Any]]) -> None:
    losses = [float(loss) for loss in re.findall(r"final loss (\S+)", launch[0])]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_half_batches_train_as_one_whole_batch(way: str, found: dict[str, Any]) -> None:
    assert found[f"{way} losses"] == pytest.approx(found["losses"], rel=LOSS_TOLERANCE)
    assert found[f"{way} distance"] < WEIGHT_TOLERANCE
    assert found["fsdp2 keys"]


def test_a_rank_that_fails_to_tune_does_not_hang_the_others(found: dict[str, Any]) -> None:
    assert found["rank 0 failed"] and found["rank 0 holds the turn"]
    assert found["after a failure"] == "sparse", "rank 1 tuned in its stead"
    assert found["rank 0 reads"] == "sparse", "and rank 0 read what it found"


def test_one_rank_tunes_each_product_and_the_other_reads_it(found: dict[str, Any]) -> None:
    (first, uses), (second, others) = found["searches and uses"]
    assert uses == others == ["sparse"] * 8
    assert first + second == 8, "each product is searched for once"
    use, transient, reason = found["while stuck"]
    assert (use, transient) == ("dense", True), reason


def test_converting_after_wrapping_works_where_only_containers_are_wrapped(
    found: dict[str, Any],
) -> None:
    assert found["pruning matters"]
    assert found["ddp names"] == found["ddp revert"] == ["0", "2"]
    assert found["ddp late"] and found["ddp reverted"]
    assert found["fsdp names"] == found["fsdp revert"] == ["0", "2"]
    assert found["fsdp late"]


def test_a_layer_that_is_sharded_itself_is_converted_first_or_not_at_all(
    found: dict[str, Any],
) -> None:
    assert "convert first" in found["sharded layer"]["0"]
    assert found["sharded after"] and found["unchanged"]
    assert "revert_" in found["revert sharded"] and "fully_shard" in found["revert sharded"]


def grad_of(method: str, x: Tensor, target: Tensor) -> Tensor:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).double()
    sdgp.convert_(model, sdgp.SDGPConfig(prune=method, backend="dense"))
    ((model(x) - target) ** 2).mean().backward()
    grad = model[0].weight.grad
    assert grad is not None
    return grad


@pytest.mark.parametrize(
    "method, shape, commutes",
    [
        ("magnitude", (8, 16), True),
        ("magnitude", (8, 6, 16), True),
        ("rescaled_magnitude", (8, 6, 16), True),
        ("rescaled_magnitude", (8, 16), False),
    ],
)
def test_which_methods_commute_with_splitting_the_batch(
    method: str, shape: tuple[int, ...], commutes: bool
) -> None:
    """Magnitude looks at one token, rescaled at one sample; without samples, at all tokens."""
    x, target = torch.randn(shape).double(), torch.randn(shape).double()
    whole = grad_of(method, x, target)
    halves = [grad_of(method, a, b) for a, b in zip(x.chunk(2), target.chunk(2), strict=True)]
    assert torch.allclose((halves[0] + halves[1]) / 2, whole, rtol=1e-9, atol=1e-12) is commutes
