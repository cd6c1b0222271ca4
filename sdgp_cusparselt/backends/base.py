"""What a backend answers: can it run this product, and if not, why not."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdgp_cusparselt.backends.gemm import Candidate
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.config.patterns import STOCHASTIC

Product = Literal["grad_input", "grad_weight"]


@dataclass(frozen=True)
class ConvGeometry:
    """The part of a convolution that its tensors do not tell."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Problem:
    """One product of a backward pass, as the GEMM [M, N] = [M, K] @ [K, N] with K reduced.

    grad_input:  M = tokens or pixels, K = out_features (of one conv group), N = in_features
    grad_weight: M = out_features, K = tokens or pixels, N = in_features

    Attributes:
        product: which of the two.
        m: rows of the pruned operand.
        n: columns of the result.
        k: reduced dimension, along which the groups run.
        dtype: of both operands.
        device: of both operands.
        conv: geometry if the layer is a convolution, else None.
        kernel_size: of that convolution.
        channels_last: whether the convolution's grad_output lies in memory pixel by pixel.
        config: what the user chose.
        dense_order: "row" or "col", how the [K, N] operand lies in memory.
        spatial: sizes of a convolution's grad_output, and height and width of its input.
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
    dense_order: Literal["row", "col"] = "row"
    spatial: tuple[int, ...] = ()

    @property
    def draws(self) -> bool:
        """Whether its pruning draws random numbers."""
        config = self.config
        method = config.prune if self.product == "grad_input" else config.grad_weight_prune
        return method in STOCHASTIC

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


class Backend(ABC):
    """One way of computing the products of a pruned backward pass.

    Every product takes ``candidate``, which a backend with several algorithms is told to use; the
    others ignore it.
    """

    name: str

    @abstractmethod
    def machine_reasons(self) -> list[str]:
        """Return why this backend cannot run on this machine at all; empty if it can."""

    @abstractmethod
    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Return why this backend cannot run ``problem`` on this machine; empty if it can."""

    @abstractmethod
    def linear_grad_input(
        self,
        grad_output: Tensor,
        weight: Tensor,
        config: SDGPConfig,
        candidate: Candidate | None = None,
    ) -> Tensor:
        """Return prune(grad_output) @ weight.

        Args:
            grad_output: [..., K] with K = out_features.
            weight: [K, N] with N = in_features, any strides.
            config: how to prune.
            candidate: how to multiply, where there is a choice.

        Returns:
            [..., N], grad_output's dtype.
        """

    @abstractmethod
    def linear_grad_weight(
        self,
        grad_output: Tensor,
        input: Tensor,
        config: SDGPConfig,
        candidate: Candidate | None = None,
    ) -> Tensor:
        """Return prune(grad_output along tokens).T @ input.

        Args:
            grad_output: [tokens, out_features].
            input: [tokens, in_features].
            config: how to prune.
            candidate: how to multiply, where there is a choice.

        Returns:
            [out_features, in_features], grad_output's dtype.
        """

    @abstractmethod
    def conv2d_grad_input(
        self,
        grad_output: Tensor,
        weight: Tensor,
        input_like: Tensor,
        conv: ConvGeometry,
        config: SDGPConfig,
        candidate: Candidate | None = None,
    ) -> Tensor:
        """Return the transposed convolution of prune(grad_output along channels) with weight.

        Args:
            grad_output: [N, out_channels, H_out, W_out].
            weight: [out_channels, in_channels / groups, kH, kW].
            input_like: [N, in_channels, H, W] whose sizes and strides the result takes; its
                values are not read.
            conv: stride, padding, dilation, groups.
            config: how to prune.
            candidate: how to multiply, where there is a choice.

        Returns:
            Tensor like input_like, grad_output's dtype.
        """

    @abstractmethod
    def conv2d_grad_weight(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        conv: ConvGeometry,
        config: SDGPConfig,
        candidate: Candidate | None = None,
    ) -> Tensor:
        """Return the weight gradient from grad_output pruned along its pixels.

        Args:
            grad_output: [N, out_channels, H_out, W_out].
            input: [N, in_channels, H, W].
            weight: [out_channels, in_channels / groups, kH, kW]; only its shape matters.
            conv: stride, padding, dilation, groups.
            config: how to prune.
            candidate: how to multiply, where there is a choice.

        Returns:
            Tensor of weight's shape, grad_output's dtype.
        """
