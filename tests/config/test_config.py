"""SDGPConfig validates itself and says what is wrong."""

import dataclasses

import pytest

import sdgp_cusparselt as sdgp


@pytest.mark.parametrize(
    "kwargs, error, words",
    [
        ({"prune": "max"}, ValueError, "prune must be one of none, random, magnitude"),
        ({"prune": None}, ValueError, "prune must be one of .*, got None"),
        ({"m": 0}, ValueError, "m must be in 1..32, got 0"),
        ({"n": 5}, ValueError, "n must be in 1..m with m = 4, got 5"),
        ({"n": 0}, ValueError, "n must be in 1..m with m = 4, got 0"),
        ({"n": 2.0}, TypeError, "n must be an int, got 2.0"),
        ({"m": "4"}, TypeError, "m must be an int, got '4'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, cusparselt, dense"),
        ({"on_unsupported": "dense"}, ValueError, "must be one of plain, emulate, raise"),
        ({"grad_weight": True}, ValueError, "grad_weight must be one of dense, sparse"),
        ({"grad_weight": "sparse", "m": 8}, ValueError, 'grad_weight must be "dense" for'),
        ({"check_every": -1}, ValueError, "check_every must be >= 0, got -1"),
        ({"check_every": 0.5}, TypeError, "check_every must be an int, got 0.5"),
    ],
)
def test_bad_values(kwargs: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sdgp.SDGPConfig(**kwargs)


def test_frozen_hashable_and_replaceable() -> None:
    config = sdgp.SDGPConfig(prune="magnitude")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n = 1
    assert config.replace(n=1) == sdgp.SDGPConfig(prune="magnitude", n=1)
    assert len({config, sdgp.SDGPConfig(prune="magnitude")}) == 1
    with pytest.raises(ValueError, match="n must be"):
        config.replace(n=9)


@pytest.mark.parametrize(
    "kwargs, prunes, hardware, text",
    [
        ({}, True, True, "mvue 2:4"),
        ({"prune": "magnitude", "n": 1}, True, True, "magnitude 1:4"),
        ({"n": 4, "m": 8}, True, False, "mvue 4:8 (emulated)"),
        ({"prune": "none"}, False, True, "none"),
        ({"n": 4}, False, False, "none"),
        ({"grad_weight": "sparse"}, True, True, "mvue 2:4 grad_weight=mvue"),
        ({"backend": "dense"}, True, True, "mvue 2:4 backend=dense"),
    ],
)
def test_descriptions(kwargs: dict, prunes: bool, hardware: bool, text: str) -> None:
    config = sdgp.SDGPConfig(**kwargs)
    assert (config.prunes, config.on_hardware, config.describe()) == (prunes, hardware, text)
