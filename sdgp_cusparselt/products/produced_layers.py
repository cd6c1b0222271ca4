"""Linear layers behind a producer, and what their own backward does with their gradients."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdgp_cusparselt.backends.dense import dense_linear_grad_input
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.products import backward as products
from sdgp_cusparselt.products import operators as ops
from sdgp_cusparselt.recording.records import LayerRecord


class Needs(NamedTuple):
    """Which gradients of a layer are asked for."""

    input: bool
    weight: bool
    bias: bool


class LayerGradients(NamedTuple):
    """The gradients of a layer, None where they were not asked for."""

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass(slots=True, eq=False)
class FusedLinear:
    """A linear layer whose output went into a producer.

    Attributes:
        weight: [out_features, in_features] in the dtype of the products, or None where
            grad_input is not needed.
        input: [..., in_features], or None where grad_weight is not needed.
        needs: which gradients are.
        row_major: whether the weight lies so in memory: torch's own product depends on it.
        config: how to prune; in a compiled backward its text.
        record: of the layer; in a compiled backward its token.
        pruned: whether grad_input and grad_weight are pruned; None looks it up in config, which a
            compiled backward cannot.
    """

    weight: Tensor | None
    input: Tensor | None
    needs: Needs
    row_major: bool
    config: SDGPConfig | str
    record: LayerRecord | int
    pruned: tuple[bool, bool] | None = None


def apart(
    grad_outputs: tuple[Tensor, ...], layers: tuple[FusedLinear, ...]
) -> tuple[LayerGradients, ...]:
    """Return what the layers' own backward would, of gradients that are there."""
    pairs = zip(grad_outputs, layers, strict=True)
    # From the last to the first, as autograd comes to them, so that the same numbers are drawn.
    return tuple([ordinary(g, layer) for g, layer in list(pairs)[::-1]][::-1])


def ordinary(grad_output: Tensor, layer: FusedLinear) -> LayerGradients:
    """Return what a converted layer's own backward would."""
    config, record = layer.config, layer.record
    calls: Any = products
    if torch.compiler.is_compiling() or isinstance(config, str):
        calls = ops
        config = config if isinstance(config, str) else config.text
        record = record if isinstance(record, int) else record.token
    prunes, sparse_weight = layer.pruned or pruned_of(layer.config)
    need_input, need_weight, need_bias = layer.needs
    flat = tokens_of(grad_output)
    tokens = None if layer.input is None or not need_weight else tokens_of(layer.input)
    grad_input: Tensor | None = None
    grad_weight: Tensor | None = None
    if need_input and need_weight and prunes and sparse_weight:
        grad_input, grad_weight = calls.linear_grads(
            grad_output, layer.weight, tokens, config, record
        )
    else:
        if need_input:
            assert layer.weight is not None  # saved where grad_input is needed
            grad_input = (
                calls.linear_grad_input(grad_output, layer.weight, config, record)
                if prunes
                else dense_linear_grad_input(grad_output, layer.weight)
            )
        if tokens is not None:
            grad_weight = (
                calls.linear_grad_weight(flat, tokens, layer.row_major, config, record)
                if sparse_weight
                else _dense_grad_weight(flat, tokens, layer.row_major)
            )
    return LayerGradients(grad_input, grad_weight, flat.sum(0) if need_bias else None)


def pruned_of(config: SDGPConfig | str) -> tuple[bool, bool]:
    """Return whether grad_input and grad_weight are pruned."""
    choices = SDGPConfig.from_text(config) if isinstance(config, str) else config
    return choices.prunes, choices.grad_weight == "sparse"


def tokens_of(x: Tensor) -> Tensor:
    """Return x [..., K] as [tokens, K]."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _dense_grad_weight(flat: Tensor, tokens: Tensor, row_major: bool) -> Tensor:
    # The same two products that autograd's own addmm backward chooses between, for equal bits.
    return flat.t().mm(tokens) if row_major else tokens.t().mm(flat).t()
