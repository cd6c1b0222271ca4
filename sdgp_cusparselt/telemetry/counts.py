"""telemetry: what every converted layer did, as a table and as a dictionary."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from rich.console import Console
from rich.table import Table
from torch import nn

from sdgp_cusparselt.backends.base import Product
from sdgp_cusparselt.errors import type_error, value_error
from sdgp_cusparselt.layers.modules import SDGPModule
from sdgp_cusparselt.recording.records import LayerRecord

_TEXTS = ("layer", "product", "ran")
_NUMBERS = (
    "prune us",
    "pack us",
    "matmul us",
    "dense us",
    "total us",
    "rel. L2",
    "cosine",
    "kept L1",
)
_PARTS = ("prune", "pack", "matmul", "dense", "total")
_ERRORS = ("relative_l2", "cosine", "kept_l1")


@dataclass(frozen=True)
class Telemetry:
    """What ``telemetry`` read; printing it gives a table.

    Attributes:
        layers: one dictionary a layer and product: layer, product, calls (sparse, plain or emulated
            -> number), fallbacks (with reason, calls), median_us (part -> microseconds of the
            sampled calls) and gradient_error (relative_l2, cosine, kept_l1, samples) or None.
    """

    layers: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return {"layers": [dict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        """Return the table, and below it why which layer did not run sparse."""
        table = Table(box=None, pad_edge=False, title_justify="left")
        for column in _TEXTS:
            table.add_column(column, overflow="fold")
        for column in _NUMBERS:
            table.add_column(column, justify="right")
        for layer in self.layers:
            times, error = layer["median_us"], layer["gradient_error"] or {}
            ran = ", ".join(f"{name} x{calls}" for name, calls in layer["calls"].items())
            table.add_row(
                layer["layer"],
                layer["product"],
                ran,
                *(_number(times.get(part), ".1f") for part in _PARTS),
                *(_number(error.get(name), ".4f") for name in _ERRORS),
            )
        # A text, also where a terminal or a notebook would be drawn on.
        text = io.StringIO()
        console = Console(
            file=text, width=140, highlight=False, force_terminal=False, force_jupyter=False
        )
        console.print(table)
        for line in self._why():
            console.print(line)
        return text.getvalue().rstrip()

    def _why(self) -> Iterable[str]:
        for layer in self.layers:
            for fallback in layer["fallbacks"]:
                yield (
                    f"{layer['layer']} {layer['product']}: not sparse "
                    f"({fallback['calls']} calls) because {fallback['reason']}"
                )


def telemetry(model: nn.Module) -> Telemetry:
    """Return what every converted layer of a model did so far.

    Times and gradient errors are there for layers whose ``SDGPConfig.telemetry_every`` is not 0.

    Args:
        model: any module with converted layers.

    Returns:
        Telemetry: ``print`` it, or take ``as_dict()``. Waits for the device to read the samples.

    Raises:
        TypeError: model is no module.
        ValueError: it has no converted layer.
    """
    _check_module(model)
    layers = [(n, mod) for n, mod in model.named_modules() if isinstance(mod, SDGPModule)]
    if not layers:
        fix = "Call sdgp.convert_(model) first."
        raise value_error("telemetry", "model", "converted", "one without SDGP layers", fix)
    return Telemetry(
        tuple(
            _of_product(name or "(root)", module.sdgp_record, product)
            for name, module in layers
            for product in get_args(Product)
            if any(of == product for of, _ in module.sdgp_record.calls)
            or (product == "grad_input" and not module.sdgp_record.calls)
        )
    )


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        fix = "Pass the model itself."
        raise type_error("telemetry", "model", "an nn.Module", type(model).__name__, fix)


def _of_product(name: str, record: LayerRecord, product: str) -> dict[str, Any]:
    calls = {way: n for (of, way), n in list(record.calls.items()) if of == product}
    fallbacks = [
        {"reason": reason, "calls": n}
        for (of, reason), n in list(record.fallbacks.items())
        if of == product
    ]
    return {
        "layer": name,
        "product": product,
        "calls": calls,
        "fallbacks": fallbacks,
        "median_us": record.samples.median_us(product),
        "gradient_error": record.samples.gradient_error(product),
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
