"""sdgp.functional: linear, conv2d, mlp and gated_mlp with pruned data gradients."""

from sdgp_cusparselt.layers.functional import conv2d, linear
from sdgp_cusparselt.layers.mlp import gated_mlp, mlp

__all__ = ["conv2d", "gated_mlp", "linear", "mlp"]
