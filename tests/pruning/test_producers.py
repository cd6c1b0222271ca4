"""The twins of producers: autograd's gradients in float64, and which roundings are saved."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sdgp_cusparselt.pruning import producers
from sdgp_cusparselt.pruning.producers import (
    ACTIVATIONS,
    ActivationBackward,
    CrossEntropyBackward,
    cross_entropy_gradient,
    forward,
    gradient,
)

SCALE = 1 / 0.7
UNFUSED = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu_squared": lambda x: torch.square(F.relu(x)),
}
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def unfused(name: str, pre: Tensor, up: Tensor | None, mask: Tensor | None) -> Tensor:
    hidden = UNFUSED[name](pre)
    hidden = hidden if up is None else hidden * up
    return hidden if mask is None else hidden * mask * SCALE


def inputs(gated: bool, masked: bool, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    upstream, pre, up = (2 * torch.randn(5, 7, 24) for _ in range(3))
    mask = torch.rand(5, 7, 24) < 0.7 if masked else None
    return upstream.to(dtype), pre.to(dtype), up.to(dtype) if gated else None, mask


@pytest.mark.parametrize("chunk", [1 << 22, 100])
@pytest.mark.parametrize(
    "name, gated, masked", list(itertools.product(ACTIVATIONS, (False, True), (False, True)))
)
def test_gradients_are_autograds(
    name: str, gated: bool, masked: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, in one piece and a few rows at a time, whatever the strides."""
    monkeypatch.setattr(producers, "_CHUNK", chunk)
    upstream, pre, up, mask = inputs(gated, masked, torch.float64)
    assert upstream is not None and pre is not None
    pre = pre.transpose(0, 1).contiguous().transpose(0, 1)
    leaves = [t.requires_grad_() for t in (pre, up) if t is not None]
    want = torch.autograd.grad(unfused(name, pre, up, mask), leaves, upstream)
    with torch.no_grad():
        assert torch.equal(forward(name, pre, up, mask, SCALE), unfused(name, pre, up, mask))
        found = gradient(name, upstream, pre, up, mask, SCALE)
        again = ActivationBackward(name, upstream, pre, up, mask, SCALE).gradients()
    for one, other, true in zip(found, again, want, strict=True):
        torch.testing.assert_close(one, true)
        assert one.is_contiguous() and torch.equal(one, other)


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize(
    "name, gated, masked", list(itertools.product(ACTIVATIONS, (False, True), (False, True)))
)
def test_gradients_are_rounded_once(
    name: str, gated: bool, masked: bool, dtype: torch.dtype
) -> None:
    upstream, pre, up, mask = inputs(gated, masked, dtype)
    assert upstream is not None and pre is not None
    found = gradient(name, upstream, pre, up, mask, SCALE)
    true = gradient(
        name, upstream.double(), pre.double(), None if up is None else up.double(), mask, SCALE
    )
    for one, exact in zip(found, true, strict=True):
        # float32 arithmetic with terms of at most 64 goes before the rounding.
        bound = UNIT[dtype] * exact.abs() + 64 * 2**-20
        assert one.dtype == dtype and ((one.double() - exact).abs() <= bound).all()
    if gated or masked:
        return
    leaf = pre.requires_grad_()
    (unrounded,) = torch.autograd.grad(unfused(name, leaf, None, None), leaf, upstream)
    if name.startswith("relu"):
        assert torch.equal(found[0], unrounded)
    else:
        torch.testing.assert_close(found[0], unrounded, rtol=2 * UNIT[dtype], atol=2**-14)


def head(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    logits = (3 * torch.randn(9, 50)).to(dtype)
    target = torch.randint(50, (9,))
    target[3] = -100
    return logits, target, (target != -100).to(dtype) / 8


@pytest.mark.parametrize("chunk", [1 << 22, 100])
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 1e-2)])
def test_the_gradient_of_a_cross_entropy_is_autograds(
    smoothing: float, z_loss: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producers, "_CHUNK", chunk)
    logits, target, row_scale = head(torch.float64)
    leaf = logits.clone().requires_grad_()
    lse = leaf.logsumexp(1)
    loss = F.cross_entropy(leaf, target, label_smoothing=smoothing)
    loss = loss + z_loss * lse.square()[target != -100].mean()
    (want,) = torch.autograd.grad(loss, leaf)
    lse = lse.detach()
    logits[3, 4], lse[3] = torch.nan, torch.inf  # an ignored row may hold anything
    options = {"label_smoothing": smoothing, "z_loss": z_loss}
    found = cross_entropy_gradient(logits, lse, target, row_scale, **options)
    torch.testing.assert_close(found, want)
    assert (found[3] == 0).all()
    parts = [
        CrossEntropyBackward(
            logits[:, a:b], lse, target, row_scale, smoothing, z_loss, a, 50
        ).gradients()[0]
        for a, b in ((0, 20), (20, 50))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), want)


def test_an_overflow_stays_visible() -> None:
    for value in (torch.inf, torch.nan):
        upstream, pre = torch.ones(4, 8).bfloat16(), torch.ones(4, 8).bfloat16()
        upstream[1, 2] = value
        for name in ACTIVATIONS:
            (found,) = gradient(name, upstream, pre)
            assert found.isfinite().logical_not().nonzero().tolist() == [[1, 2]]
        logits, target, row_scale = head(torch.float32)
        logits[5, 6] = value
        found = cross_entropy_gradient(logits, logits.logsumexp(1), target, row_scale)
        assert found.isfinite().all(1).tolist() == [row != 5 for row in range(9)]


def test_an_activation_without_a_twin_is_refused() -> None:
    x = torch.ones(2, 4)
    for call in (lambda: forward("tanh", x), lambda: gradient("tanh", x, x)):
        with pytest.raises(ValueError, match="activation must be one of gelu, .* got 'tanh'"):
            call()
