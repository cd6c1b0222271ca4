"""Recipes in checkpoints, copies, compiled code and conversions; what a wrong call says."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.errors import SDGPScheduleWarning
from sdgp_cusparselt.weights import (
    FST,
    SRSTE,
    MaskDecay,
    OneShot,
    SLoPe,
    WeightRecipe,
    nm_mask,
    set_masks_,
    sparsify_,
)
from sdgp_cusparselt.weights.recipes import RECIPES, recipe_from
from tests.weights.test_recipes import CASES, DENSE

STEPS = 12


class Net(nn.Module):
    """A convolution, two linear layers and a head, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.Linear(64, 32)
        self.down = nn.Linear(32, 32)
        self.head = nn.Linear(32, 8)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.conv(x)).flatten(1)
        return self.head(torch.relu(self.down(torch.relu(self.up(hidden)))))


RESUMED = CASES | {
    "slope with adapters": (
        SLoPe(rank=3, adapter_share=0.5, schedule=sdgp.Schedule(total_steps=STEPS)),
        None,
    ),
    "fst with mvue": (
        FST(decay=0.02, refresh_every=3, schedule=sdgp.Schedule(total_steps=STEPS, tail=2)),
        None,
    ),
}


def started(recipe: WeightRecipe) -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    sparsify_(model, recipe, config=DENSE)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(100 + step)
        x, target = torch.randn(8, 16, 2, 2).double(), torch.randn(8, 8).double()
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        sdgp.step(model)


@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("at", [4, 9])
def test_a_resumed_run_ends_as_the_unbroken_one_bit_for_bit(case: str, at: int) -> None:
    recipe = RESUMED[case][0]
    unbroken, optimizer = started(recipe)
    train(unbroken, optimizer, 0, STEPS)
    first, optimizer = started(recipe)
    train(first, optimizer, 0, at)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second, optimizer = started(recipe)
    second.load_state_dict(saved[0], strict=True)
    optimizer.load_state_dict(saved[1])
    assert sdgp.schedule_state(second) == {"step": at}
    train(second, optimizer, at, STEPS)
    assert list(second.state_dict()) == list(unbroken.state_dict())
    for key, value in unbroken.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


def test_what_a_recipe_adds_to_a_state_dict_leaves_with_it() -> None:
    plain = Net()
    model, _ = started(RESUMED["slope with adapters"][0])
    report_keys = [key for key in model.state_dict() if key not in plain.state_dict()]
    assert report_keys == [
        "conv.weight_mask",
        "conv.sdgp_recipe._extra_state",
        "up.weight_mask",
        "up.sdgp_recipe.down",
        "up.sdgp_recipe.up",
        "up.sdgp_recipe._extra_state",
        "down.weight_mask",
        "down.sdgp_recipe.down",
        "down.sdgp_recipe.up",
        "down.sdgp_recipe._extra_state",
    ]
    sdgp.revert_(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in model.modules()] == [type(m) for m in plain.modules()]
    assert not [hook for m in model.modules() for hook in m._forward_hooks]


@pytest.mark.parametrize("way", ["torch.save", "safetensors", "distributed"])
def test_checkpoints_of_every_format_carry_masks_and_step(way: str, tmp_path: Path) -> None:
    recipe = RESUMED["one-shot"][0]
    (model, optimizer), (other, _) = started(recipe), started(recipe)
    train(model, optimizer, 0, 7)
    if way == "torch.save":
        torch.save(model.state_dict(), tmp_path / "model.pt")
        other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    elif way == "safetensors":
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    else:
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=tmp_path)
        loaded = {"model": get_model_state_dict(other)}
        dcp.load(loaded, checkpoint_id=tmp_path)
        set_model_state_dict(other, loaded["model"])
    assert sdgp.schedule_state(other) == {"step": 7}
    assert torch.equal(other.up.weight_mask, model.up.weight_mask)
    assert not other.up.weight_mask.all()
    x = torch.randn(2, 16, 2, 2).double()
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_train_on_by_themselves(twin_of: Any) -> None:
    """The decay of a copy's gradient is its own, and not forgotten."""
    model, optimizer = started(SRSTE(decay=0.3))
    twin = twin_of(model)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, optimizer, 0, 4)
    train(twin, other, 0, 4)
    for one, same in zip(model.parameters(), twin.parameters(), strict=True):
        assert one is not same and torch.equal(one, same)
    assert twin.up.sdgp_recipe.layer is twin.up


def test_another_recipe_than_the_checkpoints_is_reported() -> None:
    model, optimizer = started(SRSTE())
    train(model, optimizer, 0, 2)
    other, _ = started(FST())
    with pytest.warns(SDGPScheduleWarning, match=r"another recipe \(sr-ste 2:4\)"):
        other.load_state_dict(model.state_dict())
    broken = model.state_dict() | {"up.sdgp_recipe._extra_state": torch.zeros(8).byte()}
    with pytest.raises((ValueError, RuntimeError), match="step and recipe as JSON in uint8"):
        model.load_state_dict(broken)


def test_recipes_survive_json() -> None:
    assert set(RECIPES) == {
        *("one-shot", "mishra", "unstructured", "sr-ste", "kao-mask", "kao-structure"),
        *("slope", "fst"),
    }
    for recipe, _ in RESUMED.values():
        saved = recipe.as_dict()
        assert json.loads(json.dumps(saved)) == saved and recipe_from(saved) == recipe
        assert recipe.describe().startswith(recipe.name)


def test_compiled_code_follows_masks_and_phases() -> None:
    """Masks change in place: only a change of phase compiles anew."""
    recipe = MaskDecay(
        schedule=sdgp.Schedule(total_steps=10, warmup=2, settle=6, decay="linear", decay_every=2)
    )
    model, _ = started(recipe)
    plain = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, plain)]
    for first in range(0, 9, 3):
        train(compiled, optimizers[0], first, first + 3)
        train(plain, optimizers[1], first, first + 3)
    for one, same in zip(model.parameters(), plain.parameters(), strict=True):
        # Compiled and eager code add up the same products; float64 leaves only the last digits.
        assert torch.allclose(one, same, rtol=1e-9, atol=1e-11)
    # Dense, beta = 1, and the mask alone: three phases, one graph each.
    assert counter.frame_count == 3


def test_a_recipe_joins_a_pruned_gradient() -> None:
    model = Net()
    sdgp.convert_(model, sdgp.SDGPConfig(prune="magnitude", backend="dense"))
    before = model.up.sdgp_record
    report = sparsify_(model, SRSTE())
    assert report.converted == ["conv", "up", "down"]
    assert report.skipped == {"head": "makes the model's outputs; include_heads=True takes it"}
    assert model.up.sdgp_record is before and model.up.sdgp_config.prunes
    layer = model.down
    x = torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
    grad_output = torch.randn(4, 32, dtype=torch.float64)
    (grad_input,) = torch.autograd.grad(layer(x), x, grad_output)
    masked = layer.weight * layer.weight_mask
    assert torch.allclose(grad_input, sdgp.prune(grad_output) @ masked, rtol=1e-11, atol=1e-13)
    with pytest.raises(ValueError, match="prune must be"):
        sparsify_(sdgp_converted(), FST())


def sdgp_converted() -> Net:
    model = Net()
    sdgp.convert_(model, sdgp.SDGPConfig(prune="mvue", backend="dense"))
    return model


def test_layers_that_do_not_fit_are_reported_and_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(8, 8), nn.GRU(8, 8))
    report = sparsify_(model, FST(), config=DENSE)
    assert report.converted == ["2"]
    assert report.skipped == {
        "0": "its 6 in_features are no multiple of 4",
        "1": "its 6 out_features are no multiple of 4",
        "3": "GRU has no pruned backward here",
    }
    assert type(model[0]) is nn.Linear and "weight_mask" not in model[0]._buffers
    with pytest.raises(ValueError, match="must be one that fits a layer"):
        sparsify_(nn.Linear(6, 6), SRSTE())
    with pytest.raises(ValueError, match="must be without a recipe"):
        sparsify_(model, SRSTE())
    with pytest.raises(TypeError, match="recipe must be a WeightRecipe"):
        sparsify_(model, SRSTE)  # type: ignore[arg-type]
    chosen = sparsify_(Net(), SRSTE(), lambda module, name: name == "head", config=DENSE)
    assert chosen.converted == ["head"]


def test_masks_and_scores_of_ones_own() -> None:
    model, _ = started(OneShot())
    scores = torch.randn(32, 64)
    mask = nm_mask(torch.randn(32, 32), 2, 4)
    dense = model.down.weight.detach().clone()
    set_masks_(model, {"up": scores, "down": mask})
    assert torch.equal(model.up.weight_mask, nm_mask(scores, 2, 4))
    assert torch.equal(model.down.weight_mask, mask)
    assert torch.equal(model.down.weight != 0, mask & (dense != 0))
    before = model.down.weight_mask.clone()
    with pytest.raises(ValueError, match="2:4 along dimension 1"):
        set_masks_(model, {"down": torch.ones(32, 32, dtype=torch.bool)})
    with pytest.raises(ValueError, match="of the shape"):
        set_masks_(model, {"down": mask[:16]})
    with pytest.raises(ValueError, match="a layer with a recipe, got 'head'"):
        set_masks_(model, {"head": mask})
    assert torch.equal(model.down.weight_mask, before)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SRSTE(n=5), "n must be in 1..m"),
        (lambda: SRSTE(decay=-1.0), "decay must be >= 0"),
        (lambda: SRSTE(refresh_every=0), "refresh_every must be >= 1"),
        (lambda: FST(n=1), "n:m must be 2:4"),
        (lambda: SLoPe(), "schedule.total_steps must be known"),
        (lambda: MaskDecay(), "schedule.decay must be set"),
        (lambda: SRSTE(schedule=sdgp.Schedule(methods=((1, "mvue"),))), "schedule.methods"),
        (lambda: OneShot(schedule=sdgp.Schedule(total_steps=9, tail=2)), "schedule.tail"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
    with pytest.raises(TypeError, match="schedule must be a Schedule"):
        SRSTE(schedule=3)  # type: ignore[arg-type]
