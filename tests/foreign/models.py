"""Checks that a whole model of somebody else's passes, whatever it is made of."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import sdgp_cusparselt as sdgp
from tests.foreign.comparing import MAGNITUDE, NONE, close, identical, prune_channels
from tests.foreign.tally import Tally

Loss = Callable[[nn.Module], Tensor]


def gradients(model: nn.Module, loss: Loss) -> dict[str, Tensor]:
    """Return the loss and every gradient; every model draws the same random numbers."""
    model.zero_grad()
    torch.manual_seed(1)
    value = loss(model)
    value.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.detach(), **found}


def prune_by_hooks(model: nn.Module, names: list[str]) -> None:
    """Give layers the pruned backward with nothing but torch's own autograd.

    output = (pruned path) - (its value) + (exact path): the first carries the gradient of the
    input, through a hook that prunes it, and the last that of the parameters.
    """
    for name in names:
        layer = model.get_submodule(name)
        layer.forward = _by_hooks(layer)  # type: ignore[method-assign]


def _by_hooks(layer: nn.Module) -> Callable[..., Tensor]:
    plain, frozen = layer.forward, copy.deepcopy(layer)
    dim, groups = (-3, layer.groups) if isinstance(layer, nn.Conv2d) else (-1, 1)

    def forward(x: Tensor) -> Tensor:
        constant = {n: p.detach() for n, p in layer.named_parameters()}
        exact = plain(x.detach())
        if not x.requires_grad:
            return exact
        pruned = torch.func.functional_call(frozen, constant, (x,))
        if pruned.requires_grad:
            pruned.register_hook(lambda g: prune_channels(g, dim, groups))
        return pruned - pruned.detach() + exact

    return forward


def check_model(tally: Tally, name: str, model: nn.Module, loss: Loss) -> None:
    """Count: without pruning the same bits; pruned, the reference; in training, finite; reverted.

    Args:
        tally: where the cases are counted.
        name: of the model, for the names of the cases.
        model: of float64, where rounding decides on no element that survives.
        loss: makes a scalar of the model.
    """
    model.eval()  # no dropout: its numbers would depend on how often the generator was asked
    expected = gradients(model, loss)

    def none() -> None:
        twin = copy.deepcopy(model)
        sdgp.convert_(twin, NONE, preset="all")
        identical(gradients(twin, loss), expected)

    def pruned() -> None:
        twin, reference = copy.deepcopy(model), copy.deepcopy(model)
        report = sdgp.convert_(twin, MAGNITUDE, preset="all")
        prune_by_hooks(reference, list(report.converted))
        got = gradients(twin, loss)
        close(got, gradients(reference, loss))
        changed = [n for n in expected if not torch.equal(got[n], expected[n])]
        assert changed, "pruning changed no gradient"

    def trained() -> None:
        twin = copy.deepcopy(model).float().train()
        sdgp.convert_(twin, sdgp.SDGPConfig(prune="mvue", backend="dense"), preset="all")
        optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
        for _ in range(2):
            found = gradients(twin, loss)
            optimizer.step()
        assert all(torch.isfinite(g).all() for g in found.values())

    def reverted() -> None:
        twin = copy.deepcopy(model)
        sdgp.convert_(twin, MAGNITUDE, preset="all")
        sdgp.revert_(twin)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        identical(gradients(twin, loss), expected)

    def kinds() -> None:
        twin = copy.deepcopy(model)
        sdgp.convert_(twin, MAGNITUDE, preset="all")
        for (path, ours), plain in zip(twin.named_modules(), model.modules(), strict=True):
            for kind in (nn.Linear, nn.Conv2d, Conv1D):
                assert isinstance(ours, kind) == isinstance(plain, kind), path
        assert list(twin.state_dict()) == list(model.state_dict())

    for check in (none, pruned, trained, reverted, kinds):
        tally.check(f"{name} {check.__name__}", check)


def floats(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a batch whose float tensors are of dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
