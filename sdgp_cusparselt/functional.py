"""sdgp.functional: linear, conv2d and a head's cross-entropy with pruned gradients."""

from sdgp_cusparselt.layers.cross_entropy import linear_cross_entropy
from sdgp_cusparselt.layers.functional import conv2d, linear

__all__ = ["conv2d", "linear", "linear_cross_entropy"]
