"""gradient_quality: bias, added variance and the steps that they predict."""

import math

import pytest
import torch
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.telemetry.quality import (
    GradientQuality,
    gradient_quality,
    group_of,
    group_variants,
    preset_variants,
    recommend,
)

NUM_BATCHES = 64


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("up", nn.Linear(16, 32))
    model.add_module("act", nn.ReLU())
    model.add_module("down", nn.Linear(32, 16))
    return model


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 16) for _ in range(NUM_BATCHES)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch).square().mean()


def config(method: str, **choices: object) -> sdgp.SDGPConfig:
    return sdgp.SDGPConfig(prune=method, backend="dense", **choices)


def only_down(method: str) -> dict[str, object]:
    return {method: lambda m: sdgp.convert_(m, config(method), lambda _, name: name == "down")}


def test_rho_is_the_variance_that_two_independent_formulas_give() -> None:
    """The error of up's gradient, recomputed batch by batch from the definition."""
    torch.manual_seed(2)
    (found,) = gradient_quality(mlp(), batches(), loss, only_down("magnitude"))
    errors, exact = [], []
    for batch in batches():
        plain, pruned = mlp(), mlp()
        sdgp.convert_(pruned, config("magnitude"), lambda _, name: name == "down")
        for model in (plain, pruned):
            loss(model, batch).backward()
        exact.append(torch.cat([p.weight.grad.flatten() for p in (plain.up, plain.down)]))
        ours = torch.cat([p.weight.grad.flatten() for p in (pruned.up, pruned.down)])
        errors.append(ours - exact[-1])
    error, dense = torch.stack(errors).double(), torch.stack(exact).double()
    rho = float(error.var(0).sum() / dense.var(0).sum())
    assert found.rho == pytest.approx(rho, rel=1e-5)
    assert found.steps_ratio == 1 + found.rho
    squared_bias = float(error.mean(0).square().sum() - error.var(0).sum() / NUM_BATCHES)
    energy = float(dense.mean(0).square().sum() - dense.var(0).sum() / NUM_BATCHES)
    assert found.bias == pytest.approx(math.sqrt(squared_bias / energy), rel=1e-4)
    assert found.critical_batches == pytest.approx(float(dense.var(0).sum()) / energy, rel=1e-4)
    assert found.signal == pytest.approx((energy / float(error.var(0).sum())) ** 0.5, rel=1e-4)
    assert found.layers["down.weight"] == (0, 0), "its own gradient does not see its grad_input"


def test_larger_batches_divide_both_variances() -> None:
    sampling, added, energy = 12.0, 3.0, 2.0
    found = GradientQuality("x", added / sampling, 0.0, {}, 0.5, sampling / energy)
    for batches in (0.5, 1, 4, 100):
        noisy = energy + (sampling + added) / batches
        assert found.steps_ratio_at(batches) == pytest.approx(noisy / (energy + sampling / batches))
    assert found.signal == pytest.approx((energy / added) ** 0.5)
    unknown = GradientQuality("x", 0.25, 0.0, {}, 0.5)
    assert unknown.steps_ratio_at(4) == unknown.steps_ratio == 1.25 and unknown.signal == 0
    with pytest.raises(ValueError, match="batches must be > 0, got 0"):
        found.steps_ratio_at(0)


def test_mvue_has_no_bias_and_magnitude_has_one() -> None:
    torch.manual_seed(3)
    (mvue,) = gradient_quality(mlp(), batches(), loss, only_down("mvue"))
    (magnitude,) = gradient_quality(mlp(), batches(), loss, only_down("magnitude"))
    assert magnitude.bias > 3 * mvue.bias
    assert mvue.rho > magnitude.rho


def test_the_model_stays_as_it_is_and_presets_and_groups_are_variants() -> None:
    model = mlp()
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(4)
    found = gradient_quality(model, batches()[:4], loss, preset_variants(config("mvue")))
    assert [q.name for q in found] == ["all", "readers", "balanced"]
    # Two layers of one size: both grad_inputs; one; one and both grad_weights; of four products.
    assert [q.flop_share for q in found] == [0.5, 0.25, 0.75]
    assert all(type(m) in (nn.Linear, nn.ReLU) for m in model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert list(group_variants(model, config("mvue"))) == ["up", "down"]
    with pytest.raises(ValueError, match="at least 2 batches, got 1"):
        gradient_quality(model, batches()[:1], loss, preset_variants(config("mvue")))


def test_groups_are_named_by_what_differs() -> None:
    assert group_of("blocks.3.up") == group_of("blocks.11.up") == "blocks.*.up"
    assert group_of("h.0.mlp.fc1") == "h.*.mlp.fc1"


def test_the_recommendation_takes_the_cheapest_flops_within_the_budget() -> None:
    def quality(name: str, rho: float, share: float) -> GradientQuality:
        return GradientQuality(name, rho, 0.0, {}, share)

    groups = [quality("a", 0.02, 0.1), quality("b", 0.01, 0.2), quality("c", 0.03, 0.2)]
    assert [q.name for q in recommend(groups, 1.045)] == ["b", "c"]
    assert [q.name for q in recommend(groups, 1.01)] == ["b"]
    assert recommend(groups, 1.0) == []
    with pytest.raises(ValueError, match="budget must be >= 1"):
        recommend(groups, 0.9)
