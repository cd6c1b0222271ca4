"""The compression layer: prune and pack 2:4 operands in whatever order the library reads."""

from sdgp_cusparselt.packing.layout import MetadataLayout, default_layout
from sdgp_cusparselt.packing.pack import PackedGradient, matmul, pack, pack_gradient
from sdgp_cusparselt.packing.packed import Packed24
from sdgp_cusparselt.packing.prune import prune_dense

__all__ = [
    "MetadataLayout",
    "Packed24",
    "PackedGradient",
    "default_layout",
    "matmul",
    "pack",
    "pack_gradient",
    "prune_dense",
]
