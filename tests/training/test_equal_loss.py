"""Steps to the same loss, from dense runs of several lengths."""

import math

import pytest

from sdgp_cusparselt.training.equal_loss import steps_ratios, steps_to_loss

DENSE = {500: 3.0, 1000: 2.0}


def test_steps_between_two_lengths_are_interpolated_in_their_logarithm() -> None:
    assert steps_to_loss(DENSE, 3.0) == pytest.approx(500)
    assert steps_to_loss(DENSE, 2.0) == pytest.approx(1000)
    assert steps_to_loss(DENSE, 2.5) == pytest.approx(500 * math.sqrt(2))


@pytest.mark.parametrize("loss", [1.9, 3.1])
def test_a_loss_that_no_dense_run_frames_is_refused(loss: float) -> None:
    with pytest.raises(ValueError, match=r"dense run, 2\.0000 and 3\.0000, got"):
        steps_to_loss(DENSE, loss)


def run(method: str, seed: int, steps: int, metric: float) -> dict[str, object]:
    identity = {"method": method, "seed": seed}
    return {"identity": identity, "label": method, "steps": steps, "metric": metric}


def document(*runs: dict[str, object], higher_is_better: bool = False) -> dict[str, object]:
    metric = {"name": "bits per byte", "higher_is_better": higher_is_better}
    return {"metric": metric, "runs": list(runs)}


def test_ratios_pair_each_seed_with_its_own_dense_runs() -> None:
    short = document(run("dense", 0, 500, 3.0), run("dense", 1, 500, 4.0))
    long = document(
        run("dense", 0, 1000, 2.0),
        run("dense", 1, 1000, 3.0),
        run("mvue", 0, 1000, 2.5),
        run("mvue", 1, 1000, 3.0),
    )
    (found,) = steps_ratios([short, long])
    assert (found.label, found.steps) == ("mvue", 1000)
    assert found.values == pytest.approx((math.sqrt(2), 1.0))
    assert found.gaps == pytest.approx((0.5, 0.0))
    assert found.mean == pytest.approx((math.sqrt(2) + 1) / 2)
    assert found.std == pytest.approx((math.sqrt(2) - 1) / math.sqrt(2))


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dense runs of 1000 steps for every seed, got none"):
        steps_ratios([document(run("mvue", 0, 1000, 2.5))])
    with pytest.raises(ValueError, match="documents must be results with a loss"):
        steps_ratios([document(run("mvue", 0, 1000, 2.5), higher_is_better=True)])
