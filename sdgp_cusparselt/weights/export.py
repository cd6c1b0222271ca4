"""export_: a model for inference whose 2:4 weights exist packed and nowhere else."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sdgp_cusparselt.backends.masking import INPUTS, largest
from sdgp_cusparselt.errors import type_error, value_error
from sdgp_cusparselt.layers.convert import is_head, unwrapped
from sdgp_cusparselt.layers.modules import SDGPModule, check_releasable, release_, sdgp_class_of
from sdgp_cusparselt.layers.unsuitable import output_layers
from sdgp_cusparselt.layers.weight_masks import as_outputs_inputs, effective_weight
from sdgp_cusparselt.packing.layout import OPERAND_MULTIPLE
from sdgp_cusparselt.packing.packed import Packed24, buffer_nbytes
from sdgp_cusparselt.recording.records import LayerRecord
from sdgp_cusparselt.weights.packed_linear import (
    KINDS,
    STORED,
    PackedConv1D,
    PackedConv2d,
    PackedLinear,
    packed_of,
)

ExportDtype = Literal["same", "bf16", "fp16", "int8", "fp8"]
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
FilterFn = Callable[[nn.Module, str], bool]


@dataclass
class ExportReport:
    """What ``export_`` did; printing it gives a summary.

    Attributes:
        exported: fully qualified name -> what is needed to make the layer again without its weight:
            kind, in_features, out_features, weight (dtype), compute (dtype), bias. Plain JSON.
        left: fully qualified name -> why that layer is as it was.
        packed_nbytes: bytes of the packed weights and scales.
        dense_nbytes: bytes that the same weights take in 16 bits.
    """

    exported: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    packed_nbytes: int = 0
    dense_nbytes: int = 0

    def __str__(self) -> str:
        """Return counts, bytes, and why which layer was left."""
        share = self.packed_nbytes / max(self.dense_nbytes, 1)
        lines = [
            f"{len(self.exported)} layers exported, {len(self.left)} left; "
            f"{self.packed_nbytes} bytes, {share:.4f} of 16-bit weights"
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"  {reason}: {', '.join(names)}" for reason, names in reasons.items()]
        return "\n".join(lines)


def export_(
    model: nn.Module,
    *,
    dtype: ExportDtype = "same",
    prune: bool = False,
    filter_fn: FilterFn | None = None,
) -> ExportReport:
    """Replace 2:4 weights of a model by packed ones for inference, in place.

    output = input @ W.T + bias, W packed: 9 of 16 bits' bytes a weight, 5 of 16 in int8 and fp8

    Layers that ``convert_`` gave a pruned weight are exported with the weight that their products
    use; in a model without any, layers whose weight is 2:4 by itself. Every other converted layer
    becomes its plain class again.

    Args:
        model: any module.
        dtype: of the values: "same" as the layer's (float32 is stored as bfloat16), bf16, fp16,
            int8 (a scale for each output, activations scaled for each token), or fp8 (e4m3,
            likewise).
        prune: prune by magnitude what is not 2:4; else that is refused.
        filter_fn: (module, fully qualified name) -> whether to export the layer; without it heads
            are left, as ``convert_`` does.

    Returns:
        ExportReport: its ``exported`` is what ``load_exported_`` builds the layers from.

    Raises:
        TypeError: model is no module, or prune no bool.
        ValueError: an unknown dtype, a weight to be exported that is not 2:4, or nothing to export.
            The model is then unchanged.

    Note:
        An exported layer has no Parameter but its bias. It computes input's gradient, too, by
        unpacking; its weight does not train.
    """
    _check_arguments(model, dtype, prune)
    inner, report = unwrapped(model), ExportReport()
    chosen = _chosen(inner, report, filter_fn)
    weights: dict[str, Tensor] = {}
    for name, layer in chosen.items():
        reason = _reason_against(layer, dtype)
        if reason:
            report.left[name] = reason
            continue
        weight = _weight_24(name, layer, prune)
        if weight is None and isinstance(layer, SDGPModule):
            raise _not_24(name)
        if weight is None:
            report.left[name] = "its weight is not 2:4"
        else:
            weights[name] = weight
    if not weights:
        raise _nothing(report)
    for _, layer in inner.named_modules():
        if isinstance(layer, SDGPModule):
            check_releasable("export_", layer)
    with torch.no_grad():
        for name, layer in list(inner.named_modules()):
            if name in weights:
                _become_packed(name, layer, weights.pop(name), dtype, report)
            elif isinstance(layer, SDGPModule):
                _bake(layer)
    return report


def packed_like_(model: nn.Module, exported: dict[str, dict[str, Any]]) -> None:
    """Replace layers of a model by empty packed ones, whose weights a state dict then fills.

    Args:
        model: as the exported one was built; may be on the meta device.
        exported: ``ExportReport.exported``.

    Raises:
        ValueError: the model has no such layer, or one of another size. It is then unchanged.
    """
    layers = dict(unwrapped(model).named_modules())
    for name, about in exported.items():
        layer = layers.get(name)
        kind = None if layer is None else _kind_of(layer)
        sizes = None if layer is None or kind is None else tuple(_outputs_inputs(layer).shape[:2])
        if kind is None or kind.kind != about["kind"]:
            rule, fix = f"one with a {about['kind']} layer {name!r}", "Build it as it was exported."
            got = "none" if layer is None else type(layer).__name__
            raise value_error("load_exported_", "model", rule, got, fix)
        if sizes != (about["out_features"], about["in_features"]):
            rule = f"one whose {name!r} is {about['out_features']} x {about['in_features']}"
            raise value_error(
                "load_exported_", "model", rule, sizes, "Build it as it was exported."
            )
    for name, about in exported.items():
        layer = layers[name]
        weight: Any = layer.weight
        dtype = getattr(torch, about["weight"])
        shape = about["out_features"], about["in_features"]
        size = buffer_nbytes(shape, dtype, STORED)
        buffer = torch.zeros(size, dtype=torch.uint8, device=weight.device)
        scale = None
        if dtype.itemsize == 1:
            scale = torch.ones(shape[0], dtype=torch.float32, device=weight.device)
        if isinstance(layer, SDGPModule):
            release_(layer)
        stored = Packed24(buffer, shape, dtype, STORED)
        _replace(name, layer, stored, scale, getattr(torch, about["compute"]))


def _check_arguments(model: object, dtype: str, prune: object) -> None:
    if not isinstance(model, nn.Module):
        fix = "Pass the model itself."
        raise type_error("export_", "model", "an nn.Module", type(model).__name__, fix)
    if dtype not in get_args(ExportDtype):
        rule = f"one of {', '.join(get_args(ExportDtype))}"
        raise value_error("export_", "dtype", rule, repr(dtype), "Pick one of these.")
    if not isinstance(prune, bool):
        raise type_error("export_", "prune", "a bool", repr(prune), "True prunes by magnitude.")


def _chosen(
    model: nn.Module, report: ExportReport, filter_fn: FilterFn | None
) -> dict[str, nn.Module]:
    """Return the layers that are to be exported; why others are not goes into the report."""
    layers = {n: layer for n, layer in model.named_modules() if _kind_of(layer) is not None}
    pruned = [n for n, layer in layers.items() if _prunes_weight(layer)]
    heads = output_layers(model)
    chosen = {}
    for name, layer in layers.items():
        if filter_fn is not None:
            reason = "" if filter_fn(layer, name) else "left out by filter_fn"
        elif pruned:
            reason = "" if name in pruned else "its weight is not pruned"
        else:
            reason = "makes the model's outputs" if is_head(name) or layer in heads else ""
        if reason:
            report.left[name] = reason
        else:
            chosen[name] = layer
    return chosen


def _prunes_weight(layer: nn.Module) -> bool:
    return isinstance(layer, SDGPModule) and layer.sdgp_config.masks_weight


def _kind_of(layer: nn.Module) -> type[PackedLinear] | None:
    """Return what a layer becomes, or None where it is of another kind."""
    dense = layer.sdgp_dense_class if isinstance(layer, SDGPModule) else type(layer)
    if dense is nn.Linear:
        return PackedLinear
    if dense is nn.Conv2d:
        return PackedConv2d
    is_conv1d = isinstance(layer, SDGPModule) or sdgp_class_of(layer) is not None
    return PackedConv1D if is_conv1d else None


def _outputs_inputs(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.detach()
    return as_outputs_inputs(layer, weight)


def _reason_against(layer: Any, dtype: ExportDtype) -> str:
    """Return why no sparse product could use the layer's weight, or ""."""
    if isinstance(layer, nn.Conv2d):
        plain = (layer.kernel_size, layer.stride, layer.padding, layer.groups)
        if plain != ((1, 1), (1, 1), (0, 0), 1):
            return "only an unpadded 1x1 convolution of stride 1 is one product"
    weight = _outputs_inputs(layer)
    multiple = OPERAND_MULTIPLE[_value_dtype(weight, dtype).itemsize]
    outputs, inputs = weight.shape[:2]
    if outputs % multiple or inputs % multiple:
        return f"its {outputs} x {inputs} weight has a side that is no multiple of {multiple}"
    return ""


def _value_dtype(weight: Tensor, dtype: ExportDtype) -> torch.dtype:
    if dtype != "same":
        return DTYPES[dtype]
    return torch.float16 if weight.dtype == torch.float16 else torch.bfloat16


def _weight_24(name: str, layer: Any, prune: bool) -> Tensor | None:
    """Return the weight [O, I] that the layer uses, 2:4, or None where it is not."""
    used = effective_weight(layer) if isinstance(layer, SDGPModule) else layer.weight.detach()
    weight = as_outputs_inputs(layer, used).flatten(1)
    kept = largest(weight, 2, 4, INPUTS)
    return kept if prune or torch.equal(kept, weight) else None


def _not_24(name: str) -> ValueError:
    fix = "Train it with weight_n=2, weight_m=4 and weight_beta=0, or pass prune=True."
    return value_error("export_", "model", f"2:4 in {name or '(root)'}", "another weight", fix)


def _nothing(report: ExportReport) -> ValueError:
    seen = "; ".join(f"{name or '(root)'}: {why}" for name, why in list(report.left.items())[:4])
    rule = "one with a layer whose weight is 2:4"
    fix = "Prune it first (docs/sparse-weights.md), or pass prune=True."
    return value_error("export_", "model", rule, seen or "none", fix)


def _become_packed(
    name: str, layer: Any, weight: Tensor, dtype: ExportDtype, report: ExportReport
) -> None:
    compute = layer.weight.dtype
    if isinstance(layer, SDGPModule):
        release_(layer)
    stored, scale = packed_of(weight, _value_dtype(weight, dtype))
    report.packed_nbytes += stored.nbytes + (0 if scale is None else 4 * scale.numel())
    report.dense_nbytes += 2 * weight.numel()
    packed = _replace(name, layer, stored, scale, compute)
    report.exported[name] = {
        "kind": packed.kind,
        "out_features": packed.out_features,
        "in_features": packed.in_features,
        "weight": str(packed.weight_dtype).removeprefix("torch."),
        "compute": str(compute).removeprefix("torch."),
        "bias": packed.bias is not None,
    }


def _replace(
    name: str, layer: Any, stored: Packed24, scale: Tensor | None, compute: torch.dtype
) -> PackedLinear:
    """Turn a plain layer into a packed one: the same object, so hooks and references hold."""
    kind = _kind_of(layer)
    assert kind is not None and kind in KINDS.values()
    bias = layer.bias
    for attribute in [
        key for key in layer.__dict__ if not key.startswith("_") and key != "training"
    ]:
        del layer.__dict__[attribute]
    layer._parameters.pop("weight")
    layer.__class__ = kind
    packed: PackedLinear = layer
    packed.out_features, packed.in_features = stored.shape
    packed.weight_dtype, packed.compute_dtype = stored.dtype, compute
    packed.sdgp_record = LayerRecord(name or kind.__name__)
    packed.take_(stored, scale)
    if bias is not None and scale is None and bias.dtype != stored.dtype:
        bias.data = bias.data.to(stored.dtype)
    return packed


def _bake(layer: Any) -> None:
    """Make a converted layer that is not exported its plain class, with the weight that it uses."""
    if _prunes_weight(layer):
        layer.weight.copy_(effective_weight(layer))
    release_(layer)
