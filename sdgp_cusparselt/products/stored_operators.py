"""What torch.compile sees of a layer whose weight is stored packed."""

from functools import lru_cache

import torch
from torch import Tensor

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.packing.layout import MetadataLayout
from sdgp_cusparselt.packing.packed import Packed24
from sdgp_cusparselt.products.operators import PURE, as_operator
from sdgp_cusparselt.products.stored_weights import StoredWeight, stored_linear
from sdgp_cusparselt.recording.records import record_of

_layout = lru_cache(maxsize=256)(MetadataLayout.from_json)


def _packed_linear_fake(
    input: Tensor,
    buffer: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    layout: str,
    config: str,
    token: int,
) -> Tensor:
    return input.new_empty((*input.shape[:-1], outputs))


@as_operator(_packed_linear_fake, PURE)
def packed_linear(
    input: Tensor,
    buffer: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    layout: str,
    config: str,
    token: int,
) -> Tensor:
    """Return input @ W.T + bias: [..., inputs] -> [..., outputs], contiguous.

    Args:
        input: [..., inputs] float.
        buffer: uint8, W packed.
        scale: float32 [outputs] of an 8-bit weight.
        bias: [outputs].
        outputs: of W.
        inputs: of W.
        dtype: of W's values.
        layout: ``MetadataLayout.to_json()`` of the buffer.
        config: ``SDGPConfig.text``.
        token: of the layer's record.
    """
    stored = Packed24(buffer, (outputs, inputs), dtype, _layout(layout))
    choices = SDGPConfig.from_text(config)
    weight = StoredWeight.of(stored, choices)
    return stored_linear(input, weight, scale, bias, choices, record_of(token)).contiguous()


def _packed_weight_fake(
    buffer: Tensor,
    scale: Tensor | None,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    layout: str,
    like: Tensor,
) -> Tensor:
    return like.new_empty((outputs, inputs))


@as_operator(_packed_weight_fake, PURE)
def packed_weight(
    buffer: Tensor,
    scale: Tensor | None,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    layout: str,
    like: Tensor,
) -> Tensor:
    """Return the dense weight [outputs, inputs] of like's dtype; arguments as ``packed_linear``."""
    stored = Packed24(buffer, (outputs, inputs), dtype, _layout(layout))
    dense = stored.unpack()
    return (
        dense.to(like.dtype) if scale is None else (dense.float() * scale[:, None]).to(like.dtype)
    )
