"""Which backend computed the data gradients of a model."""

from torch import nn

from sdgp_cusparselt.dispatch import LayerRecord

#: Layers that are not converted leave their backward pass to torch.
AUTOGRAD = "torch autograd"


def backends_used(model: nn.Module) -> list[str]:
    """Return the backends that ran grad_input in any layer so far, sorted by name.

    A model without converted layers, or whose converted layers did not prune, answers with
    ``torch autograd``.
    """
    records = (getattr(module, "record", None) for module in model.modules())
    names = {
        backend
        for record in records
        if isinstance(record, LayerRecord)
        for product, backend in record.calls
        if product == "grad_input"
    }
    return sorted(names) or [AUTOGRAD]
