"""Products with a weight that exists packed alone, as ``weights.export`` stores it.

16-bit:  output = input @ W.T + bias
int8:    output = (round(input / s) @ W.T) * s * t + bias, s = max |input| / 127 of each token
fp8:     likewise with 448 for 127

with W the 2:4 weight, and t one scale for each of its outputs.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from sdgp_cusparselt.backends.masking import INPUTS
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.packing.layout import MetadataLayout
from sdgp_cusparselt.packing.nibbles import arrange, collect
from sdgp_cusparselt.packing.packed import Packed24, buffer_nbytes
from sdgp_cusparselt.products.dispatch import run
from sdgp_cusparselt.products.packed_weights import PrunedWeight
from sdgp_cusparselt.products.weight_operands import LinearOutput, NarrowOutput
from sdgp_cusparselt.recording.records import LayerRecord

#: The largest number of a dtype that activations and weights are scaled to.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(slots=True, eq=False)
class StoredWeight(PrunedWeight):
    """A packed weight and what products need of it; ``weight`` is the buffer's bytes.

    Attributes:
        stored: the packed operand [O, I].
        keeps_dense: whether the unpacked weight is kept between calls: for a CPU, where unpacking
            takes longer than a product of few tokens.
        reordered: the operand in the order that a plan asked for, where that was another.
    """

    stored: Packed24 | None = None
    keeps_dense: bool = False
    reordered: Packed24 | None = None
    is_stored: ClassVar[bool] = True

    @classmethod
    def of(cls, stored: Packed24, config: SDGPConfig) -> "StoredWeight":
        """Return what products take of a packed weight."""
        on_cpu = stored.device.type == "cpu"
        buffer = stored.buffer
        return cls(buffer, None, None, stored.dtype, config, True, stored, on_cpu)

    @property
    def shape(self) -> tuple[int, ...]:
        """[outputs, inputs]."""
        return self._stored.shape

    @property
    def _stored(self) -> Packed24:
        assert self.stored is not None  # ``of`` gave it
        return self.stored

    def dense(self) -> Tensor:
        """Return the unpacked weight."""
        if not self.keeps_dense:
            return self._dense()
        return self._form(("dense", self._stored.layout), self._dense)

    def _dense(self) -> Tensor:
        return self._stored.unpack()

    def packed(self, along: int, order: Hashable, pack: Callable[..., Tensor]) -> Tensor:
        """Return the operand as a plan reads it: what is stored, if that is its order."""
        assert along == INPUTS  # nothing else is stored
        stored = self._stored
        if not isinstance(order, MetadataLayout):  # one plan's own
            return self._form(
                ("packed", order), lambda: pack(stored.unpack(), method="none", transpose=False)
            )
        if _is_read_as(stored.layout, order, *stored.padded_shape):
            return stored.buffer
        found = self._form(("packed", order), lambda: _reordered(stored, order))
        self.reordered = replace(stored, buffer=found, layout=order)
        return found


def stored_linear(
    input: Tensor,
    weight: StoredWeight,
    scale: Tensor | None,
    bias: Tensor | None,
    config: SDGPConfig,
    record: LayerRecord,
) -> Tensor:
    """Return input @ W.T + bias with a packed weight: [..., I] -> [..., O] of input's dtype.

    Args:
        input: [..., I] float; of the weight's dtype where that has 16 bits.
        weight: W, [O, I].
        scale: float32 [O] of an 8-bit weight, else None.
        bias: [O] or None.
        config: what is allowed.
        record: of the layer.
    """
    if scale is None:
        return run(LinearOutput(input, weight, bias), config, record)
    narrow, steps = quantized(input, weight.dtype)
    sums = run(NarrowOutput(narrow, weight), config, record)
    output = sums.float() * steps * scale
    return (output if bias is None else output + bias.float()).to(input.dtype)


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x in an 8-bit dtype and the scale of each row: x = result * scale, about.

    scale = max |row| / largest;  result = round(x / scale), which for fp8 is the cast's rounding

    Args:
        x: [..., K] float.
        dtype: int8 or float8_e4m3fn.

    Returns:
        ([..., K] of dtype, float32 [..., 1]); a row of zeros has scale 1.
    """
    largest = LARGEST[dtype]
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / largest
    scale = torch.where(scale > 0, scale, 1.0)
    units = wide / scale
    if dtype == torch.int8:
        return units.round().clamp(-largest, largest).to(dtype), scale
    return units.clamp(-largest, largest).to(dtype), scale


@lru_cache(maxsize=4096)
def _is_read_as(one: MetadataLayout, other: MetadataLayout, rows: int, cols: int) -> bool:
    return other.reads_as(one, rows, cols)


def _reordered(stored: Packed24, layout: MetadataLayout) -> Tensor:
    """Return the buffer of a packed weight with its metadata in another order."""
    rows, cols = stored.padded_shape
    size = buffer_nbytes(stored.shape, stored.dtype, layout)
    buffer = torch.empty(size, dtype=torch.uint8, device=stored.device)
    nibbles = collect(stored.metadata, stored.layout, rows, cols)
    bytes_of_values = stored.nbytes - stored.metadata.numel()
    buffer[:bytes_of_values] = stored.buffer[:bytes_of_values]
    buffer[bytes_of_values:] = arrange(nibbles, layout, rows, cols)
    return buffer
