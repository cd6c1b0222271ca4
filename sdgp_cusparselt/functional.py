"""sdgp.functional: linear, conv2d, MLPs and a head's cross-entropy with pruned gradients."""

from sdgp_cusparselt.layers.cross_entropy import linear_cross_entropy
from sdgp_cusparselt.layers.functional import conv2d, linear
from sdgp_cusparselt.layers.mlp import gated_mlp, mlp

__all__ = ["conv2d", "gated_mlp", "linear", "linear_cross_entropy", "mlp"]
