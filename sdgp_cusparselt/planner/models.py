"""From what the user names to a model on the meta device and its inputs; nothing is downloaded."""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.extras import require


@dataclass(frozen=True)
class Preset:
    """A well-known model: its transformers configuration, and the batch that it is planned with."""

    model_type: str
    config: Mapping[str, Any]
    batch: int
    sequence: int = 1024
    resolution: int = 224


PRESETS: dict[str, Preset] = {
    "resnet-50": Preset(
        "resnet",
        {
            "embedding_size": 64,
            "hidden_sizes": [256, 512, 1024, 2048],
            "depths": [3, 4, 6, 3],
            "layer_type": "bottleneck",
            "num_labels": 1000,
        },
        batch=256,
    ),
    "vit-l-16": Preset(
        "vit",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "image_size": 224,
            "patch_size": 16,
            "num_labels": 1000,
        },
        batch=64,
    ),
    "gpt2-medium": Preset(
        "gpt2",
        {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024, "vocab_size": 50257},
        batch=8,
    ),
    "llama-3-8b": Preset(
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
        batch=1,
        sequence=8192,
    ),
}


@dataclass(frozen=True)
class Problem:
    """A model ready to be traced: ``model(**inputs)`` runs on the meta device."""

    name: str
    model: nn.Module
    inputs: Mapping[str, Tensor] | list[Tensor] = field(repr=False)
    description: str


def load(
    spec: str,
    *,
    batch: int | None = None,
    sequence: int | None = None,
    resolution: int | None = None,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    """Build a model on the meta device.

    Args:
        spec: a preset (``resnet-50``), ``transformers:<model type>``,
            ``transformers:<config.json>``, or ``package.module:callable`` returning an nn.Module.
        batch: samples in a step.
        sequence: tokens in a sample, for models that read token ids.
        resolution: image edge in pixels, for models that read images.
        shape: of one sample, for ``module:callable`` models that read floating-point tensors.
        dtype: of weights and activations.

    Returns:
        The model in training mode and its inputs, both without memory.

    Raises:
        ValueError: the spec names nothing that can be built; the message lists the presets.
    """
    preset = PRESETS.get(spec)
    if preset is not None:
        batch = batch or preset.batch
        sequence = sequence or preset.sequence
        resolution = resolution or preset.resolution
        config = _transformers(spec).AutoConfig.for_model(preset.model_type, **preset.config)
        return _from_config(spec, config, batch, sequence, resolution, dtype)
    if spec.startswith("transformers:"):
        config = _read_config(spec.removeprefix("transformers:"))
        return _from_config(spec, config, batch or 8, sequence, resolution, dtype)
    module_name, separator, attribute = spec.partition(":")
    if not separator:
        raise value_error(
            "plan", "model", f"one of {', '.join(PRESETS)}", repr(spec), "Or name module:callable."
        )
    build = getattr(importlib.import_module(module_name), attribute)
    return _from_callable(spec, build, batch or 8, sequence, shape, dtype)


def _transformers(spec: str) -> Any:
    return require("transformers", package="transformers", purpose=f"the model {spec}")


def _read_config(source: str) -> Any:
    """Return a transformers configuration from a model type or a local JSON file."""
    auto = _transformers(source).AutoConfig
    values: dict[str, Any] = {"model_type": source}
    if source.endswith(".json"):
        values = json.loads(Path(source).read_text(encoding="utf-8"))
    model_type = values.pop("model_type", None)
    try:
        return auto.for_model(model_type, **values)
    except ValueError as error:
        fix = "Name a model type of transformers, or a config.json that has model_type."
        raise value_error("plan", "model", "a known model type", model_type, fix) from error


def _from_config(
    spec: str,
    config: Any,
    batch: int,
    sequence: int | None,
    resolution: int | None,
    dtype: torch.dtype,
) -> Problem:
    """Instantiate the training form of a configuration: language model or image classifier."""
    model = _auto_model(config)
    model = model.to(dtype).train()
    if model.main_input_name == "pixel_values":
        edge = resolution or int(getattr(config, "image_size", 224))
        image = torch.empty(batch, config.num_channels, edge, edge, dtype=dtype, device="meta")
        return Problem(spec, model, {"pixel_values": image}, f"batch {batch}, {edge} x {edge}")
    tokens = sequence or 1024
    ids = torch.empty(batch, tokens, dtype=torch.long, device="meta")
    return Problem(spec, model, {"input_ids": ids}, f"batch {batch}, sequence {tokens}")


def _auto_model(config: Any) -> Any:
    transformers = _transformers(config.model_type)
    for name in ("CausalLM", "ImageClassification", "MaskedLM"):
        auto = getattr(transformers, f"AutoModelFor{name}")
        try:
            with torch.device("meta"):
                return auto.from_config(config)
        except ValueError:  # what transformers raises when this head does not exist for the config
            continue
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


def _from_callable(
    spec: str,
    build: Callable[[], nn.Module],
    batch: int,
    sequence: int | None,
    shape: tuple[int, ...] | None,
    dtype: torch.dtype,
) -> Problem:
    """Call the user's factory on the meta device and make an input of the shape they name."""
    with torch.device("meta"):
        model = build().to(device="meta", dtype=dtype).train()
    if shape is not None:
        sample = torch.empty(batch, *shape, dtype=dtype, device="meta")
        text = " x ".join(map(str, shape))
        return Problem(spec, model, [sample], f"batch {batch}, {text}")
    if sequence is not None:
        ids = torch.empty(batch, sequence, dtype=torch.long, device="meta")
        return Problem(spec, model, [ids], f"batch {batch}, sequence {sequence}")
    raise value_error(
        "plan", "shape", "given for a module:callable model", None, "Add --shape or --sequence."
    )
