"""N:M pruning in plain torch, and the ways that are fast on a CPU."""

from sdgp_cusparselt.pruning.methods import prune

__all__ = ["prune"]
