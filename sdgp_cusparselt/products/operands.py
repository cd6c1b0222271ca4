"""The products of a layer as value objects: what goes in, and all that it can become.

grad_input  = prune(grad_output) @ weight, or the transposed convolution of it
grad_weight = prune(grad_output along tokens).T @ input

and with a 2:4 weight, see ``weight_operands``: output, and grad_input. All have the same methods:

- ``key()``: what a prepared call depends on besides the configuration; no tensor's values.
- ``layer_key()``: the same as far as a layer's forward knows it.
- ``problem(config)``: sizes and choices, for the rules of support.
- ``plain()``: the product of the unpruned gradient, by the calls that autograd itself makes.
- ``emulated(config)``: the product of the pruned gradient, its zeros multiplied densely.
- ``pruned(config)``: that gradient.
- ``matrices()``: the gradient [M, K], of grad_weight [K, M], and the operand [K, N].
- ``finish(product)``: [M, N], of a weight [N, M], in the shape and memory format of the result.
- ``rival()``: what a sparse product has to beat.
- ``structured``: the operand that is 2:4, "grad_output" or "weight".
- ``activations``: the operand that comes anew with every call.

Those of a pruned gradient besides:

- ``memory``: names of the two operands that are read, where the matrices lie in their memory.
- ``result_shape``: the shape as which a product [M, N] is the result, or None.
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
from sdgp_cusparselt.products.weight_operands import (
    Conv2dOutput,
    Conv2dWeightGradInput,
    LinearOutput,
    LinearWeightGradInput,
)

#: With a 2:4 gradient.
GradientOperands = LinearGradInput | LinearGradWeight | Conv2dGradInput | Conv2dGradWeight
#: With a 2:4 weight.
OfWeight = LinearOutput | LinearWeightGradInput | Conv2dOutput | Conv2dWeightGradInput
Operands = GradientOperands | OfWeight

__all__ = [
    "Conv2dGradInput",
    "Conv2dGradWeight",
    "Conv2dOutput",
    "Conv2dWeightGradInput",
    "GradientOperands",
    "Key",
    "LinearGradInput",
    "LinearGradWeight",
    "LinearOutput",
    "LinearWeightGradInput",
    "OfWeight",
    "Operands",
    "conv_layer_keys",
    "conv_rival",
    "linear_layer_keys",
]
