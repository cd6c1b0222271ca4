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

from sdgp_cusparselt.products.conv_operands import (
    Conv2dGradInput,
    Conv2dGradWeight,
    conv_layer_keys,
    conv_rival,
)
from sdgp_cusparselt.products.linear_operands import (
    Key,
    LinearGradInput,
    LinearGradWeight,
    linear_layer_keys,
)

Operands = LinearGradInput | LinearGradWeight | Conv2dGradInput | Conv2dGradWeight

__all__ = [
    "Conv2dGradInput",
    "Conv2dGradWeight",
    "Key",
    "LinearGradInput",
    "LinearGradWeight",
    "Operands",
    "conv_layer_keys",
    "conv_rival",
    "linear_layer_keys",
]
