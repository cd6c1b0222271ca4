"""Which way the gradients of a model were computed."""

from torch import nn

from sdgp_cusparselt.layers.modules import SDGPModule

#: Layers that are not converted leave their backward pass to torch.
AUTOGRAD = "torch autograd"


def backends_used(model: nn.Module) -> list[str]:
    """Return the ways, sparse, plain or emulated, that any layer's products ran so far, sorted.

    A model without converted layers, or whose converted layers did not prune, answers with
    ``torch autograd``.
    """
    names = {
        way
        for module in model.modules()
        if isinstance(module, SDGPModule)
        for _, way in module.sdgp_record.calls
    }
    return sorted(names) or [AUTOGRAD]
