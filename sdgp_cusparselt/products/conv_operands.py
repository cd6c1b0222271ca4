"""The two products of a convolution as value objects; ``operands`` says what they share."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sdgp_cusparselt.backends import convolution, dense, emulation
from sdgp_cusparselt.backends.base import ConvGeometry, Problem, Product
from sdgp_cusparselt.backends.plans import ALIGNMENT, dense_order
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.tuning import MATMUL, Rival

Key = tuple[object, ...]


@dataclass(slots=True, eq=False)
class Conv2dGradInput:
    """grad_input = transposed convolution of prune(grad_output along channels) with weight.

    Attributes:
        grad_output: [N, out_channels, H_out, W_out].
        weight: [out_channels, in_channels / groups, kH, kW].
        input_like: [N, in_channels, H, W] whose sizes and strides the result takes; its values are
            not read.
        conv: stride, padding, dilation, groups.
    """

    grad_output: Tensor
    weight: Tensor
    input_like: Tensor
    conv: ConvGeometry
    product: ClassVar[Product] = "grad_input"
    structured: ClassVar = "grad_output"
    memory: ClassVar = ("grad_output", "weight")

    @property
    def activations(self) -> Tensor:
        """What comes anew with every call: the gradient."""
        return self.grad_output

    def key(self) -> Key:
        """Return what a prepared call depends on."""
        g, w, x = self.grad_output, self.weight, self.input_like
        place = g.data_ptr() % ALIGNMENT, w.data_ptr() % ALIGNMENT
        return (
            Conv2dGradInput, g.shape, g.stride(), g.dtype, g.device,
            w.shape, w.stride(), w.dtype, x.shape, x.stride(), self.conv, place,
        )  # fmt: skip

    def layer_key(self) -> Key:
        """Return what a layer's forward knows of it."""
        dtype = self.grad_output.dtype
        return conv_layer_keys(self.input_like, self.weight, self.conv, dtype)[0]

    def problem(self, config: SDGPConfig) -> Problem:
        """Return its sizes with what the user chose."""
        g, w = self.grad_output, self.weight
        pixels = g.numel() // max(1, g.shape[1])
        sizes = pixels, w[0].numel(), g.shape[1] // self.conv.groups
        order = dense_order(w[:, :, 0, 0])
        return _conv_problem("grad_input", sizes, g, w, self.conv, config, order)

    def plain(self) -> Tensor:
        """Return the transposed convolution of grad_output."""
        return dense.dense_conv2d_grad_input(
            self.grad_output, self.weight, self.input_like, self.conv
        )

    def emulated(self, config: SDGPConfig) -> Tensor:
        """Return the transposed convolution of prune(grad_output), computed densely."""
        return dense.conv2d_grad_input(
            self.grad_output, self.weight, self.input_like, self.conv, config
        )

    def pruned(self, config: SDGPConfig) -> Tensor:
        """Return prune(grad_output along channels)."""
        return emulation.prune_channels(self.grad_output, self.conv.groups, config)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return [pixels, out_channels] and, of a 1x1 kernel, [out_channels, in_channels]."""
        return convolution.pixels(self.grad_output), self.weight[:, :, 0, 0]

    @property
    def result_shape(self) -> tuple[int, ...] | None:
        """None: pixels have to be put in their places."""
        return None

    def finish(self, product: Tensor) -> Tensor:
        """Return [N, in_channels, H, W]."""
        shapes = self.grad_output.shape, self.input_like.shape
        return convolution.spread(product, *shapes, self.conv)

    def rival(self) -> Rival:
        """Return what it has to beat."""
        return conv_rival(self.grad_output, self.weight, self.input_like, self.conv)

    @property
    def rows_per_sample(self) -> int:
        """Pixels of one image."""
        return self.grad_output.shape[2] * self.grad_output.shape[3]


@dataclass(slots=True, eq=False)
class Conv2dGradWeight:
    """grad_weight of a convolution from grad_output pruned along its pixels in (n, h, w) order.

    Attributes:
        grad_output: [N, out_channels, H_out, W_out].
        input: [N, in_channels, H, W].
        weight: [out_channels, in_channels / groups, kH, kW]; only its shape matters.
        conv: stride, padding, dilation, groups.
    """

    grad_output: Tensor
    input: Tensor
    weight: Tensor
    conv: ConvGeometry
    product: ClassVar[Product] = "grad_weight"
    structured: ClassVar = "grad_output"
    memory: ClassVar = ("grad_output", "input")

    @property
    def activations(self) -> Tensor:
        """What comes anew with every call: the gradient."""
        return self.grad_output

    def key(self) -> Key:
        """Return what a prepared call depends on."""
        g, x, w = self.grad_output, self.input, self.weight
        place = g.data_ptr() % ALIGNMENT, x.data_ptr() % ALIGNMENT
        return (
            Conv2dGradWeight, g.shape, g.stride(), g.dtype, g.device,
            x.shape, x.stride(), x.dtype, w.shape, w.stride(), self.conv, place,
        )  # fmt: skip

    def layer_key(self) -> Key:
        """Return what a layer's forward knows of it."""
        return conv_layer_keys(self.input, self.weight, self.conv, self.grad_output.dtype)[1]

    def problem(self, config: SDGPConfig) -> Problem:
        """Return its sizes with what the user chose."""
        g, w = self.grad_output, self.weight
        pixels = g.numel() // max(1, g.shape[1])
        sizes = g.shape[1] // self.conv.groups, w[0].numel(), pixels
        # What a stride reads has to be copied out; that copy is aligned.
        copied = self.conv.stride != (1, 1)
        order = "row" if copied else dense_order(convolution.pixels(self.input))
        return _conv_problem("grad_weight", sizes, g, w, self.conv, config, order)

    def plain(self) -> Tensor:
        """Return the weight gradient of grad_output."""
        wanted = (True, False)
        found = dense.dense_conv2d_grad_parameters(
            self.grad_output, self.input, self.weight, self.conv, wanted
        )[0]
        return torch.zeros_like(self.weight) if found is None else found

    def emulated(self, config: SDGPConfig) -> Tensor:
        """Return the weight gradient of prune(grad_output), computed densely."""
        return dense.conv2d_grad_weight(
            self.grad_output, self.input, self.weight, self.conv, config
        )

    def pruned(self, config: SDGPConfig) -> Tensor:
        """Return prune(grad_output along pixels)."""
        return emulation.prune_pixels(self.grad_output, config)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return [pixels, out_channels] and, of a 1x1 kernel, [pixels, in_channels]."""
        read = convolution.strided_input(self.input, self.grad_output, self.conv)
        return convolution.pixels(self.grad_output), convolution.pixels(read)

    @property
    def result_shape(self) -> tuple[int, ...] | None:
        """What the product can be written as, row by row."""
        return tuple(self.weight.shape)

    def finish(self, product: Tensor) -> Tensor:
        """Return [out_channels, in_channels, 1, 1]."""
        return product.view(self.weight.shape)

    def rival(self) -> Rival:
        """Return what it has to beat."""
        return MATMUL

    @property
    def rows_per_sample(self) -> int:
        """Pixels that are summed together: all."""
        return self.grad_output.numel() // max(1, self.grad_output.shape[1])


def conv_layer_keys(
    input: Tensor, weight: Tensor, conv: ConvGeometry, dtype: torch.dtype
) -> tuple[Key, Key]:
    """Return the ``layer_key`` of both products of a convolution, from its forward.

    Args:
        input: [N, in_channels, H, W].
        weight: [out_channels, in_channels / groups, kH, kW].
        conv: stride, padding, dilation, groups.
        dtype: in which the products run.
    """
    common = (input.shape, weight.shape, conv, dtype, input.device)
    return ("grad_input", *common), ("grad_weight", *common)


def conv_rival(
    grad_output: Tensor, weight: Tensor, input_like: Tensor, conv: ConvGeometry
) -> Rival:
    """Return what a sparse convolution has to beat: torch's own, on the same sizes.

    Args:
        grad_output: [N, out_channels, H_out, W_out]; only its sizes matter.
        weight: [out_channels, in_channels, 1, 1]; only its sizes matter.
        input_like: [N, in_channels, H, W]; only its sizes matter.
        conv: stride; the convolution is unpadded.
    """
    outputs, inputs, kernel = grad_output.shape, input_like.shape, weight.shape
    if outputs[2:] == inputs[2:]:
        return MATMUL

    def by_torch(left: Tensor, right: Tensor) -> Tensor:
        gradient = convolution.images(left, outputs[0], *outputs[2:])
        # Made in its format: converting it would be a copy that counts against dense in the race.
        last = torch.channels_last
        like = torch.empty(inputs, dtype=left.dtype, device=left.device, memory_format=last)
        return dense.dense_conv2d_grad_input(gradient, right.view(kernel), like, conv)

    def finish(product: Tensor) -> Tensor:
        return convolution.spread(product, outputs, inputs, conv)

    name = f"conv {tuple(outputs)} x {tuple(kernel)} to {tuple(inputs)}, {conv}"
    return Rival(name, by_torch, finish)


def _conv_problem(
    product: Product,
    sizes: tuple[int, int, int],
    grad_output: Tensor,
    weight: Tensor,
    conv: ConvGeometry,
    config: SDGPConfig,
    order: Literal["row", "col"] | None,
) -> Problem:
    return Problem(
        product,
        *sizes,
        grad_output.dtype,
        grad_output.device,
        config,
        conv,
        (weight.shape[2], weight.shape[3]),
        grad_output.is_contiguous(memory_format=torch.channels_last),
        order,
    )
