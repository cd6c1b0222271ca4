"""The products with a 2:4 weight as value objects: what goes in, and all that it can become.

output     = input       @ W.T     W [O, I] pruned along I
grad_input = grad_output @ W       W pruned along O as well

For the library both are [M, N] = packed [M, K] @ activations.T [K, N] with tokens as N, column by
column: that is activations and results as they lie in memory. Besides the methods that
``operands`` lists, each has

- ``pruned_weight``: the weight, and what is kept of it.
- ``along``: the dimension of the weight that the product reduces.
- ``tokens()``: the activations [N, K] in memory as they are.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sdgp_cusparselt.backends import convolution, dense
from sdgp_cusparselt.backends.base import ConvGeometry, Problem, Product
from sdgp_cusparselt.backends.masking import INPUTS, OUTPUTS
from sdgp_cusparselt.backends.plans import ALIGNMENT, dense_order, padded_columns
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.products.packed_weights import PrunedWeight
from sdgp_cusparselt.tuning import LINEAR, Rival

Key = tuple[object, ...]
#: Which operand is 2:4, as ``Problem`` names it.
Structured = Literal["grad_output", "weight"]


class WeightOperands:
    """What the four products with a 2:4 weight share."""

    activations: Tensor
    pruned_weight: PrunedWeight
    product: ClassVar[Product]
    along: ClassVar[int]
    structured: ClassVar[Structured] = "weight"
    #: Of convolutions.
    conv: ConvGeometry | None = None

    def tokens(self) -> Tensor:
        """Return the activations as [tokens, K]."""
        x = self.activations
        return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])

    def weight(self) -> Tensor:
        """Return the dense weight of the product, pruned."""
        kept = self.pruned_weight
        return kept.dense() if self.along == INPUTS else kept.dense_twice()

    def key(self) -> Key:
        """Return what a prepared call depends on."""
        x = self.activations
        return (
            type(self), x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % ALIGNMENT,
            self.pruned_weight.shape, self.conv,
        )  # fmt: skip

    def layer_key(self) -> Key:
        """Return the same: a layer's forward asks nothing of these products."""
        return self.key()

    def problem(self, config: SDGPConfig) -> Problem:
        """Return its sizes with what the user chose."""
        x, shape = self.tokens(), self.pruned_weight.shape
        outputs, inputs = shape[:2]
        m, k = (outputs, inputs) if self.along == INPUTS else (inputs, outputs)
        # What is padded is copied, row by row.
        padded = padded_columns(x.shape[0], x.dtype) != x.shape[0]
        return Problem(
            self.product,
            m,
            x.shape[0],
            k,
            x.dtype,
            x.device,
            config,
            conv=self.conv,
            kernel_size=(1, 1) if len(shape) == 2 else (shape[2], shape[3]),
            channels_last=self._channels_last(),
            dense_order="col" if padded else dense_order(x.t()),
            structured="weight",
        )

    def emulated(self, config: SDGPConfig) -> Tensor:
        """Return what ``plain`` does: the pruned weight is all that there is."""
        return self.plain()

    def plain(self) -> Tensor:
        """Return torch's product with the pruned weight."""
        raise NotImplementedError

    def finish(self, result: Tensor) -> Tensor:
        """Return [tokens, M] in the shape and memory format of the result."""
        raise NotImplementedError

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return the pruned operand [M, K] and the activations [K, N]."""
        weight = self.weight().flatten(1)
        return (weight if self.along == INPUTS else weight.t()), self.tokens().t()

    def rival(self) -> Rival:
        """Return what it has to beat."""
        return LINEAR

    def _channels_last(self) -> bool:
        return True


@dataclass(slots=True, eq=False)
class LinearOutput(WeightOperands):
    """output = input @ W.T + bias.

    Attributes:
        activations: input, [..., I].
        pruned_weight: W, [O, I].
        bias: [O] or None.
    """

    activations: Tensor
    pruned_weight: PrunedWeight
    bias: Tensor | None = None
    product: ClassVar[Product] = "output"
    along: ClassVar[int] = INPUTS

    def plain(self) -> Tensor:
        """Return torch's linear with W."""
        return F.linear(self.activations, self.weight(), self.bias)

    def finish(self, result: Tensor) -> Tensor:
        """Return [..., O] from [tokens, O]."""
        out = result.view(*self.activations.shape[:-1], result.shape[1])
        return out if self.bias is None else out.add_(self.bias)


@dataclass(slots=True, eq=False)
class LinearWeightGradInput(WeightOperands):
    """grad_input = grad_output @ W, W pruned both ways.

    Attributes:
        activations: grad_output, [..., O].
        pruned_weight: W, [O, I].
    """

    activations: Tensor
    pruned_weight: PrunedWeight
    product: ClassVar[Product] = "grad_input"
    along: ClassVar[int] = OUTPUTS

    def plain(self) -> Tensor:
        """Return torch's product with W."""
        return dense.dense_linear_grad_input(self.activations, self.weight())

    def finish(self, result: Tensor) -> Tensor:
        """Return [..., I] from [tokens, I]."""
        return result.view(*self.activations.shape[:-1], result.shape[1])


@dataclass(slots=True, eq=False)
class NarrowOutput(LinearOutput):
    """output = input @ W.T of int8 in int32, or of fp8 in float32; exact, but for fp8's sum.

    Attributes:
        activations: input, int8 or fp8 [..., I].
        pruned_weight: W, of the same dtype, [O, I].
    """

    def plain(self) -> Tensor:
        """Return torch's product of the same numbers, in a dtype that holds every sum."""
        x, w = self.tokens(), self.weight()
        if x.dtype == torch.int8:
            # Exact: |sum| <= K 2**14, below 2**53 for every K that is stored.
            product = (x.double() @ w.double().t()).to(torch.int32)
        else:
            product = x.float() @ w.float().t()
        return self.finish(product)


class _ConvOperands(WeightOperands):
    """Activations are images [N, C, H, W], tokens their pixels."""

    def tokens(self) -> Tensor:
        """Return the pixels as [pixels, channels]: a view of channels_last memory."""
        return convolution.pixels(self.activations)

    def _channels_last(self) -> bool:
        return self.activations.is_contiguous(memory_format=torch.channels_last)

    def _images(self, result: Tensor) -> Tensor:
        batch, _, height, width = self.activations.shape
        return convolution.images(result, batch, height, width)


@dataclass(slots=True, eq=False)
class Conv2dOutput(_ConvOperands):
    """output = conv2d(input, W) + bias.

    Attributes:
        activations: input, [N, I, H, W].
        pruned_weight: W, [O, I / groups, kH, kW].
        conv: stride, padding, dilation, groups.
        bias: [O] or None.
    """

    activations: Tensor
    pruned_weight: PrunedWeight
    conv: ConvGeometry
    bias: Tensor | None = None
    product: ClassVar[Product] = "output"
    along: ClassVar[int] = INPUTS

    def plain(self) -> Tensor:
        """Return torch's convolution with W."""
        c = self.conv
        images, weight = self.activations, self.weight()
        return F.conv2d(images, weight, self.bias, c.stride, c.padding, c.dilation, c.groups)

    def finish(self, result: Tensor) -> Tensor:
        """Return [N, O, H, W] from [pixels, O]."""
        out = self._images(result)
        return out if self.bias is None else out.add_(self.bias.view(-1, 1, 1))


@dataclass(slots=True, eq=False)
class Conv2dWeightGradInput(_ConvOperands):
    """grad_input of a convolution with W, pruned both ways.

    Attributes:
        activations: grad_output, [N, O, H_out, W_out].
        pruned_weight: W, [O, I / groups, kH, kW].
        input_like: [N, I, H, W] whose sizes and strides the result takes.
        conv: stride, padding, dilation, groups.
    """

    activations: Tensor
    pruned_weight: PrunedWeight
    input_like: Tensor
    conv: ConvGeometry
    product: ClassVar[Product] = "grad_input"
    along: ClassVar[int] = OUTPUTS

    def key(self) -> Key:
        """Return what a prepared call depends on."""
        like = self.input_like
        return (*_ConvOperands.key(self), like.shape, like.stride())

    def plain(self) -> Tensor:
        """Return torch's transposed convolution with W."""
        return dense.dense_conv2d_grad_input(
            self.activations, self.weight(), self.input_like, self.conv
        )

    def finish(self, result: Tensor) -> Tensor:
        """Return [N, I, H, W] from [pixels, I]."""
        return self._images(result)
