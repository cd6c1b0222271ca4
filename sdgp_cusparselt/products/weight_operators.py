"""The products of a pruned weight as operators of the compiler: see ``operators``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.products import weights as weight_products
from sdgp_cusparselt.products.operators import PURE, as_operator, geometry_of
from sdgp_cusparselt.recording.records import record_of


def _linear_output_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    keeps: bool,
    config: str,
    token: int,
) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@as_operator(_linear_output_fake, PURE)
def linear_output(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    keeps: bool,
    config: str,
    token: int,
) -> Tensor:
    """Return input @ W.T + bias with the pruned weight: [..., I] -> [..., O], contiguous."""
    choices = SDGPConfig.from_text(config), record_of(token)
    result = weight_products.linear_output(input, weight, bias, mask, keeps, *choices)
    return result.contiguous()


def _linear_weight_grad_input_fake(
    grad_output: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    mask_t: Tensor | None,
    keeps: bool,
    config: str,
    token: int,
) -> Tensor:
    return grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1]))


@as_operator(_linear_weight_grad_input_fake, PURE)
def linear_weight_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    mask_t: Tensor | None,
    keeps: bool,
    config: str,
    token: int,
) -> Tensor:
    """Return grad_output @ W, W pruned both ways: [..., O] -> [..., I], contiguous."""
    choices = SDGPConfig.from_text(config), record_of(token)
    result = weight_products.linear_weight_grad_input(
        grad_output, weight, mask, mask_t, keeps, *choices
    )
    return result.contiguous()


def _conv2d_output_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: Sequence[int],
    keeps: bool,
    config: str,
    token: int,
) -> Tensor:
    conv = geometry_of(geometry)
    sizes = [
        (size + 2 * pad - reach * (edge - 1) - 1) // step + 1
        for size, edge, step, pad, reach in zip(
            input.shape[2:], weight.shape[2:], conv.stride, conv.padding, conv.dilation, strict=True
        )
    ]
    made = input.new_empty((input.shape[0], weight.shape[0], *sizes))
    return made.to(memory_format=torch.channels_last)


@as_operator(_conv2d_output_fake, PURE)
def conv2d_output(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: Sequence[int],
    keeps: bool,
    config: str,
    token: int,
) -> Tensor:
    """Return conv2d(input, W) + bias with the pruned weight, channels_last."""
    choices = keeps, SDGPConfig.from_text(config), record_of(token)
    result = weight_products.conv2d_output(
        input, weight, bias, mask, geometry_of(geometry), *choices
    )
    return result.contiguous(memory_format=torch.channels_last)


def _conv2d_weight_grad_input_fake(
    grad_output: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    mask_t: Tensor | None,
    input_like: Tensor,
    geometry: Sequence[int],
    keeps: bool,
    config: str,
    token: int,
) -> Tensor:
    return torch.empty_like(input_like)


@as_operator(_conv2d_weight_grad_input_fake, PURE)
def conv2d_weight_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    mask_t: Tensor | None,
    input_like: Tensor,
    geometry: Sequence[int],
    keeps: bool,
    config: str,
    token: int,
) -> Tensor:
    """Return the transposed convolution of grad_output with W pruned both ways."""
    choices = keeps, SDGPConfig.from_text(config), record_of(token)
    result = weight_products.conv2d_weight_grad_input(
        grad_output, weight, mask, mask_t, input_like, geometry_of(geometry), *choices
    )
    like = torch.empty_like(input_like)
    return result if result.stride() == like.stride() else like.copy_(result)


def _pruned_weight_fake(
    weight: Tensor, mask: Tensor | None, like: Tensor, keeps: bool, config: str
) -> Tensor:
    return torch.empty_like(weight, dtype=like.dtype)


@as_operator(_pruned_weight_fake, PURE)
def pruned_weight(
    weight: Tensor, mask: Tensor | None, like: Tensor, keeps: bool, config: str
) -> Tensor:
    """Return the pruned weight with its zeros, of like's dtype; the caller's own copy."""
    choices = SDGPConfig.from_text(config)
    found = weight_products.pruned_weight(weight, mask, like, keeps, choices)
    return torch.empty_like(weight, dtype=like.dtype).copy_(found)
