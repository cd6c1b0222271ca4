"""Schedules: every step against formulas written out here, and through real layers."""

import dataclasses
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.base import Problem
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend, pattern_reasons
from tests.helpers import oracle_magnitude, same_bits
from tests.loops.schedules import TOTAL, grad_input, layer, oracle_stage, scheduled

CASES = [
    {},
    {"warmup": 5, "tail": 7},
    {"ramp": "stepwise"},
    {"ramp": "geometric", "warmup": 3, "settle": 4},
    {"ramp": "densify", "warmup": 3, "settle": 4, "tail": 2},
    {"decay": "linear", "warmup": 4, "settle": 6},
    {"decay": "linear", "decay_rate": 0.1},
    {"decay": "exponential", "decay_rate": 0.3, "tail": 5, "settle": 2},
    {"decay": "linear", "ramp": "geometric", "warmup": 1},
]


@pytest.mark.parametrize("kwargs", CASES, ids=str)
@pytest.mark.parametrize("n, m", [(2, 4), (1, 4)])
def test_every_step_equals_the_formulas(kwargs: dict, n: int, m: int) -> None:
    config = scheduled(n=n, m=m, **kwargs)
    for step in range(TOTAL + 3):
        pruned, at_n, at_m, beta = oracle_stage(step, kwargs, n, m)
        now = config.at(step)
        assert now.schedule is None
        assert (now.prune != "none") is pruned
        if pruned:
            assert (now.n, now.m) == (at_n, at_m), step
            assert now.beta == pytest.approx(beta, abs=1e-12), step


def test_ramps_are_those_of_the_paper() -> None:
    def ramp(kind: str, n: int, m: int) -> list[tuple[int, int]]:
        return sdgp.Schedule(total_steps=9, ramp=kind).patterns(n, m)

    assert ramp("stepwise", 1, 16) == [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]
    assert ramp("geometric", 2, 4) == [(16, 32), (8, 16), (4, 8), (2, 4)]
    assert ramp("densify", 1, 4) == [(1, 32), (1, 16), (1, 8), (1, 4)]


@pytest.mark.parametrize(
    "kwargs", [{"ramp": "geometric", "warmup": 6, "tail": 6}, {"decay": "linear", "settle": 4}]
)
def test_the_mask_that_a_layer_uses_at_each_step(kwargs: dict) -> None:
    module, weight = layer(scheduled(**kwargs)), layer(scheduled()).weight.detach()
    for step in range(TOTAL):
        torch.manual_seed(step)
        grad_output = torch.randn(6, 32)
        pruned, n, m, beta = oracle_stage(step, kwargs, 2, 4)
        kept = oracle_magnitude(grad_output, n, m, 1) if pruned else grad_output
        expected = kept + beta * (grad_output - kept)
        assert torch.equal(grad_input(module, grad_output), expected @ weight), step
        assert sdgp.step(module) == step + 1


@pytest.mark.parametrize("method", ["magnitude", "rescaled_magnitude", "random", "mvue"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 32), lambda: nn.Conv2d(8, 32, 3, groups=2)])
def test_beta_0_is_plain_pruning_and_beta_1_is_dense_bit_for_bit(method: str, make) -> None:
    shape = (2, 8, 5, 5) if isinstance(make(), nn.Conv2d) else (6, 8)
    grad_output = torch.randn((2, 32, 3, 3) if len(shape) == 4 else (6, 32))
    grads = {}
    for name, config in {
        "dense": None,
        "plain": sdgp.SDGPConfig(prune=method, backend="dense"),
        "0": sdgp.SDGPConfig(prune=method, beta=0, backend="dense"),
        "half": sdgp.SDGPConfig(prune=method, beta=0.5, backend="dense"),
        "1": sdgp.SDGPConfig(prune=method, beta=1, backend="dense"),
    }.items():
        torch.manual_seed(1)
        module = make()
        if config is not None:
            sdgp.convert_(module, config)
        grads[name] = grad_input(module, grad_output, shape)
    assert same_bits(grads["0"], grads["plain"])
    assert same_bits(grads["1"], grads["dense"])
    assert not torch.equal(grads["plain"], grads["dense"])
    # The products are linear, so half way in the gradient is half way in grad_input.
    half = (grads["plain"] + grads["dense"]) / 2
    torch.testing.assert_close(grads["half"], half, rtol=1e-4, atol=1e-5)


def test_what_is_kept_keeps_its_bits_and_an_inf_stays_one_under_decay() -> None:
    from sdgp_cusparselt.backends.emulation import prune_features

    grad = torch.randn(4, 8).bfloat16()
    grad[0, 1], grad[1, 2], grad[2, 3] = torch.inf, -torch.inf, torch.nan
    kept, mixed = (
        sdgp.prune(grad),
        prune_features(grad, sdgp.SDGPConfig(prune="magnitude", beta=0.25)),
    )
    is_kept = kept != 0
    finite = is_kept & ~kept.isnan()
    assert same_bits(mixed[finite], kept[finite]) and mixed[2, 3].isnan()
    assert torch.equal(mixed[~is_kept], 0.25 * grad[~is_kept])


def test_decay_is_emulated_and_says_so() -> None:
    config = sdgp.SDGPConfig(prune="magnitude", beta=0.5)
    assert config.describe() == "magnitude 2:4 beta=0.5 (emulated)" and not config.on_hardware
    ramp = scheduled(ramp="geometric", decay="linear", warmup=0.1)
    assert "geometric ramp (emulated), linear mask decay (emulated)" in ramp.describe()
    assert "0.1 dense first" in ramp.describe()
    model = nn.Sequential(nn.Linear(8, 32))
    assert "mask decay (emulated)" in str(sdgp.convert_(model, ramp)).replace("\n", " ")
    assert "none" in repr(model[0]) and "at step 0" in repr(model[0])
    sdgp.load_schedule_state(model, {"step": 5})
    assert "16:32 beta=0.972 (emulated)" in repr(model[0])
    problem = Problem("grad_input", 64, 64, 64, torch.bfloat16, torch.device("cpu"), config)
    assert any("mask decay" in reason for reason in pattern_reasons(problem))
    assert any("mask decay" in r for r in pattern_reasons(problem)) and not pattern_reasons(
        dataclasses.replace(problem, product="grad_weight")
    ), "grad_weight has no decay"
    assert CusparseLtBackend().not_supported_reasons(problem)


def test_methods_switch_at_their_steps() -> None:
    config = scheduled(methods=((10, "mvue"), (0.5, "random"), (0.75, "none")))
    seen = [config.at(step).prune for step in range(TOTAL)]
    assert seen == ["magnitude"] * 10 + ["mvue"] * 10 + ["random"] * 10 + ["none"] * 10


def test_dense_phases_are_dense_in_grad_weight_too() -> None:
    schedule = sdgp.Schedule(warmup=2)
    config = sdgp.SDGPConfig(prune="magnitude", grad_weight="sparse", schedule=schedule)
    assert [config.at(step).grad_weight for step in range(3)] == ["dense", "dense", "sparse"]


steps_or_shares = st.integers(0, 10) | st.sampled_from([0.0, 0.1, 0.25])
schedules = st.builds(
    sdgp.Schedule,
    total_steps=st.integers(60, 200),
    warmup=steps_or_shares,
    tail=steps_or_shares,
    settle=steps_or_shares,
    ramp=st.sampled_from(["none", "stepwise", "geometric", "densify"]),
    decay=st.sampled_from(["none", "linear", "exponential"]),
    decay_rate=st.floats(1e-3, 1.0),
    decay_every=st.integers(1, 7),
    methods=st.sampled_from([(), ((5, "mvue"),), ((0.25, "random"), (0.5, "none"))]),
)


@settings(max_examples=60, deadline=None)
@given(schedules)
def test_text_carries_everything(schedule: sdgp.Schedule) -> None:
    config = sdgp.SDGPConfig(prune="magnitude", schedule=schedule)
    assert sdgp.SDGPConfig.from_text(config.text) == config
    assert sdgp.Schedule(**json.loads(json.dumps(schedule.as_dict()))) == schedule
    assert pickle.loads(pickle.dumps(config)) == config and hash(config) == hash(config.replace())
    for step in (0, 13, 59, 1000):
        now = config.at(step)
        assert sdgp.SDGPConfig.from_text(now.text) == now and 0 <= now.beta <= 1
        assert config.at(step) is now, "one object a stage"


@settings(max_examples=60, deadline=None)
@given(schedules, st.integers(0, 200))
def test_beta_only_falls_and_changes_when_it_may(schedule: sdgp.Schedule, step: int) -> None:
    config = sdgp.SDGPConfig(prune="magnitude", schedule=schedule)
    now, later = config.at(step), config.at(step + 1)
    if now.prune != "none" and later.prune != "none":
        assert later.beta <= now.beta


@pytest.mark.parametrize(
    "kwargs, error, words",
    [
        ({"total_steps": 0}, ValueError, "total_steps must be >= 1, got 0"),
        ({"total_steps": 1.5}, TypeError, "total_steps must be an int"),
        ({"warmup": 0.1}, ValueError, "warmup must be an int without total_steps"),
        ({"warmup": -1}, ValueError, "warmup must be >= 0, got -1"),
        ({"warmup": 1.0, "total_steps": 9}, ValueError, "warmup must be a fraction in 0..1"),
        ({"tail": 5}, ValueError, "total_steps must be known, got None with tail"),
        ({"ramp": "stepwise"}, ValueError, "total_steps must be known, got None with ramp"),
        ({"decay": "linear"}, ValueError, "total_steps must be known, got None with decay"),
        ({"ramp": "up"}, ValueError, "ramp must be one of none, stepwise, geometric, densify"),
        ({"decay": 3}, ValueError, "decay must be one of none, linear, exponential, got 3"),
        ({"decay": "exponential"}, ValueError, "decay_rate must be a number > 0, got None"),
        ({"decay_rate": -1.0}, ValueError, "decay_rate must be a number > 0, got -1.0"),
        ({"decay_rate": "1"}, TypeError, "decay_rate must be a number, got '1'"),
        ({"decay_every": 0}, ValueError, "decay_every must be >= 1, got 0"),
        ({"methods": ((3, "max"),)}, ValueError, "methods must be of methods in none, random"),
        ({"methods": ((3, "mvue"), (3, "none"))}, ValueError, "with increasing steps"),
        ({"methods": 3}, TypeError, "methods must be .step, method. pairs"),
        ({"total_steps": 9, "warmup": 5, "tail": 4}, ValueError, "tail and settle must be below"),
    ],
)
def test_bad_schedules(kwargs: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"Schedule: .*{words}"):
        sdgp.Schedule(**kwargs)


@pytest.mark.parametrize(
    "kwargs, error, words",
    [
        ({"schedule": {"warmup": 3}}, TypeError, "schedule must be a Schedule or None, got dict"),
        ({"schedule": sdgp.Schedule(total_steps=9, ramp="geometric"), "m": 8}, ValueError, "ramp"),
        ({"schedule": sdgp.Schedule(total_steps=9, ramp="stepwise"), "n": 3}, ValueError, "ramp"),
        (
            {"schedule": sdgp.Schedule(total_steps=9, ramp="stepwise"), "grad_weight": "sparse"},
            ValueError,
            'grad_weight must be "dense" while a ramp',
        ),
        (
            {"schedule": sdgp.Schedule(total_steps=9, decay="linear"), "beta": 0.5},
            ValueError,
            "beta must be 0 under a mask decay, got 0.5",
        ),
        ({"beta": 1.5}, ValueError, "beta must be in 0..1, got 1.5"),
        ({"beta": float("nan")}, ValueError, "beta must be in 0..1, got nan"),
        ({"beta": True}, TypeError, "beta must be a number, got True"),
    ],
)
def test_bad_configurations(kwargs: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sdgp.SDGPConfig(**kwargs)


def test_functions_take_no_schedule_and_steps_are_checked() -> None:
    config = scheduled()
    for function, shape in (
        (sdgp.functional.linear, (8, 8)),
        (sdgp.functional.conv2d, (8, 8, 1, 1)),
    ):
        with pytest.raises(ValueError, match="config must be one without a schedule"):
            function(torch.randn(shape), torch.randn(shape), config=config)
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        config.at(-1)
