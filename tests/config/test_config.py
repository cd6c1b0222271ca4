"""SDGPConfig validates itself and says what is wrong."""

import dataclasses
import itertools

import pytest

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.config.combinations import COMBINATIONS, combination_of


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


@pytest.mark.parametrize(
    "kwargs, error, words",
    [
        ({"forward": "sparse"}, ValueError, "forward must be one of dense, sparse_weight"),
        ({"grad_input": "both"}, ValueError, "grad_input must be one of grad_output, weight"),
        (
            {"forward": "sparse_weight", "grad_input": "weight"},
            ValueError,
            "prune must be \"none\" where grad_input has a 2:4 weight, got 'mvue'",
        ),
        (
            {"grad_input": "weight", "prune": "none"},
            ValueError,
            'forward must be "sparse_weight" where grad_input has a 2:4 weight',
        ),
        ({"weight_n": 5}, ValueError, "weight_n must be in 1..weight_m with weight_m = 4, got 5"),
        ({"weight_m": "4"}, TypeError, "weight_m must be an int"),
        ({"weight_beta": 2}, ValueError, "weight_beta must be in 0..1"),
        ({"weight_beta": True}, TypeError, "weight_beta must be a number"),
    ],
)
def test_bad_combinations(kwargs: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sdgp.SDGPConfig(**kwargs)


def test_the_table_holds_every_combination_that_makes_sense() -> None:
    found = set()
    for forward, grad_input, prune, grad_weight in itertools.product(
        ("dense", "sparse_weight"),
        ("grad_output", "weight"),
        ("none", "mvue"),
        ("dense", "sparse"),
    ):
        try:
            config = sdgp.SDGPConfig(
                forward=forward, grad_input=grad_input, prune=prune, grad_weight=grad_weight
            )
        except ValueError:
            continue
        found.add(combination_of(config).name)
        assert sdgp.SDGPConfig.from_text(config.text) == config
    assert found == {row.name for row in COMBINATIONS}
    assert len({row.operands for row in COMBINATIONS}) == len(COMBINATIONS) == len(found)


def test_what_masks_the_weight() -> None:
    weights = sdgp.SDGPConfig(prune="none", forward="sparse_weight")
    assert weights.masks_weight and not weights.prunes
    assert not weights.replace(weight_n=4).masks_weight
    assert not weights.replace(weight_beta=1.0).masks_weight
    assert weights.replace(grad_input="weight").describe() == "none weight 2:4 both ways"
    assert weights.replace(weight_beta=0.5).describe() == "none weight 2:4 weight_beta=0.5"
