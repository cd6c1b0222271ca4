"""Recipes against formulas written out: which mask, beta, pattern and gradient at each step."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.weights import (
    FST,
    SRSTE,
    MaskDecay,
    Mishra,
    OneShot,
    SLoPe,
    StructureDecay,
    Unstructured,
    WeightRecipe,
    finish_,
    mask_gradients_,
    sparsify_,
)
from tests.helpers import kept_of_line
from tests.weights.test_masks import every_pattern

STEPS = 12
DENSE = sdgp.SDGPConfig(prune="none", backend="dense", on_unsupported="emulate")


def largest(weight: Tensor, n: int, m: int, dim: int = 1) -> Tensor:
    moved = weight.movedim(dim, -1)
    kept = torch.tensor([kept_of_line(line, n, m) for line in moved.tolist()])
    return kept.movedim(-1, dim)


def both_ways(weight: Tensor) -> Tensor:
    rows, cols = weight.shape
    tiles = weight.abs().view(rows // 4, 4, cols // 4, 4).transpose(1, 2).reshape(-1, 16)
    every = every_pattern().flatten(1)
    best = every[(tiles @ every.t().to(tiles.dtype)).argmax(1)].bool()
    return best.view(rows // 4, cols // 4, 4, 4).transpose(1, 2).reshape(rows, cols)


# What each recipe means, step by step, in words of its paper: (step, weight, mask before) ->
# mask now, beta, decay, whether the gradient is masked.
Meaning = Callable[[int, Tensor, Tensor], tuple[Tensor | None, float, float, bool]]


def one_shot(at: int) -> Meaning:
    def meaning(step: int, weight: Tensor, mask: Tensor) -> Any:
        if step < at:
            return None, 0.0, 0.0, False
        return (largest(weight, 2, 4) if step == at else mask), 0.0, 0.0, True

    return meaning


def sr_ste(step: int, weight: Tensor, mask: Tensor) -> Any:
    return largest(weight, 2, 4), 0.0, 0.01, False


def mask_linear(step: int, weight: Tensor, mask: Tensor) -> Any:
    # Dense for 2 steps, then over 12 - 2 - 3 = 7 steps from 1 to 0, then 3 steps of the mask alone.
    if step < 2:
        return None, 0.0, 0.0, False
    return largest(weight, 2, 4), max(0.0, 1 - (step - 2) / 7), 0.0, False


def mask_exponential(step: int, weight: Tensor, mask: Tensor) -> Any:
    beta = math.exp(-0.4 * step) if step < 9 else 0.0
    return largest(weight, 2, 4), beta, 0.0, False


def stepwise(step: int, weight: Tensor, mask: Tensor) -> Any:
    # 15:16, 8:16, 4:16, 2:16, 1:16 over 10 steps, then 1:16 for the last two.
    n = (15, 8, 4, 2, 1)[min(step, 9) // 2]
    return largest(weight, n, 16), 0.0, 0.0, False


def geometric(step: int, weight: Tensor, mask: Tensor) -> Any:
    width = (8, 4, 2, 1)[min(step, 11) // 3]
    return largest(weight, 2 * width, 4 * width), 0.0, 0.0, False


def static(step: int, weight: Tensor, mask: Tensor) -> Any:
    return (largest(weight, 2, 4) if step == 0 else mask), 0.0, 0.0, True


def fst(step: int, weight: Tensor, mask: Tensor) -> Any:
    if step < 1 or step >= 10:  # a dense step first, two at the end
        return None, 0.0, 0.0, False
    return (both_ways(weight) if (step - 1) % 3 == 0 else mask), 0.0, 0.02, False


def unstructured(step: int, weight: Tensor, mask: Tensor) -> Any:
    if step < 4:
        return None, 0.0, 0.0, False
    if step == 4:
        threshold = weight.abs().flatten().sort().values[-weight.numel() // 4]
        mask = weight.abs() >= threshold
    return mask, 0.0, 0.0, True


SCHEDULE = sdgp.Schedule
CASES: dict[str, tuple[WeightRecipe, Meaning]] = {
    "one-shot": (OneShot(schedule=SCHEDULE(warmup=5)), one_shot(5)),
    "mishra": (Mishra(schedule=SCHEDULE(total_steps=12, warmup=0.5)), one_shot(6)),
    "sr-ste": (SRSTE(decay=0.01), sr_ste),
    "kao mask linear": (
        MaskDecay(schedule=SCHEDULE(total_steps=12, warmup=2, settle=3, decay="linear")),
        mask_linear,
    ),
    "kao mask exponential": (
        MaskDecay(schedule=SCHEDULE(total_steps=12, settle=3, decay="exponential", decay_rate=0.4)),
        mask_exponential,
    ),
    "kao structure stepwise": (
        StructureDecay(n=1, m=16, schedule=SCHEDULE(total_steps=12, settle=2, ramp="stepwise")),
        stepwise,
    ),
    "kao structure geometric": (
        StructureDecay(schedule=SCHEDULE(total_steps=12, ramp="geometric")),
        geometric,
    ),
    "slope": (SLoPe(adapter_share=0.0, schedule=SCHEDULE(total_steps=12)), static),
    "fst": (
        FST(
            decay=0.02,
            refresh_every=3,
            mvue=False,
            schedule=SCHEDULE(total_steps=12, warmup=1, tail=2),
        ),
        fst,
    ),
    "unstructured": (Unstructured(sparsity=0.75, schedule=SCHEDULE(warmup=4)), unstructured),
}


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(STEPS, 24, 32).double(), torch.randn(STEPS, 24, 16).double()


def layer() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(32, 16, bias=False).double()


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_written_out_formula(case: str) -> None:
    """Momentum SGD on one layer; every weight, mask and beta after every step, in float64."""
    recipe, meaning = CASES[case]
    model = layer()
    reference, velocity = model.weight.detach().clone(), torch.zeros(16, 32).double()
    sparsify_(model, recipe, config=DENSE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    mask = torch.ones(16, 32, dtype=torch.bool)
    for step, (x, target) in enumerate(zip(*data(), strict=True)):
        now, beta, decay, masked_gradient = meaning(step, reference, mask)
        if now is not None:
            mask = now
            if masked_gradient:
                reference = reference * mask
            assert torch.equal(model.weight_mask, mask), step
            effective = torch.where(mask, reference, beta * reference)
        else:
            effective = reference
        error = x @ effective.t() - target
        gradient = 2 / error.numel() * error.t() @ x
        if masked_gradient:
            gradient = gradient * mask
        if now is not None:
            gradient = gradient + decay * torch.where(mask, 0.0, reference)
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert torch.allclose(loss, error.square().mean(), rtol=1e-12)
        optimizer.step()
        assert torch.allclose(model.weight.grad, gradient, rtol=1e-11, atol=1e-15), step
        sdgp.step(model)
        velocity = 0.9 * velocity + gradient
        reference = reference - 0.1 * velocity
        if masked_gradient:
            reference = reference * mask
        # A pruning that the last step of a phase brings about is part of the next step.
        compared = model.weight.detach()
        upcoming, *_, masks_next = meaning(step + 1, reference, mask)
        expected = reference * upcoming if masks_next and upcoming is not None else reference
        assert torch.allclose(compared, expected, rtol=1e-11, atol=1e-14), step


def test_mishra_repeats_the_first_learning_rates() -> None:
    recipe = Mishra(schedule=SCHEDULE(total_steps=20, warmup=10))
    assert [recipe.learning_rate_step(step) for step in range(20)] == [*range(10), *range(10)]
    for other in (OneShot(schedule=SCHEDULE(warmup=5)), SRSTE(), CASES["fst"][0]):
        assert [other.learning_rate_step(step) for step in range(20)] == list(range(20))
    unstructured = Unstructured(schedule=SCHEDULE(total_steps=8, warmup=4))
    assert unstructured.learning_rate_step(5) == 1


def test_slope_prunes_twice_for_the_backward_and_adds_adapters_at_the_end() -> None:
    model = nn.Sequential(layer(), nn.Linear(16, 32, bias=False).double())
    recipe = SLoPe(rank=4, adapter_share=0.25, schedule=SCHEDULE(total_steps=8))
    sparsify_(model, recipe, config=DENSE)
    with torch.no_grad():
        model[0].sdgp_recipe.up.normal_()
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    grad_output = torch.randn(5, 16, dtype=torch.float64)
    for step in range(8):
        weight = model[0].weight.detach()
        row = largest(weight, 2, 4)
        assert torch.equal(weight, weight * row), "what is not kept is zero"
        twice = weight * largest(weight, 2, 4, dim=0)
        down, up = (p.detach() for p in (model[0].sdgp_recipe.down, model[0].sdgp_recipe.up))
        assert down.shape == (4, 32) and up.shape == (16, 4)
        output = model[0](x)
        grad_input, grad_weight, grad_up, grad_down = torch.autograd.grad(
            output,
            (x, model[0].weight, model[0].sdgp_recipe.up, model[0].sdgp_recipe.down),
            grad_output,
        )
        adapted = step >= 6
        expected = x @ weight.t() + (x @ down.t() @ up.t() if adapted else 0.0)
        assert torch.allclose(output, expected, rtol=1e-12)
        through = grad_output @ up @ down if adapted else 0.0
        assert torch.allclose(grad_input, grad_output @ twice + through, rtol=1e-11, atol=1e-13)
        assert torch.allclose(grad_weight, grad_output.t() @ x, rtol=1e-11, atol=1e-13)
        # Until their time the adapters get zeros, and not nothing: DDP waits for them.
        by_up = grad_output.t() @ (x @ down.t()) if adapted else torch.zeros_like(up)
        assert torch.allclose(grad_up, by_up, rtol=1e-11, atol=1e-13)
        assert bool(grad_down.any()) == adapted
        sdgp.step(model)


def test_fst_uses_one_mask_for_both_products_and_mvue_for_the_third() -> None:
    model = layer()
    sparsify_(model, FST(schedule=SCHEDULE(total_steps=4, tail=1)), config=DENSE)
    assert (model.sdgp_config.grad_input, model.sdgp_config.grad_weight) == ("weight", "sparse")
    x = torch.randn(64, 32, dtype=torch.float64, requires_grad=True)
    grad_output = torch.randn(64, 16, dtype=torch.float64)
    masked = (model.weight * both_ways(model.weight.detach())).detach()
    grad_input, grad_weight = torch.autograd.grad(model(x), (x, model.weight), grad_output)
    assert torch.allclose(grad_input, grad_output @ masked, rtol=1e-11, atol=1e-13)
    exact = grad_output.t() @ x
    assert not torch.allclose(grad_weight, exact), "grad_output is pruned along tokens"
    # Unbiased: the mean over draws comes near the exact product.
    draws = [torch.autograd.grad(model(x), model.weight, grad_output)[0] for _ in range(400)]
    spread = torch.stack(draws).std(0) / 20
    assert ((torch.stack(draws).mean(0) - exact).abs() <= 5 * spread).all()
    for _ in range(3):
        sdgp.step(model)
    assert (model.sdgp_config.forward, model.sdgp_config.grad_weight) == ("dense", "dense")


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("scale", [None, 2.0**10])
@pytest.mark.parametrize("fused", [False, True])
def test_decay_counts_once_a_step(parts: int, scale: float | None, fused: bool) -> None:
    """The public code of others adds it in backward: once a part, and divided by the scaler."""
    model = layer().float()
    sparsify_(model, SRSTE(decay=0.5), config=DENSE)
    before, mask = model.weight.detach().clone(), model.weight_mask.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    x = torch.randint(-2, 3, (24, 32)).float()
    for part in x.chunk(parts):
        scaler.scale(model(part).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    gradient = x.sum(0).expand(16, -1) + 0.5 * torch.where(mask, 0.0, before)
    # Whole numbers times powers of two, but for the one product and sum of the decay.
    bound = 4 * torch.finfo(torch.float32).eps * (before.abs() + gradient.abs() + 1)
    assert ((model.weight - (before - gradient)).abs() <= bound).all()


def test_a_step_that_a_scaler_skips_changes_nothing() -> None:
    model = layer().float()
    sparsify_(model, SRSTE(decay=0.5), config=DENSE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sdgp.step_with(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model.weight.detach().clone()
    scaler.scale(model(torch.full((2, 32), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(model.weight, before) and model.sdgp_step == 0


def test_masked_gradients_do_not_count_in_a_norm_that_is_clipped() -> None:
    model = layer()
    sparsify_(model, OneShot(), config=DENSE)
    model(torch.randn(4, 32).double()).sum().backward()
    mask = model.weight_mask
    assert model.weight.grad[~mask].any()
    expected = model.weight.grad[mask].norm()
    mask_gradients_(model)
    assert torch.allclose(nn.utils.get_total_norm([model.weight.grad]), expected)


def test_masks_of_convolutions_and_conv1d_run_along_their_inputs() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="of transformers").Conv1D
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv2d(8, 16, 3), conv1d(16, 8)]).double()
    sparsify_(model, SRSTE(decay=0.0), config=DENSE)
    kernel, matrix = model[0].weight.detach(), model[1].weight.detach()
    for row in range(3):
        for col in range(3):
            expected = largest(kernel[:, :, row, col], 2, 4)
            assert torch.equal(model[0].weight_mask[:, :, row, col], expected)
    mask = largest(matrix, 2, 4, dim=0)
    assert torch.equal(model[1].weight_mask, mask)
    image, x = torch.randn(2, 8, 5, 5).double(), torch.randn(3, 8).double()
    masked = kernel * model[0].weight_mask
    assert torch.allclose(model[0](image), nn.functional.conv2d(image, masked, model[0].bias))
    assert torch.allclose(model[1](x), x @ (matrix * mask) + model[1].bias)


def test_finish_leaves_the_zeros_in_the_weights() -> None:
    model = layer()
    sparsify_(model, SRSTE(), config=DENSE)
    x = torch.randn(4, 32).double()
    masked = model(x)
    assert finish_(model) == [""]
    sdgp.revert_(model)
    assert type(model) is nn.Linear and torch.equal(model(x), masked)
    assert (model.weight.unflatten(1, (-1, 4)) != 0).sum(-1).amax() == 2
    decaying = layer()
    schedule = SCHEDULE(total_steps=8, decay="linear")
    sparsify_(decaying, MaskDecay(schedule=schedule), config=DENSE)
    with pytest.raises(ValueError, match="beta must be 0, got 1"):
        finish_(decaying)
