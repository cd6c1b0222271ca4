"""A product with its sizes and its user's choices: what support is decided by."""

from dataclasses import dataclass
from typing import Literal

import torch

from sdgp_cusparselt.config.choices import SDGPConfig

Product = Literal["output", "grad_input", "grad_weight"]
#: sparse: pruned, packed, on sparse tensor cores. plain: torch's own product of the unpruned
#: gradient. emulated: pruned, its zeros multiplied like everything else. A pruned weight is pruned
#: in all three: there plain and emulated are one function, torch's product with its zeros.
Way = Literal["sparse", "plain", "emulated"]


@dataclass(frozen=True)
class ConvGeometry:
    """The part of a convolution that its tensors do not tell."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Problem:
    """One product of a layer, as the GEMM [M, N] = [M, K] @ [K, N] with K reduced.

    grad_input:  M = tokens or pixels, K = out_features (of one conv group), N = in_features
    grad_weight: M = out_features, K = tokens or pixels, N = in_features

    With a 2:4 weight as the left operand:

    output:      M = out_features, K = in_features, N = tokens or pixels
    grad_input:  M = in_features, K = out_features, N = tokens or pixels

    Attributes:
        product: which of the three.
        m: rows of the pruned operand; heavy tokens have two.
        n: columns of the result.
        k: reduced dimension, along which the groups run.
        dtype: of both operands.
        device: of both operands.
        config: what the user chose.
        conv: geometry if the layer is a convolution, else None.
        kernel_size: of that convolution.
        channels_last: whether the convolution's grad_output lies in memory pixel by pixel.
        dense_order: "row" or "col", how the [K, N] operand lies in memory; None where the library
            cannot read it.
        structured: which operand is 2:4, and on the left.
    """

    product: Product
    m: int
    n: int
    k: int
    dtype: torch.dtype
    device: torch.device
    config: SDGPConfig
    conv: ConvGeometry | None = None
    kernel_size: tuple[int, int] = (1, 1)
    channels_last: bool = True
    dense_order: Literal["row", "col"] | None = "row"
    structured: Literal["grad_output", "weight"] = "grad_output"

    @property
    def method(self) -> str:
        """How its left operand is pruned; a weight is packed ahead, by magnitude or a mask."""
        if self.structured == "weight":
            return "magnitude"
        return method_of(self.product, self.config)

    @property
    def packed_method(self) -> str:
        """How the packer prunes it; 1:4 is pruned beforehand and packed as it is."""
        if self.structured == "weight":
            return "magnitude"
        return self.method if (self.config.n, self.config.m) == (2, 4) else "none"

    def describe(self) -> str:
        """Return the product's inputs, one per line, for an error message."""
        lines = [
            f"  product: {self.product}, [M={self.m}, K={self.k}] @ [K={self.k}, N={self.n}]",
            f"  dtype: {self.dtype}, device: {self.device}",
            f"  pruning: {self.config.describe()}",
        ]
        if self.conv is not None:
            layout = "channels_last" if self.channels_last else "contiguous"
            lines.append(f"  convolution: kernel_size={self.kernel_size}, {self.conv}, {layout}")
        return "\n".join(lines)


def method_of(product: Product, config: SDGPConfig) -> str:
    """Return how a configuration prunes the gradient for a product."""
    return config.prune if product == "grad_input" else config.grad_weight_prune
