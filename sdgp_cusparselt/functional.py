"""sdgp.functional: linear and conv2d with a pruned data gradient."""

from sdgp_cusparselt.layers.functional import conv2d, linear

__all__ = ["conv2d", "linear"]
