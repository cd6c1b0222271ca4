"""2:4 weights: masks, recipes that train them, and what a layer holds of them."""

from sdgp_cusparselt.weights.masks import (
    magnitude_scores,
    nm_mask,
    transposable_mask,
    unstructured_mask,
)
from sdgp_cusparselt.weights.recipes import (
    FST,
    SRSTE,
    MaskDecay,
    Mishra,
    OneShot,
    SLoPe,
    StructureDecay,
    Unstructured,
    WeightRecipe,
)
from sdgp_cusparselt.weights.sparsify import finish_, mask_gradients_, set_masks_, sparsify_
from sdgp_cusparselt.weights.wanda import InputNorms

__all__ = [
    "FST",
    "SRSTE",
    "InputNorms",
    "MaskDecay",
    "Mishra",
    "OneShot",
    "SLoPe",
    "StructureDecay",
    "Unstructured",
    "WeightRecipe",
    "finish_",
    "magnitude_scores",
    "mask_gradients_",
    "nm_mask",
    "set_masks_",
    "sparsify_",
    "transposable_mask",
    "unstructured_mask",
]
