"""step and step_with: when they count, what is saved, and what is compiled and run."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.layers.schedule_state import PATIENCE
from tests.helpers import assert_product, oracle_magnitude
from tests.loops.schedules import TOTAL, grad_input, layer, oracle_stage, scheduled


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


def test_a_model_is_driven_once() -> None:
    module = layer(scheduled(warmup=2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    handle = sdgp.step_with(optimizer, module)
    for again in (
        lambda: sdgp.step_with(optimizer, module),
        lambda: sdgp.step_with(torch.optim.SGD(module.parameters()), nn.Sequential(module)),
        lambda: sdgp.step(module),
    ):
        with pytest.raises(ValueError, match=r"step_with drives already\. Count in one place"):
            again()
    assert sdgp.schedule_state(module) == {"step": 0}
    handle.remove()
    assert sdgp.step(module) == 1
    # An optimizer that is gone drives nothing, as when a notebook's cell is run again.
    sdgp.step_with(torch.optim.SGD(module.parameters()), module)
    sdgp.step_with(optimizer, module)
    optimizer.step()
    assert sdgp.schedule_state(module) == {"step": 2}
    twin = copy.deepcopy(module)
    assert sdgp.step(twin) == 3, "the copy is nobody's yet"


def test_a_schedule_that_does_not_move_is_reported_once() -> None:
    module = nn.Sequential(layer(scheduled(warmup=2)), nn.ReLU(), layer(scheduled(warmup=3)))
    other = layer(scheduled(warmup=2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def train(steps: int, after: object = None) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(steps):
                optimizer.step()
                if after is not None:
                    after()
        return [str(warning.message) for warning in caught]

    assert train(PATIENCE - 1) == []
    (message,) = train(1)
    assert "10 optimizer steps passed and the schedule of 2 layers still stands" in message
    assert "Call sdgp.step(model) after each optimizer.step()" in message
    assert train(3 * PATIENCE) == [], "said once"
    del optimizer
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    assert train(3 * PATIENCE, lambda: sdgp.step(other)) == []
    plain = layer(sdgp.SDGPConfig(prune="magnitude", backend="dense"))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    assert train(3 * PATIENCE) == [], "nothing to move"


@pytest.mark.gpu
def test_phases_on_a_gpu_run_densely_emulated_and_on_sparse_tensor_cores() -> None:
    schedule = sdgp.Schedule(total_steps=8, warmup=2, settle=4, ramp="stepwise")
    torch.manual_seed(1)
    module = nn.Linear(512, 512, bias=False, device="cuda", dtype=torch.bfloat16)
    config = sdgp.SDGPConfig(
        prune="magnitude",
        backend="cusparselt",
        tune="never",
        on_unsupported="plain",
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
    dense, sparse = ("grad_input", "emulated"), ("grad_input", "sparse")
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
