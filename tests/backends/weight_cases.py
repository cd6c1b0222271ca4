"""What the tests of pruned weights share: layers of three kinds, and float64 references."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.config.combinations import Combination
from sdgp_cusparselt.layers.weight_masks import (
    as_outputs_inputs,
)
from tests.helpers import product_bound

WEIGHTS = sdgp.SDGPConfig(
    prune="none", forward="sparse_weight", tune="never", on_unsupported="raise"
)
BOTH = WEIGHTS.replace(grad_input="weight")
INPUTS, OUTPUTS = 32, 48


def config_of(row: Combination, **changes) -> sdgp.SDGPConfig:
    return sdgp.SDGPConfig(
        prune="magnitude" if row.grad_input == "grad_output" else "none",
        forward="sparse_weight" if row.output == "weight" else "dense",
        grad_input="weight" if row.grad_input == "weight" else "grad_output",
        grad_weight="sparse" if row.grad_weight == "grad_output" else "dense",
        grad_weight_prune="magnitude",
        tune="never",
        **changes,
    )


def layer_of(kind: str, config: sdgp.SDGPConfig, dtype: torch.dtype) -> nn.Module:
    layers = {
        "linear": nn.Linear(INPUTS, OUTPUTS),
        "conv": nn.Conv2d(INPUTS, OUTPUTS, 1),
        "conv1d": Conv1D(OUTPUTS, INPUTS),
    }
    layer = layers[kind].to(dtype).to(memory_format=torch.channels_last)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    sdgp.convert_(layer, config)
    return layer


def input_of(kind: str, dtype: torch.dtype) -> Tensor:
    if kind != "conv":
        return torch.randn(3, 16, INPUTS, dtype=dtype, requires_grad=True)
    x = torch.randn(2, INPUTS, 6, 4, dtype=dtype).to(memory_format=torch.channels_last)
    return x.requires_grad_()


def rows_of(kind: str, x: Tensor) -> Tensor:
    """Return activations as [tokens, features]."""
    x = x.detach().double()
    return (x.permute(0, 2, 3, 1) if kind == "conv" else x).reshape(
        -1, x.shape[1 if kind == "conv" else -1]
    )


def close(
    got: Tensor,
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    add: Tensor | float = 0.0,
    *,
    by_torch: bool = False,
) -> None:
    """Assert got = a @ b + add: the product is rounded once, and the sum once more.

    Torch's own convolutions round partial sums as well, on a CPU.
    """
    exact, eps = a @ b + add, torch.finfo(dtype).eps
    bound = product_bound(a, b, dtype) + eps * exact.abs()
    if by_torch:
        bound += 2 * eps * (a.abs() @ b.abs())
    excess = ((got.double() - exact).abs() / bound).max()
    assert excess <= 1, float(excess)


def check_layer(kind: str, layer: nn.Module, x: Tensor, w: Tensor, twice: Tensor) -> None:
    """Compare output and all gradients with float64 products of the masked operands."""
    config, dtype = layer.sdgp_config, x.dtype
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    calls = layer.sdgp_record.calls
    torchs = {
        name: kind == "conv" and not calls[name, "sparse"]
        for name in ("output", "grad_input", "grad_weight")
    }
    rows, grad = rows_of(kind, x), rows_of(kind, g)
    bias = layer.bias.detach().double()
    close(rows_of(kind, y), rows, w.t(), dtype, bias, by_torch=torchs["output"])
    left = sdgp.prune(grad, method="magnitude") if config.prunes else grad
    right = twice if config.grad_input == "weight" else w
    close(rows_of(kind, x.grad), left, right, dtype, by_torch=torchs["grad_input"])
    if config.grad_weight == "sparse":
        grad = sdgp.prune(grad, method="magnitude", dim=0)
    got = as_outputs_inputs(layer, layer.weight.grad).flatten(1)
    close(got, grad.t(), rows, dtype, by_torch=torchs["grad_weight"])


def reference(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the weight [O, I] pruned along I, and that along O as well, in float64."""
    w = as_outputs_inputs(layer, layer.weight.detach()).flatten(1).double()
    once = sdgp.prune(w, method="magnitude")
    return once, sdgp.prune(once, method="magnitude", dim=0)


def smallest(weight: Tensor, dim: int) -> Tensor:
    """Return the mask of the two smallest of four: what magnitude would never keep."""
    groups = torch.unflatten(weight.detach().abs(), dim, (-1, 4))
    order = groups.argsort(dim + 1).argsort(dim + 1)
    return (order < 2).flatten(dim, dim + 1)
