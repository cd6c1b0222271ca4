"""PackedLinear: a layer for inference that has its 2:4 weight packed, and no other.

What it saves does not depend on a library's order: values [O, I / 2], and a byte for two groups of
four that says which two of each were kept, i0 | i1 << 2, the first group in the low four bits. In
memory both stand in one buffer, and take the order of a library when a product first runs there.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.packing.layout import MetadataLayout, padded_shape
from sdgp_cusparselt.packing.nibbles import arrange, collect
from sdgp_cusparselt.packing.packed import BITS, Packed24, buffer_nbytes
from sdgp_cusparselt.packing.reference import pack_operand
from sdgp_cusparselt.products import stored_operators as ops
from sdgp_cusparselt.products.stored_weights import (
    LARGEST,
    StoredWeight,
    quantized,
    stored_linear,
)
from sdgp_cusparselt.recording.records import COMPILED, LayerRecord

VALUES, INDICES, SCALE = "weight_values", "weight_indices", "weight_scale"
#: The order in which a weight is stored: row by row, without padding. A library's own is taken from
#: it when a product first runs.
STORED = MetadataLayout("stored", (), (1,), order="groups", region=((1, 8),))
#: How exported products may run: sparse wherever that is right, since there is no dense weight to
#: be faster with; unpacked and dense elsewhere.
CONFIG = SDGPConfig(prune="none", forward="sparse_weight", backend="cusparselt")
#: The same for 8-bit weights, whose algorithms are proven and not timed.
NARROW = CONFIG.replace(tune="never")


class PackedLinear(nn.Module):
    """output = input @ W.T + bias with a packed 2:4 weight; see ``sdgp.export_``.

    Attributes:
        in_features, out_features: as of nn.Linear.
        weight_packed: uint8 buffer, values and metadata of W [out_features, in_features].
        weight_scale: float32 [out_features] of an 8-bit weight, else None.
        bias: [out_features] or None.
        weight_dtype: of the values.
        compute_dtype: of the layer that was exported; what ``weight`` has.
        layout: order of the metadata; ``layout_text`` is the same as a string.
    """

    weight_packed: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None
    in_features: int
    out_features: int
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype
    layout: MetadataLayout
    layout_text: str
    sdgp_record: LayerRecord
    #: The kind of layer that a description names.
    kind: ClassVar[str] = "linear"

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ W.T + bias: [..., in_features] -> [..., out_features]."""
        return self.product(input)

    def product(self, input: Tensor) -> Tensor:
        """Return input @ W.T + bias, with the gradient of input and bias where one is asked for."""
        if self.weight_scale is None and input.dtype != self.weight_dtype:
            if not torch.is_autocast_enabled(input.device.type):
                rule = f"of {self.weight_dtype}, as its weight was exported"
                fix = "Cast the model's input, or export in its dtype."
                raise value_error("PackedLinear", "input", rule, input.dtype, fix)
            input = input.to(self.weight_dtype)
        differentiates = torch.is_grad_enabled() and (
            input.requires_grad or (self.bias is not None and self.bias.requires_grad)
        )
        if torch.compiler.is_compiling() or differentiates:
            sizes = self.out_features, self.in_features, self.weight_dtype, self.layout_text
            tensors = input, self.weight_packed, self.weight_scale, self.bias
            output: Tensor = _Product.apply(*tensors, *sizes)  # type: ignore[no-untyped-call]
            return output
        scale, config = self.weight_scale, CONFIG if self.weight_scale is None else NARROW
        weight = StoredWeight.of(self.packed(), config)
        output = stored_linear(input, weight, scale, self.bias, config, self.sdgp_record)
        if weight.reordered is not None:  # as the library reads it: no second copy from now on
            self.take_(weight.reordered, scale)
        return output

    def packed(self) -> Packed24:
        """Return the weight, packed."""
        shape = (self.out_features, self.in_features)
        return Packed24(self.weight_packed, shape, self.weight_dtype, self.layout)

    def dense(self) -> Tensor:
        """Return the weight [out_features, in_features] in ``compute_dtype``, unpacked."""
        dense = self.packed().unpack()
        if self.weight_scale is None:
            return dense
        return (dense.float() * self.weight_scale[:, None]).to(self.compute_dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that asks a layer for its dtype or device; made anew."""
        return self.dense()

    def extra_repr(self) -> str:
        """Return sizes and what the weight is."""
        kind = str(self.weight_dtype).removeprefix("torch.")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight=2:4 {kind}, {self.weight_packed.numel()} bytes"
        )

    def take_(self, stored: Packed24, scale: Tensor | None) -> None:
        """Take a packed weight in place of the one there is."""
        self._take_buffer(stored)
        self.register_buffer(SCALE, scale)

    def _take_buffer(self, stored: Packed24) -> None:
        self.register_buffer("weight_packed", stored.buffer, persistent=False)
        self.layout, self.layout_text = stored.layout, stored.layout.to_json()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        values, indices = portable(self.packed())
        destination[prefix + VALUES], destination[prefix + INDICES] = values, indices

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        values = state_dict.pop(prefix + VALUES, None)
        indices = state_dict.pop(prefix + INDICES, None)
        _, _, missing, _, errors = args[:5]
        if values is None or indices is None:
            given = (VALUES, values), (INDICES, indices)
            missing += [prefix + name for name, found in given if found is None]
        elif fault := self._misfit(values, indices):
            errors.append(f"{prefix}{VALUES}: {fault}")
        else:
            device = self.weight_packed.device
            device = values.device if device.type == "meta" else device
            found = from_portable(values.to(device), indices.to(device))
            if found.layout == self.layout and self.weight_packed.device.type != "meta":
                self.weight_packed.copy_(found.buffer)  # where compiled code looks for it
            else:
                self._take_buffer(found)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _misfit(self, values: Tensor, indices: Tensor) -> str | None:
        wanted = (self.out_features, self.in_features // 2)
        if tuple(values.shape) != wanted or values.dtype != self.weight_dtype:
            return f"must be {wanted} {self.weight_dtype}, got {tuple(values.shape)} {values.dtype}"
        groups = (self.out_features, -(-self.in_features // 8))
        if tuple(indices.shape) != groups or indices.dtype != torch.uint8:
            return f"indices must be {groups} uint8, got {tuple(indices.shape)} {indices.dtype}"
        return None


class PackedConv2d(PackedLinear):
    """An unpadded 1x1 convolution of stride 1: the same product, of pixels."""

    kind = "conv2d"

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of [N, in_channels, H, W] or [in_channels, H, W]."""
        return self.product(input.movedim(-3, -1)).movedim(-1, -3)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_channels, in_channels, 1, 1]."""
        return self.dense()[:, :, None, None]


class PackedConv1D(PackedLinear):
    """Transformers' ``Conv1D``."""

    kind = "conv1d"

    @property
    def nf(self) -> int:
        """The number of outputs."""
        return self.out_features

    @property
    def nx(self) -> int:
        """The number of inputs."""
        return self.in_features

    @property
    def weight(self) -> Tensor:
        """The dense weight [in_features, out_features]."""
        return self.dense().t()


KINDS: dict[str, type[PackedLinear]] = {
    kind.kind: kind for kind in (PackedLinear, PackedConv2d, PackedConv1D)
}


class _Product(Function):
    """The product; input's gradient is that of the stored weight, straight through rounding."""

    @staticmethod
    def forward(
        input: Tensor,
        buffer: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        outputs: int,
        inputs: int,
        dtype: torch.dtype,
        layout: str,
    ) -> Tensor:
        config = CONFIG if scale is None else NARROW
        sizes = outputs, inputs, dtype, layout
        output: Tensor = ops.packed_linear(
            input, buffer, scale, bias, *sizes, config.text, COMPILED.token
        )
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, buffer, scale, _, *ctx.sizes = inputs
        ctx.save_for_backward(buffer, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        buffer, scale = ctx.saved_tensors
        with torch.no_grad():
            weight = ops.packed_weight(buffer, scale, *ctx.sizes, grad)
            grad_input = grad.matmul(weight) if ctx.needs_input_grad[0] else None
            flat = grad.reshape(-1, grad.shape[-1])
            grad_bias = flat.sum(0) if ctx.needs_input_grad[3] else None
        return grad_input, None, None, grad_bias, *[None] * 4


def packed_of(weight: Tensor, dtype: torch.dtype) -> tuple[Packed24, Tensor | None]:
    """Return a 2:4 weight packed in a dtype, and the scales of its outputs where that has 8 bits.

    Args:
        weight: [O, I] float, at most two of every four along I not zero; O and I fit the padding.
        dtype: bfloat16, float16, int8 or float8_e4m3fn.
    """
    scale = None
    if dtype in LARGEST:
        weight, scale = quantized(weight, dtype)
        scale = scale[:, 0].contiguous()
    weight = weight.to(dtype)
    return pack_operand(weight, STORED, method="none"), scale


def portable(stored: Packed24) -> tuple[Tensor, Tensor]:
    """Return values [O, I / 2] and indices uint8 [O, I / 8 rounded up] of a packed weight."""
    rows, cols = stored.shape
    nibbles = collect(stored.metadata, stored.layout, *stored.padded_shape)[:rows, : cols // 4]
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    indices = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return stored.values[:rows, : cols // 2].clone(), indices.contiguous()


def from_portable(values: Tensor, indices: Tensor) -> Packed24:
    """Return the packed weight that ``portable`` took apart."""
    rows, cols = values.shape[0], 2 * values.shape[1]
    padded = padded_shape(rows, cols, values.dtype)
    size = buffer_nbytes((rows, cols), values.dtype, STORED)
    buffer = torch.zeros(size, dtype=torch.uint8, device=values.device)
    stored = Packed24(buffer, (rows, cols), values.dtype, STORED)
    kind = BITS[values.dtype.itemsize]
    stored.values.view(kind)[:rows, : cols // 2] = values.view(kind)
    whole = torch.full(
        (padded[0], padded[1] // 4), STORED.padding, dtype=torch.uint8, device=values.device
    )
    pairs = torch.stack((indices & 15, indices >> 4), -1).flatten(1)
    whole[:rows, : cols // 4] = pairs[:, : cols // 4]
    stored.metadata.copy_(arrange(whole, STORED, *padded))
    return stored
