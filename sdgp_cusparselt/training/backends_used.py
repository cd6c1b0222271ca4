"""Which backend computed the pruned gradients of a model."""

from torch import nn

from sdgp_cusparselt.layers.modules import SDGPModule

#: Layers that are not converted leave their backward pass to torch.
AUTOGRAD = "torch autograd"


def backends_used(model: nn.Module) -> list[str]:
    """Return the backends that ran a pruned product in any layer so far, sorted by name.

    A model without converted layers, or whose converted layers did not prune, answers with
    ``torch autograd``.
    """
    names = {
        backend
        for module in model.modules()
        if isinstance(module, SDGPModule)
        for _, backend in module.sdgp_record.calls
    }
    return sorted(names) or [AUTOGRAD]
