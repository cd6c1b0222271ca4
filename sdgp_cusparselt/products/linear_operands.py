"""The two products of a linear layer as value objects; ``operands`` says what they share."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdgp_cusparselt.backends import dense, emulation
from sdgp_cusparselt.backends.base import Problem, Product
from sdgp_cusparselt.backends.plans import ALIGNMENT, dense_order
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.packing.heavy import heavy_capacity
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
    structured: ClassVar = "grad_output"
    memory: ClassVar = ("grad_output", "weight")

    @property
    def activations(self) -> Tensor:
        """What comes anew with every call: the gradient."""
        return self.grad_output

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
        tokens, order = g.numel() // max(k, 1), dense_order(self.weight)
        rows = tokens + heavy_capacity(tokens, config.heavy_tokens)
        return Problem("grad_input", rows, n, k, g.dtype, g.device, config, dense_order=order)

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
    structured: ClassVar = "grad_output"
    memory: ClassVar = ("grad_output", "input")

    @property
    def activations(self) -> Tensor:
        """What comes anew with every call: the gradient."""
        return self.grad_output

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
