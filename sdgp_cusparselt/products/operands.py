"""The products of a pruned backward pass as value objects: what goes in, and all it can become.

grad_input  = prune(grad_output) @ weight, or the transposed convolution of it
grad_weight = prune(grad_output along tokens).T @ input

All four have the same methods:

- ``key()``: what a prepared call depends on besides the configuration; no tensor's values.
- ``layer_key()``: the same as far as a layer's forward knows it.
- ``problem(config)``: sizes and choices, for the rules of support.
- ``plain()``: the product of the unpruned gradient, by the calls that autograd itself makes.
- ``emulated(config)``: the product of the pruned gradient, its zeros multiplied densely.
- ``pruned(config)``: that gradient.
- ``matrices()``: the gradient [M, K], of grad_weight [K, M], and the operand [K, N].
- ``memory``: names of the two operands that are read, where the matrices lie in their memory.
- ``result_shape``: the shape as which a product [M, N] is the result, or None.
- ``finish(product)``: [M, N] in the shape and memory format of the result.
- ``rival()``: what a sparse product has to beat.
- ``rows_per_sample``: tokens over which rescaled_magnitude sums.
"""

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
class LinearGradInput:
    """grad_input = prune(grad_output) @ weight: [..., K] @ [K, N] -> [..., N].

    Attributes:
        grad_output: [..., K] with K = out_features.
        weight: [K, N] with N = in_features, any strides.
    """

    grad_output: Tensor
    weight: Tensor
    product: ClassVar[Product] = "grad_input"
    memory: ClassVar = ("grad_output", "weight")

    def key(self) -> Key:
        """Return what a prepared call depends on."""
        g, w = self.grad_output, self.weight
        place = g.data_ptr() % ALIGNMENT, w.data_ptr() % ALIGNMENT
        return (
            LinearGradInput, g.shape, g.stride(), g.dtype, g.device,
            w.shape, w.stride(), w.dtype, place,
        )  # fmt: skip

    def layer_key(self) -> Key:
        """Return what a layer's forward knows of it."""
        g, w = self.grad_output, self.weight
        tokens = g.numel() // max(1, w.shape[0])
        return ("grad_input", tokens, w.shape, w.stride(), g.dtype, g.device)

    def problem(self, config: SDGPConfig) -> Problem:
        """Return its sizes with what the user chose."""
        g, (k, n) = self.grad_output, self.weight.shape
        order = dense_order(self.weight)
        return Problem(
            "grad_input", g.numel() // max(k, 1), n, k, g.dtype, g.device, config, dense_order=order
        )

    def plain(self) -> Tensor:
        """Return grad_output @ weight."""
        return dense.dense_linear_grad_input(self.grad_output, self.weight)

    def emulated(self, config: SDGPConfig) -> Tensor:
        """Return prune(grad_output) @ weight, multiplied densely."""
        return dense.linear_grad_input(self.grad_output, self.weight, config)

    def pruned(self, config: SDGPConfig) -> Tensor:
        """Return prune(grad_output)."""
        return emulation.prune_features(self.grad_output, config)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return [M, K] and [K, N]."""
        return self.grad_output.reshape(-1, self.grad_output.shape[-1]), self.weight

    @property
    def result_shape(self) -> tuple[int, ...] | None:
        """What the product can be written as, row by row."""
        return (*self.grad_output.shape[:-1], self.weight.shape[1])

    def finish(self, product: Tensor) -> Tensor:
        """Return [..., N]."""
        return product.view(*self.grad_output.shape[:-1], self.weight.shape[1])

    def rival(self) -> Rival:
        """Return what it has to beat."""
        return MATMUL

    @property
    def rows_per_sample(self) -> int:
        """Tokens of one sample: those of a 2-D gradient are all of one."""
        shape = self.grad_output.shape
        tokens = self.grad_output.numel() // max(1, shape[-1])
        return tokens if len(shape) <= 2 else tokens // max(1, shape[0])


@dataclass(slots=True, eq=False)
class LinearGradWeight:
    """grad_weight = prune(grad_output along tokens).T @ input: [K, M].T @ [K, N] -> [M, N].

    Attributes:
        grad_output: [K, M] with K = tokens, M = out_features.
        input: [K, N] with N = in_features.
        row_major: whether the weight is; torch's own product depends on it, to the bit.
    """

    grad_output: Tensor
    input: Tensor
    row_major: bool = True
    product: ClassVar[Product] = "grad_weight"
    memory: ClassVar = ("grad_output", "input")

    def key(self) -> Key:
        """Return what a prepared call depends on."""
        g, x = self.grad_output, self.input
        place = g.data_ptr() % ALIGNMENT, x.data_ptr() % ALIGNMENT
        return (
            LinearGradWeight, g.shape, g.stride(), g.dtype, g.device,
            x.shape, x.stride(), x.dtype, self.row_major, place,
        )  # fmt: skip

    def layer_key(self) -> Key:
        """Return what a layer's forward knows of it."""
        g, x = self.grad_output, self.input
        return ("grad_weight", g.shape[0], (g.shape[1], x.shape[1]), g.dtype, g.device)

    def problem(self, config: SDGPConfig) -> Problem:
        """Return its sizes with what the user chose."""
        g, x = self.grad_output, self.input
        (k, m), order = g.shape, dense_order(x)
        return Problem(
            "grad_weight", m, x.shape[1], k, g.dtype, g.device, config, dense_order=order
        )

    def plain(self) -> Tensor:
        """Return grad_output.T @ input."""
        if self.row_major:
            return self.grad_output.t().mm(self.input)
        return self.input.t().mm(self.grad_output).t()

    def emulated(self, config: SDGPConfig) -> Tensor:
        """Return prune(grad_output along tokens).T @ input, multiplied densely."""
        return dense.linear_grad_weight(self.grad_output, self.input, config)

    def pruned(self, config: SDGPConfig) -> Tensor:
        """Return prune(grad_output along tokens)."""
        return emulation.prune_tokens(self.grad_output, config)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return [K, M] and [K, N]."""
        return self.grad_output, self.input

    @property
    def result_shape(self) -> tuple[int, ...] | None:
        """What the product can be written as, row by row."""
        return (self.grad_output.shape[1], self.input.shape[1])

    def finish(self, product: Tensor) -> Tensor:
        """Return [M, N]."""
        return product

    def rival(self) -> Rival:
        """Return what it has to beat."""
        return MATMUL

    @property
    def rows_per_sample(self) -> int:
        """Tokens of one sample: all."""
        return self.grad_output.shape[0]


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
    memory: ClassVar = ("grad_output", "weight")

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
    memory: ClassVar = ("grad_output", "input")

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


Operands = LinearGradInput | LinearGradWeight | Conv2dGradInput | Conv2dGradWeight


def linear_layer_keys(input: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Key, Key]:
    """Return the ``layer_key`` of both products of a linear layer, from its forward.

    Args:
        input: [..., in_features].
        weight: [out_features, in_features].
        dtype: in which the products run.
    """
    tokens, shape, device = input.numel() // max(1, weight.shape[1]), weight.shape, input.device
    return (
        ("grad_input", tokens, shape, weight.stride(), dtype, device),
        ("grad_weight", tokens, shape, dtype, device),
    )


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
