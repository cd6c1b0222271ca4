"""Schedules: every step against formulas written out here, and through real layers."""

import copy
import dataclasses
import json
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.base import Problem
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend, pattern_reasons
from tests.helpers import assert_product, oracle_magnitude, same_bits

TOTAL = 40


def scheduled(
    prune: str = "magnitude", n: int = 2, m: int = 4, **kwargs: object
) -> sdgp.SDGPConfig:
    schedule = sdgp.Schedule(total_steps=TOTAL, **kwargs)
    return sdgp.SDGPConfig(prune=prune, n=n, m=m, backend="dense", schedule=schedule)


def oracle_stage(step: int, kwargs: dict, n: int, m: int) -> tuple[bool, int, int, float]:
    """Return (pruned, n, m, beta) by the definitions of Kao et al., from frame borders."""
    warmup, tail, settle = (kwargs.get(name, 0) for name in ("warmup", "tail", "settle"))
    if step < warmup or (tail and step >= TOTAL - tail):
        return False, n, m, 0.0
    ramps = {
        "stepwise": [(m - 1, m)] + [(m // 2**i, m) for i in range(1, 6) if m // 2**i >= n],
        "geometric": [(8 * n, 8 * m), (4 * n, 4 * m), (2 * n, 2 * m), (n, m)],
        "densify": [(n, 8 * m), (n, 4 * m), (n, 2 * m), (n, m)],
        "none": [(n, m)],
    }
    frames = ramps[kwargs.get("ramp", "none")]
    length, now = TOTAL - tail - settle - warmup, step - warmup
    # The last frame whose beginning, i / len(frames) of the way, has been reached.
    starts = [math.ceil(i * length / len(frames)) for i in range(len(frames))]
    pattern = next(frames[i] for i in reversed(range(len(frames))) if now >= starts[i])
    decay, rate = kwargs.get("decay"), kwargs.get("decay_rate")
    beta = 0.0
    if decay and now < length:
        beta = math.exp(-rate * now) if decay == "exponential" else 1 - (rate or 1 / length) * now
    return True, *pattern, max(0.0, beta)


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


def layer(config: sdgp.SDGPConfig) -> nn.Linear:
    torch.manual_seed(1)
    module = nn.Linear(8, 32)
    sdgp.convert_(module, config)
    return module


def grad_input(module: nn.Module, grad_output: Tensor, size: tuple[int, ...] = (6, 8)) -> Tensor:
    torch.manual_seed(2)
    input = torch.randn(size, requires_grad=True)
    module(input).backward(grad_output)
    assert input.grad is not None
    return input.grad


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
    from sdgp_cusparselt.backends.dense import prune_features

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


def test_step_with_counts_steps_that_are_taken() -> None:
    module = layer(scheduled(warmup=2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    handle = sdgp.step_with(optimizer, module)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    prunes = []
    for number in range(5):
        prunes.append(module.sdgp_config.prune)
        loss = module(torch.randn(6, 8)).sum() * (torch.inf if number == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert prunes == ["none", "none", "none", "magnitude", "magnitude"], "step 1 was skipped"
    assert sdgp.schedule_state(module) == {"step": 4}
    handle.remove()
    module(torch.randn(6, 8)).sum().backward()
    optimizer.step()
    assert sdgp.schedule_state(module) == {"step": 4}


def test_step_with_sees_through_the_wrappers_of_libraries() -> None:
    from accelerate import Accelerator
    from lightning.pytorch.core.optimizer import LightningOptimizer

    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    module = layer(scheduled(warmup=2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    model, prepared = accelerator.prepare(module, optimizer)
    sdgp.step_with(prepared, model)
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(6, 8)).sum())
            prepared.step()
            prepared.zero_grad()
    assert sdgp.schedule_state(module) == {"step": 2}, "two steps of two micro batches each"
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got str"):
        sdgp.step_with("adam", module)
    other = layer(scheduled())
    sdgp.step_with(LightningOptimizer(torch.optim.SGD(other.parameters(), lr=0.1)), other)


def test_wide_decay_steps_keep_compiled_code_within_its_limit() -> None:
    torch._dynamo.reset()
    module = layer(scheduled(decay="linear", decay_every=10))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for _ in range(TOTAL + 2):
        grad_input(compiled, torch.randn(6, 32))
        sdgp.step(compiled)
    assert counter.frame_count == 5, "beta = 1, 0.75, 0.5, 0.25, 0"


@pytest.mark.gpu
def test_phases_on_a_gpu_run_densely_emulated_and_on_sparse_tensor_cores() -> None:
    schedule = sdgp.Schedule(total_steps=8, warmup=2, settle=4, ramp="stepwise")
    torch.manual_seed(1)
    module = nn.Linear(512, 512, bias=False, device="cuda", dtype=torch.bfloat16)
    config = sdgp.SDGPConfig(
        prune="magnitude",
        backend="cusparselt",
        tune="never",
        on_unsupported="dense",
        schedule=schedule,
    )
    sdgp.convert_(module, config)
    calls = []
    for _ in range(6):
        x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad_output = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sdgp.SDGPFallbackWarning)
            module(x).backward(grad_output)
        now = module.sdgp_config
        pruned = sdgp.prune(grad_output, n=now.n, m=now.m) if now.prunes else grad_output
        assert_product(x.grad.cpu(), pruned.cpu(), module.weight.detach().cpu())
        calls.append(dict(module.sdgp_record.calls))
        sdgp.step(module)
    dense, sparse = ("grad_input", "dense"), ("grad_input", "cusparselt")
    assert calls[1] == {} and calls[2] == {dense: 1}, "plain, then 3:4 is emulated"
    assert calls[5] == {dense: 1, sparse: 3}


def test_a_resumed_run_prunes_as_the_unbroken_one() -> None:
    def run(module: nn.Module, steps: int) -> list[str]:
        seen = []
        for _ in range(steps):
            seen.append(module.sdgp_config.describe())
            sdgp.step(module)
        return seen

    config = scheduled(ramp="geometric", warmup=4, tail=4)
    unbroken = run(layer(config), TOTAL)
    first = layer(config)
    seen = run(first, 17)
    saved = json.loads(json.dumps(sdgp.schedule_state(first)))
    assert set(first.state_dict()) == {"weight", "bias"}
    second = layer(config)
    sdgp.load_schedule_state(second, saved)
    assert seen + run(second, TOTAL - 17) == unbroken
    assert copy.deepcopy(second).sdgp_step == TOTAL


def test_state_errors_change_nothing() -> None:
    module = layer(scheduled(warmup=2))
    for bad in (3, {}, {"step": 1, "more": 2}, {"step": 1.0}):
        with pytest.raises(TypeError, match="load_schedule_state: state"):
            sdgp.load_schedule_state(module, bad)
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        sdgp.load_schedule_state(module, {"step": -1})
    assert sdgp.schedule_state(module) == {"step": 0}
    for function in (sdgp.step, sdgp.schedule_state):
        with pytest.raises(ValueError, match="model must be converted"):
            function(nn.Linear(4, 4))
        with pytest.raises(TypeError, match="model must be an nn.Module, got int"):
            function(3)
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got SDGP"):
        sdgp.step_with(module, module)
    model = nn.Sequential(module, layer(scheduled()))
    sdgp.step(module)
    with pytest.raises(ValueError, match=r"count the same steps, got \[0, 1\]"):
        sdgp.step(model)


def test_each_phase_is_compiled_once() -> None:
    torch._dynamo.reset()
    module = layer(scheduled(warmup=3, tail=3, ramp="stepwise"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    counts = []
    for step in range(TOTAL):
        grad_output = torch.randn(6, 32)
        pruned, n, m, _ = oracle_stage(step, {"warmup": 3, "tail": 3, "ramp": "stepwise"}, 2, 4)
        kept = oracle_magnitude(grad_output, n, m, 1) if pruned else grad_output
        result = grad_input(compiled, grad_output)
        torch.testing.assert_close(result, kept @ module.weight.detach())
        counts.append(counter.frame_count)
        sdgp.step(compiled)
    changes = [i for i in range(1, TOTAL) if counts[i] != counts[i - 1]]
    assert changes == [3, 20] and counts[-1] == 3, "dense, 3:4, 2:4; the dense tail is known"


def test_patterns_give_each_layer_its_own() -> None:
    model = nn.ModuleDict(
        {name: nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)) for name in ("attn", "mlp", "out")}
    )
    two, one = sdgp.SDGPConfig(prune="magnitude"), sdgp.SDGPConfig(prune="magnitude", n=1)
    report = sdgp.convert_(model, {"mlp.1": None, "mlp.*": one, "attn.*": two})
    assert report.configs == {"attn.0": two, "attn.1": two, "mlp.0": one}
    assert report.converted == list(report.configs) and report.config is None
    assert report.skipped["mlp.1"] == report.skipped["out.0"] == "left dense by its name"
    assert "magnitude 1:4" in str(report)
    assert type(model["mlp"][1]) is nn.Linear and model["mlp"][0].sdgp_config is one


@pytest.mark.parametrize(
    "configs, words",
    [
        ({"a*": None}, "matched none of"),
        (
            {
                "0": sdgp.SDGPConfig(prune="magnitude"),
                "block.*": sdgp.SDGPConfig(prune="magnitude"),
            },
            "each match a layer, got 'block",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_raises(configs: dict, words: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with pytest.raises(ValueError, match=words):
        sdgp.convert_(model, configs)
    assert type(model[0]) is nn.Linear
