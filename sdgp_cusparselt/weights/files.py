"""Exported models in safetensors files: save_exported, load_exported_."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.layers.convert import unwrapped
from sdgp_cusparselt.weights.export import packed_like_
from sdgp_cusparselt.weights.packed_linear import PackedLinear

#: Key of the file's metadata under which its layers are described.
KEY = "sdgp_exported"


def save_exported(model: nn.Module, path: str | Path) -> None:
    """Write an exported model to a safetensors file, with what ``load_exported_`` needs.

    Args:
        model: that ``export_`` changed.
        path: of the file, written anew.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: no layer of the model is exported.
    """
    from safetensors.torch import save_model

    inner = unwrapped(model)
    about = {name: _about(m) for name, m in inner.named_modules() if isinstance(m, PackedLinear)}
    if not about:
        fix = "Call sdgp.export_(model) first."
        raise value_error("save_exported", "model", "exported", "one without packed layers", fix)
    save_model(inner, str(path), metadata={KEY: json.dumps(about)})


def load_exported_(model: nn.Module, path: str | Path) -> list[str]:
    """Load an exported model: replace the layers that were packed, and fill all from the file.

    Args:
        model: built as the exported one was, its weights anything.
        path: of a file that ``save_exported`` wrote.

    Returns:
        Names of the packed layers.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is none of these, or the model is another one; it is then unchanged.
        RuntimeError: torch's own, where other layers of the model differ.
    """
    from safetensors import safe_open
    from safetensors.torch import load_model

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    if KEY not in metadata:
        rule, fix = "a file that save_exported wrote", "Use safetensors for other files."
        raise value_error("load_exported_", "path", rule, str(path), fix)
    about: dict[str, dict[str, Any]] = json.loads(metadata[KEY])
    inner = unwrapped(model)
    packed_like_(inner, about)
    load_model(inner, str(path))
    return list(about)


def _about(layer: PackedLinear) -> dict[str, Any]:
    return {
        "kind": layer.kind,
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "weight": str(layer.weight_dtype).removeprefix("torch."),
        "compute": str(layer.compute_dtype).removeprefix("torch."),
        "bias": layer.bias is not None,
    }
