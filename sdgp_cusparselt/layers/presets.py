"""Presets: which layers of a transformer are pruned, by what they do to the residual stream.

readers:  grad_input of the layers that READ the residual stream (qkv, up, gate)
balanced: the same, and grad_weight of readers and writers, both by mvue
all:      grad_input of every layer that ``convert_`` takes

Writers (attention output, down) see the gradient of the stream itself. On a small GPT most of what
pruning costs comes from them: docs/numerics.md has the measurements.
"""

import glob
from collections.abc import Iterator
from typing import Literal, get_args

from torch import nn

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import value_error

Preset = Literal["all", "readers", "balanced"]
Role = Literal["reader", "writer"]

#: Last parts of layers' names: (readers, writers) as the families spell them.
_NAMES = (
    ("c_attn q_attn c_fc", "c_proj"),  # GPT-2
    ("q_proj k_proj v_proj gate_proj up_proj", "o_proj out_proj down_proj"),  # Llama, Qwen, OPT
    ("qkv_proj gate_up_proj Wqkv", "wo"),  # Phi, ModernBERT
    ("query key value intermediate.dense", "output.dense"),  # BERT, ViT
    ("query_key_value dense_h_to_4h", "attention.dense self_attention.dense dense_4h_to_h"),  # NeoX
    ("q k v wi wi_0 wi_1", "o wo"),  # T5
    ("w1 w3", "w2"),  # Mixtral's experts
    ("qkv fc1 linear1 up", "proj fc2 linear2 down"),  # timm, torch, this project's own
)
READERS = frozenset(" ".join(readers for readers, _ in _NAMES).split())
WRITERS = frozenset(" ".join(writers for _, writers in _NAMES).split())
#: Readers that attention alone has: a model with one has a residual stream. torch's own attention
#: has none, its projection being no module.
_OF_ATTENTION = READERS - {
    *("c_fc", "gate_proj", "up_proj", "gate_up_proj", "intermediate.dense", "dense_h_to_4h"),
    *("wi", "wi_0", "wi_1", "w1", "w3", "fc1", "linear1", "up"),
}
_RULES = {
    "readers": "it writes the residual stream: preset 'readers' prunes what reads it",
    "unknown": "preset {!r} does not know whether it reads or writes the residual stream",
}


def role_of(name: str) -> Role | None:
    """Return whether a layer reads or writes the residual stream, by its name.

    Args:
        name: fully qualified name.

    Returns:
        "reader", "writer", or None for a name that no known transformer uses.
    """
    parts = _parts(name)
    for end in (".".join(parts[-2:]), *parts[-1:]):
        if end in READERS:
            return "reader"
        if end in WRITERS:
            return "writer"
    return None


def default_preset(model: nn.Module) -> Preset:
    """Return what ``convert_`` does where nobody says which layers: readers, of a transformer.

    On a small GPT pruning every layer takes 12 % more steps to the same loss, more than a step of
    any model is predicted to gain; pruning readers takes 2 %: docs/numerics.md has the numbers.

    Args:
        model: not converted.

    Returns:
        "readers" where a layer is named as attention's are, or is torch's attention; else "all".
    """
    readers = [name for name in _names_of_linears(model) if role_of(name) == "reader"]
    attends = any(_parts(name)[-1] in _OF_ATTENTION for name in readers)
    has_torchs = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    return "readers" if readers and (attends or has_torchs) else "all"


def configs_of(
    model: nn.Module, preset: Preset, config: SDGPConfig
) -> tuple[dict[str, SDGPConfig | None], dict[str, str]]:
    """Return what a preset makes of each linear layer of a model.

    Args:
        model: a transformer, not converted.
        preset: all, readers or balanced.
        config: what layers prune with; balanced adds grad_weight="sparse".

    Returns:
        Pattern of each layer's name -> its configuration, None to leave it alone; and name ->
        reason, for those.

    Raises:
        ValueError: the preset is unknown, or the model has no layer that reads a residual stream.
    """
    if preset not in get_args(Preset):
        rule = f"one of {', '.join(get_args(Preset))}"
        raise value_error("convert_", "preset", rule, repr(preset), "Pick one of these.")
    if preset == "all":
        return {"*": config}, {}
    both = config.replace(grad_weight="sparse") if preset == "balanced" else config
    weight_only = both.replace(prune="none", heavy_tokens=0.0) if preset == "balanced" else None
    chosen: dict[str, SDGPConfig | None] = {}
    reasons: dict[str, str] = {}
    for name in _names_of_linears(model):
        role = role_of(name)
        own = {"reader": both, "writer": weight_only, None: None}[role]
        chosen[glob.escape(name)] = own
        if own is None:
            reasons[name] = _RULES["unknown" if role is None else preset].format(preset)
    if not any(own is not None and own.prune != "none" for own in chosen.values()):
        fix = 'Use preset="all", or name patterns: convert_(model, {"*.up": config}).'
        got = "one without a layer of a known name"
        raise value_error("convert_", "model", f"a transformer for preset {preset!r}", got, fix)
    return chosen, reasons


def _parts(name: str) -> list[str]:
    """Return the parts of a layer's name, without what adapters add around the layer."""
    parts = [part for part in name.split(".") if part]
    return parts[:-1] if parts[-1:] == ["base_layer"] else parts


def _names_of_linears(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield name
