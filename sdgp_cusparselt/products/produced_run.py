"""Run layers behind a producer by a straight line, where one was prepared for their like."""

from dataclasses import replace

import torch
from torch import Tensor

from sdgp_cusparselt.backends.base import Product
from sdgp_cusparselt.backends.plans import ALIGNMENT
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.devices import is_capturing
from sdgp_cusparselt.errors import PlanStateError
from sdgp_cusparselt.products import prepared, routes
from sdgp_cusparselt.products.dispatch import FAILURES
from sdgp_cusparselt.products.maker_check import maker_for
from sdgp_cusparselt.products.makers import kind_of
from sdgp_cusparselt.products.operands import LinearGradInput, LinearGradWeight
from sdgp_cusparselt.products.prepared import Key, PreparedCall
from sdgp_cusparselt.products.produced_layers import (
    FusedLinear,
    LayerGradients,
    Needs,
    apart,
    ordinary,
    pruned_of,
    tokens_of,
)
from sdgp_cusparselt.products.produced_line import ProducedLine, asked_of, usable
from sdgp_cusparselt.products.routes import REFUSALS
from sdgp_cusparselt.products.sparse import SparseProduct
from sdgp_cusparselt.pruning.producers import ActivationBackward, Producer
from sdgp_cusparselt.recording.records import LayerRecord
from sdgp_cusparselt.tuning import recorder

#: Kept for a kind of call that no kernel makes.
UNFUSED = object()
_PRODUCTS: tuple[Product, Product] = ("grad_input", "grad_weight")


def run_produced(producer: Producer, layers: tuple[FusedLinear, ...]) -> tuple[LayerGradients, ...]:
    """Return the gradients of plain tensors; see ``produced.produced_grads``."""
    key = _key(producer, layers)
    line = prepared.calls.produced.get(key)
    if line is None:
        grad_outputs = producer.gradients()
        found = apart(grad_outputs, layers)
        _prepare(key, producer, grad_outputs, layers)
        return found
    if line is not UNFUSED and not recorder.ACTIVE and not any(_broken(one) for one in layers):
        try:
            return _by_line(line, producer, layers)
        except PlanStateError:  # a plan was evicted
            prepared.drop(key)
        except FAILURES as error:
            prepared.bar(key, error)
    return apart(producer.gradients(), layers)


def _by_line(
    line: ProducedLine, producer: Producer, layers: tuple[FusedLinear, ...]
) -> tuple[LayerGradients, ...]:
    """Return the gradients by a straight line, and count what ran sparse."""
    leading = gradient_shape(producer)[:-1]

    def rest(number: int, dense: Tensor) -> tuple[Tensor | None, Tensor | None]:
        layer, (first, second) = layers[number], line.pairs[number]
        needs = Needs(
            layer.needs.input and first is None, layer.needs.weight and second is None, False
        )
        found = ordinary(dense.view(*leading, -1), replace(layer, needs=needs))
        return found.input, found.weight

    operands = [(one.weight, None if one.input is None else tokens_of(one.input)) for one in layers]
    made = line(producer, operands, rest)
    found = []
    for layer, pair, (grad_input, grad_weight, bias) in zip(layers, line.pairs, made, strict=True):
        record = _record(layer)
        for product, one in zip(_PRODUCTS, pair, strict=True):
            if one is not None:
                record.calls[product, "sparse"] += 1
        if grad_input is not None:
            grad_input = grad_input.view(*leading, grad_input.shape[-1])
        found.append(LayerGradients(grad_input, grad_weight, bias if layer.needs.bias else None))
    return tuple(found)


def _prepare(
    key: Key,
    producer: Producer,
    grad_outputs: tuple[Tensor, ...],
    layers: tuple[FusedLinear, ...],
) -> None:
    """Keep a line for the next call of a kind, or that there is none, once the routes are known."""
    singles = [_singles(g, layer) for g, layer in zip(grad_outputs, layers, strict=True)]
    known = [call for pair in singles for call in pair if call is not None]
    if any(call.watched or call.uses != routes.FOR_EVER for call in known):
        return
    if is_capturing(grad_outputs[0].device):
        return
    pairs = [
        tuple(None if call is None else usable(call.sparse) for call in pair) for pair in singles
    ]
    line = None
    if not prepared.is_barred(key):
        try:
            line = _line(producer, grad_outputs[0], layers, [(one[0], one[1]) for one in pairs])
        except REFUSALS:
            line = None
    prepared.keep_produced(key, UNFUSED if line is None else line)


def _line(
    producer: Producer,
    grad_output: Tensor,
    layers: tuple[FusedLinear, ...],
    pairs: list[tuple[SparseProduct | None, SparseProduct | None]],
) -> ProducedLine | None:
    flat = tokens_of(grad_output)
    lacks = [
        (layer.needs.input and first is None) or (layer.needs.weight and second is None)
        for layer, (first, second) in zip(layers, pairs, strict=True)
    ]
    sums = any(layer.needs.bias for layer in layers)
    asked = asked_of(pairs, flat.shape[0], any(lacks), sums)
    packs = any(line is not None for pair in pairs for line in pair)
    # Without packing the kernel saves something on a GPU alone, where the twin is several passes.
    kind = kind_of(producer)
    several = kind.gated or kind.masked or kind.name in ("relu_squared", "cross_entropy")
    if asked is None or not (packs or (flat.is_cuda and several)):
        return None
    maker = maker_for(producer, asked)
    if maker is None:
        return None
    shape = (flat.shape[0], flat.shape[1])
    return ProducedLine(maker, asked, pairs, shape, flat.dtype, flat.device)


def _singles(
    grad_output: Tensor, layer: FusedLinear
) -> tuple[PreparedCall | None, PreparedCall | None]:
    """Return the calls that a layer's products were prepared as, None where nothing is pruned."""
    prunes, sparse_weight = layer.pruned or pruned_of(layer.config)
    assert isinstance(layer.config, SDGPConfig)
    text, first, second = layer.config.text, None, None
    if layer.needs.input and prunes and layer.weight is not None:
        operands = LinearGradInput(grad_output, layer.weight)
        first = prepared.calls.single.get((operands.key(), text))
    if layer.needs.weight and sparse_weight and layer.input is not None:
        flat, tokens = tokens_of(grad_output), tokens_of(layer.input)
        turned = LinearGradWeight(flat, tokens, layer.row_major)
        second = prepared.calls.single.get((turned.key(), text))
    return first, second


def _key(producer: Producer, layers: tuple[FusedLinear, ...]) -> Key:
    """Return what a line depends on."""
    found: list[object] = [kind_of(producer)]
    if isinstance(producer, ActivationBackward):
        found.append(producer.scale)
        tensors: tuple[Tensor | None, ...] = (
            producer.upstream,
            producer.pre,
            producer.up,
            producer.mask,
        )
    else:
        found.append(producer.label_smoothing > 0)
        tensors = (producer.logits, None, None, None)
    for layer in layers:
        assert isinstance(layer.config, SDGPConfig)
        found += [layer.config.text, layer.needs, layer.row_major]
        tensors += (layer.weight, layer.input)
    for t in tensors:
        if t is None:
            found.append(None)
        else:
            place = t.data_ptr() % ALIGNMENT
            found += [t.shape, t.stride(), t.dtype, t.device, place]
    return tuple(found)


def gradient_shape(producer: Producer) -> torch.Size:
    """Return the shape [..., K] of the gradients that a producer makes."""
    if isinstance(producer, ActivationBackward):
        return producer.upstream.shape
    return producer.logits.shape


def _record(layer: FusedLinear) -> LayerRecord:
    assert isinstance(layer.record, LayerRecord)
    return layer.record


def _broken(layer: FusedLinear) -> bool:
    return bool(_record(layer).broken)
