"""2:4 weights in the planner, on numbers worked out by hand."""

import pytest

from sdgp_cusparselt.cards.efficiency import Curve, Efficiency
from sdgp_cusparselt.cards.gpus import GPU
from sdgp_cusparselt.planner.gemms import Gemm, Trace
from sdgp_cusparselt.planner.weights import (
    COMBINATIONS,
    fastest,
    inference,
    memory,
    step_times,
)

FLAT = Curve(((1.0, 0.5),))
IDEAL = Efficiency(FLAT, FLAT, "by hand", bandwidth=1.0, launch_us=0.0)
CARD = GPU("X", tflops=100, bandwidth=1000, source="by hand", published=IDEAL)
T, OUT, IN = 16384, 4096, 2048
G, W, X = T * OUT, OUT * IN, T * IN


def trace(tokens: int = T, other_bytes: int = 0) -> Trace:
    """Return one layer and a head, which stays dense."""
    g, w, x = tokens * OUT, W, tokens * IN
    gemms = (
        Gemm("up", "linear", "forward", tokens, OUT, IN, 1, (x, w, g), call=1),
        Gemm("up", "linear", "grad_input", tokens, IN, OUT, 1, (g, w, x), True, call=1),
        Gemm("up", "linear", "grad_weight", OUT, IN, tokens, 1, (g, x, w), call=1),
        Gemm("head", "linear", "forward", tokens, OUT, IN, 1, (x, w, g), call=2),
    )
    return Trace(gemms, other_bytes, 2 * W)


#: Microseconds: a dense product, what a sparse one saves, and bytes an element as microseconds.
DENSE = 2 * T * OUT * IN / 50e12 * 1e6
SAVED = DENSE / 2
PACK_W, PACK_G = 3.125 * W / 1e6, 3.125 * G / 1e6
BOTH_W, BOTH_G = 4.25 * W / 1e6, 4.25 * G / 1e6


@pytest.mark.parametrize(
    "name, saved",
    [
        ("sdgp", SAVED - PACK_G),
        ("mvue", SAVED - PACK_G),
        ("sdgp+mvue", 2 * SAVED - BOTH_G),
        ("weights", SAVED - PACK_W),
        ("weights+sdgp", 2 * SAVED - PACK_W - PACK_G),
        ("weights+mvue", 2 * SAVED - PACK_W - PACK_G),
        ("weights+sdgp+mvue", 3 * SAVED - PACK_W - BOTH_G),
        ("double", 2 * SAVED - BOTH_W),
        ("double+mvue", 3 * SAVED - BOTH_W - PACK_G),
    ],
)
def test_a_step_with_each_combination(name: str, saved: float) -> None:
    other = 10**9
    times = {time.name: time for time in step_times(trace(other_bytes=other), CARD, IDEAL)}
    assert set(times) == set(COMBINATIONS)
    assert times[name].dense == pytest.approx(4 * DENSE + 3 * other / 1e6)
    assert times[name].dense - times[name].best == pytest.approx(saved)
    assert fastest(list(times.values())).name == "double+mvue"


def test_what_would_lose_runs_dense() -> None:
    slow = Efficiency(FLAT, Curve(((1.0, 0.25),)), "by hand", bandwidth=1.0, launch_us=0.0)
    assert all(time.best == time.dense for time in step_times(trace(), CARD, slow))
    # A pass over the gradient costs more than one product saves, one over the weight does not.
    narrow = GPU("X", 100, 60, "by hand", IDEAL)
    times = {time.name: time for time in step_times(trace(), narrow, IDEAL)}
    assert times["sdgp"].best == times["sdgp"].dense
    assert times["weights"].best < times["weights"].dense
    assert times["weights+sdgp"].best == pytest.approx(times["weights"].best)


def test_a_prefill_saves_arithmetic_and_packs_nothing() -> None:
    found = inference(trace(other_bytes=10**6), CARD, IDEAL)
    assert found.dense == pytest.approx(2 * DENSE + 1)
    assert found.best == pytest.approx(1.5 * DENSE + 1)


def test_a_decoded_token_saves_the_bytes_of_the_weight() -> None:
    found = inference(trace(tokens=8), CARD, IDEAL)
    ends = 2 * (8 * IN + 8 * OUT) / 1e6
    assert found.dense == pytest.approx(2 * (2 * W / 1e6 + ends))
    assert found.best == pytest.approx((2 + 1.125) * W / 1e6 + 2 * ends)


def test_packed_weights_take_nine_sixteenths() -> None:
    found = memory(trace())
    assert found.dense == 2 * 2 * W
    assert found.packed == 2 * W + 2 * W * 9 / 16
