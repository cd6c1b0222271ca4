"""Structured Data Gradient Pruning (SDGP) on 2:4 sparse tensor cores.

output      = input         @ weight.T    dense
grad_input  = prune(grad_output) @ weight    2 of 4 along out_features, on sparse tensor cores
grad_weight = grad_output.T @ input       dense, or 2 of 4 along tokens
"""

__version__ = "0.1.0"
