"""Which share of the grad_input GEMMs works on a pruned gradient, counted from layer shapes."""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class GradInputFlops:
    """FLOPs of ``grad_input = grad_output @ weight`` in one step, by layer name.

    Args:
        by_layer: fqn -> FLOPs; a layer whose input needs no gradient computes none, and is absent.
    """

    by_layer: dict[str, int] = field(default_factory=dict)

    def share(self, fqns: Collection[str]) -> float:
        """Return the share that the layers ``fqns`` have in all; 0 where there are none."""
        total = sum(self.by_layer.values())
        return sum(self.by_layer.get(fqn, 0) for fqn in fqns) / total if total else 0.0


@contextlib.contextmanager
def count_grad_input_flops(model: nn.Module) -> Iterator[GradInputFlops]:
    """Watch the forward passes inside the ``with`` block and count what their backward will do.

        linear: 2 * num_tokens * in_features * out_features
        conv:   2 * (output pixels) * out_channels * (in_channels / groups) * kh * kw

    Args:
        model: with its linear layers and convolutions, converted or not.

    Returns:
        A counter, filled when a layer's forward has run with an input that requires a gradient.
    """
    flops = GradInputFlops()

    def watch(fqn: str, module: nn.Linear | nn.Conv2d) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled() and inputs[0].requires_grad:
                # A weight holds in / groups * kh * kw values for each output value.
                per_output = module.weight.numel() // module.weight.shape[0]
                previous = flops.by_layer.get(fqn, 0)
                flops.by_layer[fqn] = previous + 2 * output.numel() * per_output

        return module.register_forward_hook(hook)

    handles = [
        watch(fqn, module)
        for fqn, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    try:
        yield flops
    finally:
        for handle in handles:
            handle.remove()
