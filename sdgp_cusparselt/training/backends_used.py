"""Which backend computed the data gradients of a model."""

from torch import nn

from sdgp_cusparselt.nn import SDGPModule

#: Layers that are not converted leave their backward pass to torch.
AUTOGRAD = "torch autograd"


def backends_used(model: nn.Module) -> list[str]:
    """Return the backends that ran grad_input in any layer so far, sorted by name.

    A model without converted layers, or whose converted layers did not prune, answers with
    ``torch autograd``.
    """
    names = {
        backend
        for module in model.modules()
        if isinstance(module, SDGPModule)
        for product, backend in module.sdgp_record.calls
        if product == "grad_input"
    }
    return sorted(names) or [AUTOGRAD]
