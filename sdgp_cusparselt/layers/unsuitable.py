"""Layers that multiply weights and stay plain whatever their name: other kinds, heads, adapters."""

from torch import nn

#: torch's own layers with a product whose backward this package does not prune.
_OTHER_KINDS = (nn.modules.conv._ConvNd, nn.RNNBase, nn.Bilinear)


def why_other_kind(module: nn.Module) -> str:
    """Return why a module that is no Linear, Conv2d or Conv1D stays plain; "" if it has no product.

    Args:
        module: any module; only its own parameters count, not those of its children.
    """
    if isinstance(module, _OTHER_KINDS):
        return f"{type(module).__name__} has no pruned backward here"
    for name, parameter in module.named_parameters(recurse=False):
        # A first dimension of 1 is broadcast: position embeddings and class tokens have it.
        if parameter.dim() == 3 and parameter.shape[0] > 1:
            sizes = " x ".join(map(str, parameter.shape))
            return f"its weights are one parameter of many experts ({name}, {sizes}), not layers"
    return ""


def output_layers(model: nn.Module) -> set[nn.Module]:
    """Return the layers that a model or a part of it names as its output embeddings.

    Args:
        model: any module; transformers' models have ``get_output_embeddings``.
    """
    found = set()
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        try:
            layer = get() if callable(get) else None
        except NotImplementedError:  # what composite models of transformers say
            continue
        if isinstance(layer, nn.Module):
            found.add(layer)
    return found


def adapters(model: nn.Module) -> set[nn.Module]:
    """Return the modules inside PEFT's adapters, which it names in ``adapter_layer_names``.

    Args:
        model: any module; adapters are as narrow as their rank, too narrow to gain.
    """
    found: set[nn.Module] = set()
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            part = getattr(module, name, None)
            if isinstance(part, nn.Module):
                found.update(part.modules())
    return found
