"""State dicts and optimizer state of converted models; converting compiled ones."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import sdgp_cusparselt as sdgp


class Net(nn.Module):
    """A convolution between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 64)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.last = nn.Linear(128, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(self.first(x).view(-1, 4, 4, 4)).flatten(1))


def converted(config: sdgp.SDGPConfig) -> Net:
    torch.manual_seed(0)
    model = Net()
    sdgp.convert_(model, config, filter_fn=lambda module, name: True)
    return model


def test_state_dicts_move_both_ways() -> None:
    torch.manual_seed(1)
    plain = Net()
    model = converted(sdgp.SDGPConfig(prune="rescaled_magnitude", backend="dense"))
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(3, 16)
    assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        model.first.weight.add_(1)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(x), plain(x))


SCHEDULED = sdgp.SDGPConfig(backend="dense", schedule=sdgp.Schedule(total_steps=9, warmup=2))


def test_a_schedule_is_in_the_state_dict_and_leaves_with_it() -> None:
    plain, model = Net(), converted(SCHEDULED)
    extra = [key for key in model.state_dict() if key not in plain.state_dict()]
    assert extra == [f"{name}.sdgp_schedule._extra_state" for name in ("first", "conv", "last")]
    for _ in range(5):
        sdgp.step(model)
    saved = model.state_dict()
    # The plain model's own checkpoint has no step, and changes none.
    model.load_state_dict(plain.state_dict(), strict=True)
    assert sdgp.schedule_state(model) == {"step": 5}
    for twin in (converted(SCHEDULED), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        sdgp.load_schedule_state(twin, {"step": 0})
        assert twin.first.sdgp_config.prune == "none"
        twin.load_state_dict(saved, strict=True)
        assert sdgp.schedule_state(twin) == {"step": 5} and twin.first.sdgp_config.prune == "mvue"
    assert sdgp.schedule_state(model) == {"step": 5}
    sdgp.revert_(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in model.modules()] == [type(m) for m in plain.modules()]


def test_layers_without_a_schedule_follow_those_with_one() -> None:
    def mixed() -> Net:
        model = Net()
        sdgp.convert_(model, {"first": SCHEDULED, "*": SCHEDULED.replace(schedule=None)})
        return model

    model = mixed()
    for _ in range(3):
        sdgp.step(model)
    other = mixed()
    other.load_state_dict(model.state_dict())
    assert sdgp.schedule_state(other) == {"step": 3} and sdgp.step(other) == 4
    assert [m.sdgp_step for m in (other.first, other.conv, other.last)] == [4, 4, 4]


@pytest.mark.parametrize("way", ["torch.save", "safetensors", "distributed"])
def test_checkpoints_of_every_format_carry_the_step(way: str, tmp_path: Path) -> None:
    model, other = converted(SCHEDULED), converted(SCHEDULED)
    for _ in range(7):
        sdgp.step(model)
    if way == "torch.save":
        torch.save(model.state_dict(), tmp_path / "model.pt")
        other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    elif way == "safetensors":
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    else:
        # Compiled on one side only: the wrapper's prefix is not part of what is saved.
        state = {"model": get_model_state_dict(torch.compile(model))}
        dcp.save(state, checkpoint_id=tmp_path)
        loaded = {"model": get_model_state_dict(other)}
        dcp.load(loaded, checkpoint_id=tmp_path)
        set_model_state_dict(other, loaded["model"])
    assert sdgp.schedule_state(other) == {"step": 7}
    assert torch.equal(other.first.weight, model.first.weight)


def test_a_sharded_run_resumed_from_a_distributed_checkpoint_ends_as_the_unbroken_one(
    tmp_path: Path,
) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))

        def start() -> tuple[nn.Module, torch.optim.Optimizer]:
            model: nn.Module = converted(SCHEDULED)
            fully_shard(model, mesh=mesh)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            sdgp.step_with(optimizer, model)
            return model, optimizer

        def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
            for step in steps:
                torch.manual_seed(step)
                model(torch.randn(6, 16)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

        unbroken, resumed = start(), start()
        train(*unbroken, range(5))
        dcp.save(dict(zip("mo", get_state_dict(*unbroken), strict=True)), checkpoint_id=tmp_path)
        train(*unbroken, range(5, 9))
        # What is loaded into also makes the new optimizer take a step of nothing.
        state = dict(zip("mo", get_state_dict(*resumed), strict=True))
        dcp.load(state, checkpoint_id=tmp_path)
        set_state_dict(*resumed, model_state_dict=state["m"], optim_state_dict=state["o"])
        assert sdgp.schedule_state(resumed[0]) == {"step": 5}
        train(*resumed, range(5, 9))
        pairs = zip(unbroken[0].parameters(), resumed[0].parameters(), strict=True)
        assert all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in pairs)
        assert sdgp.schedule_state(resumed[0]) == {"step": 9}
    finally:
        dist.destroy_process_group()


def test_compiled_models_without_a_schedule_load_distributed_checkpoints() -> None:
    config = sdgp.SDGPConfig(backend="dense")
    compiled = torch.compile(converted(config))
    set_model_state_dict(compiled, get_model_state_dict(converted(config)))


def test_another_schedule_is_announced_and_a_broken_state_refused() -> None:
    model = converted(SCHEDULED)
    longer = SCHEDULED.replace(schedule=sdgp.Schedule(total_steps=30, warmup=3))
    with pytest.warns(sdgp.SDGPScheduleWarning, match=r"another schedule \(2 dense first\)"):
        converted(longer).load_state_dict(model.state_dict())
    state = model.state_dict()
    for bad in (torch.zeros(8, dtype=torch.uint8), {"step": 3}, torch.tensor(3)):
        with pytest.raises(ValueError, match="sdgp_schedule must be step and schedule as JSON"):
            model.load_state_dict(state | {"first.sdgp_schedule._extra_state": bad})


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adagrad], ids=str)
def test_optimizer_state_survives_convert_and_revert(make) -> None:
    """A run that converts and reverts with pruning off is the run that never did."""

    def run(convert: bool) -> dict[str, Tensor]:
        torch.manual_seed(2)
        model = Net()
        optimizer = make(model.parameters(), lr=0.01)
        for number in range(6):
            if convert and number == 2:
                sdgp.convert_(model, sdgp.SDGPConfig(prune="none"), lambda *_: True)
            if convert and number == 4:
                assert sdgp.revert_(model) == ["first", "conv", "last"]
            model(torch.randn(6, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        states = [optimizer.state[p] for p in model.parameters()]
        assert all(int(state["step"]) == 6 for state in states)
        return {f"{i} {k}": v for i, state in enumerate(states) for k, v in state.items()} | dict(
            model.named_parameters()
        )

    plain, switched = run(False), run(True)
    for name, tensor in plain.items():
        assert torch.equal(tensor, switched[name]), name


def test_a_compiled_model_is_converted_and_reverted_inside_its_wrapper() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    grad_output = torch.randn(8, 16)

    def grad(module: nn.Module) -> Tensor:
        torch.manual_seed(1)
        x = torch.randn(8, 16, requires_grad=True)
        module(x).backward(grad_output)
        assert x.grad is not None
        return x.grad

    dense = grad(compiled)
    assert sdgp.convert_(
        compiled, sdgp.SDGPConfig(prune="magnitude", backend="dense")
    ).converted == ["0", "2"]
    pruned = grad(compiled)
    assert counter.frame_count == 2
    assert not torch.allclose(pruned, dense)
    torch.testing.assert_close(pruned, grad(model))
    assert sdgp.revert_(compiled) == ["0", "2"]
    torch.testing.assert_close(grad(compiled), dense)
    assert counter.frame_count == 2, "the dense code is still there"
