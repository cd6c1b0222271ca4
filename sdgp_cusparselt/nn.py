"""sdgp.nn: torch's and Hugging Face's layers with a pruned backward."""

from sdgp_cusparselt.layers.modules import SDGPConv1D, SDGPConv2d, SDGPLinear, SDGPModule

__all__ = ["SDGPConv1D", "SDGPConv2d", "SDGPLinear", "SDGPModule"]
