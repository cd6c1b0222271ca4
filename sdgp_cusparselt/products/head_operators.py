"""The loss of a linear head as operators of the compiler: see ``operators``."""

from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.products import cross_entropy as head
from sdgp_cusparselt.products.operators import PURE, as_operator
from sdgp_cusparselt.recording.records import record_of


def _head_losses_fake(input: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    found = input.new_empty(input.shape[0], dtype=head.sum_dtype(input.dtype))
    return found, torch.empty_like(found)


@as_operator(_head_losses_fake, PURE)
def head_losses(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each token of a linear head and its lse; see ``losses``."""
    objective = head.Objective(label_smoothing, z_loss, ignore_index)
    return head.losses(head.Head(input, weight, bias, target, objective, chunk))


def _head_gradients_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    chunk: int,
    of_input: bool,
    of_weight: bool,
    of_bias: bool,
    weight_dtype: torch.dtype,
    config: str,
    token: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(input) if of_input else input.new_empty(0),
        torch.empty_like(weight, dtype=weight_dtype) if of_weight else input.new_empty(0),
        input.new_empty(weight.shape[0], dtype=weight_dtype) if of_bias else input.new_empty(0),
    )


@as_operator(_head_gradients_fake)
def head_gradients(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    chunk: int,
    of_input: bool,
    of_weight: bool,
    of_bias: bool,
    weight_dtype: torch.dtype,
    config: str,
    token: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a linear head under cross-entropy; empty where not asked for."""
    objective = head.Objective(label_smoothing, z_loss, ignore_index)
    operands = head.Head(input, weight, bias, target, objective, chunk)
    needs = of_input, of_weight, of_bias
    found = head.gradients(
        operands, lse, scale, needs, weight_dtype, SDGPConfig.from_text(config), record_of(token)
    )
    of_i, of_w, of_b = (input.new_empty(0) if g is None else g for g in found)
    return of_i, of_w, of_b
