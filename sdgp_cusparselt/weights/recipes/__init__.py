"""Recipes that train 2:4 weights, one class for each paper."""

from sdgp_cusparselt.weights.recipes.base import RECIPES, WeightRecipe, recipe_from
from sdgp_cusparselt.weights.recipes.fst import FST
from sdgp_cusparselt.weights.recipes.kao import MaskDecay, StructureDecay
from sdgp_cusparselt.weights.recipes.one_shot import Mishra, OneShot, Unstructured
from sdgp_cusparselt.weights.recipes.slope import SLoPe
from sdgp_cusparselt.weights.recipes.sr_ste import SRSTE

__all__ = [
    "FST",
    "RECIPES",
    "SRSTE",
    "MaskDecay",
    "Mishra",
    "OneShot",
    "SLoPe",
    "StructureDecay",
    "Unstructured",
    "WeightRecipe",
    "recipe_from",
]
