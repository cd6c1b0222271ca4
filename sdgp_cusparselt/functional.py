"""sdgp.functional: linear, conv2d, mlp, gated_mlp and a head's loss with pruned gradients."""

from sdgp_cusparselt.layers.cross_entropy import linear_cross_entropy
from sdgp_cusparselt.layers.functional import conv2d, linear
from sdgp_cusparselt.layers.mlp import gated_mlp, mlp

__all__ = ["conv2d", "gated_mlp", "linear", "linear_cross_entropy", "mlp"]
