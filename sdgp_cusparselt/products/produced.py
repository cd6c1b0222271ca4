"""The gradients of linear layers whose grad_output is made by a producer: an activation, a loss.

grad_output = producer(upstream, saved)
grad_input  = prune(grad_output) @ weight
grad_weight = prune(grad_output along tokens).T @ input, or grad_output.T @ input

What cannot be fused is what an ordinary converted layer does with the grad_output that plain torch
made.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdgp_cusparselt.backends.base import Product
from sdgp_cusparselt.backends.dense import dense_linear_grad_input
from sdgp_cusparselt.backends.plans import ALIGNMENT
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.devices import is_capturing
from sdgp_cusparselt.errors import PlanStateError
from sdgp_cusparselt.products import backward as products
from sdgp_cusparselt.products import operators as ops
from sdgp_cusparselt.products import prepared, routes
from sdgp_cusparselt.products.dispatch import FAILURES
from sdgp_cusparselt.products.maker_check import maker_for
from sdgp_cusparselt.products.makers import kind_of
from sdgp_cusparselt.products.operands import LinearGradInput, LinearGradWeight
from sdgp_cusparselt.products.prepared import Key, PreparedCall
from sdgp_cusparselt.products.produced_line import ProducedLine, asked_of, usable
from sdgp_cusparselt.products.routes import REFUSALS
from sdgp_cusparselt.products.sparse import SparseProduct
from sdgp_cusparselt.pruning.producers import ActivationBackward, Producer
from sdgp_cusparselt.recording.records import LayerRecord
from sdgp_cusparselt.tuning import recorder

#: Kept for a kind of call that no kernel makes.
UNFUSED = object()
_PRODUCTS: tuple[Product, Product] = ("grad_input", "grad_weight")


class Needs(NamedTuple):
    """Which gradients of a layer are asked for."""

    input: bool
    weight: bool
    bias: bool


class LayerGradients(NamedTuple):
    """The gradients of a layer, None where they were not asked for."""

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass(slots=True, eq=False)
class FusedLinear:
    """A linear layer whose output went into a producer.

    Attributes:
        weight: [out_features, in_features] in the dtype of the products, or None where
            grad_input is not needed.
        input: [..., in_features], or None where grad_weight is not needed.
        needs: which gradients are.
        row_major: whether the weight lies so in memory: torch's own product depends on it.
        config: how to prune; in a compiled backward its text.
        record: of the layer; in a compiled backward its token.
        pruned: whether grad_input and grad_weight are pruned; None looks it up in config, which a
            compiled backward cannot.
    """

    weight: Tensor | None
    input: Tensor | None
    needs: Needs
    row_major: bool
    config: SDGPConfig | str
    record: LayerRecord | int
    pruned: tuple[bool, bool] | None = None


def produced_grads(
    producer: Producer, layers: tuple[FusedLinear, ...]
) -> tuple[LayerGradients, ...]:
    """Return the gradients of the layers whose grad_outputs a producer makes, in its order.

    Args:
        producer: what makes them: one, or two if it is gated (first of pre's layer, then of up's).
        layers: as many.

    Returns:
        One LayerGradients for each layer; grad_input is [..., in_features].

    Raises:
        NotSupportedError, EquivalenceError: see ``dispatch.run``.
    """
    if torch.compiler.is_compiling() or isinstance(layers[0].config, str):
        return _apart(producer.gradients(), layers)
    key = _key(producer, layers)
    line = prepared.calls.produced.get(key)
    if line is None:
        grad_outputs = producer.gradients()
        found = _apart(grad_outputs, layers)
        _prepare(key, producer, grad_outputs, layers)
        return found
    if line is not UNFUSED and not recorder.ACTIVE and not any(_broken(one) for one in layers):
        try:
            return _by_line(line, producer, layers)
        except PlanStateError:  # a plan was evicted
            prepared.drop(key)
        except FAILURES as error:
            prepared.bar(key, error)
    return _apart(producer.gradients(), layers)


def _apart(
    grad_outputs: tuple[Tensor, ...], layers: tuple[FusedLinear, ...]
) -> tuple[LayerGradients, ...]:
    """Return what the layers' own backward would, of gradients that are there."""
    pairs = zip(grad_outputs, layers, strict=True)
    # From the last to the first, as autograd comes to them, so that the same numbers are drawn.
    return tuple([_ordinary(g, layer) for g, layer in list(pairs)[::-1]][::-1])


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
        found = _ordinary(dense.view(*leading, -1), replace(layer, needs=needs))
        return found.input, found.weight

    operands = [(one.weight, None if one.input is None else _tokens(one.input)) for one in layers]
    made = line(producer, operands, rest)
    found = []
    for layer, pair, (grad_input, grad_weight, bias) in zip(layers, line.pairs, made, strict=True):
        record = _record(layer)
        for product, one in zip(_PRODUCTS, pair, strict=True):
            if one is not None:
                record.calls[product, "sparse"] += 1
        if grad_input is not None:
            grad_input = grad_input.view(*leading, grad_input.shape[-1])
        found.append(LayerGradients(grad_input, grad_weight, bias))
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
    flat = _tokens(grad_output)
    lacks = [
        (layer.needs.input and first is None) or (layer.needs.weight and second is None)
        for layer, (first, second) in zip(layers, pairs, strict=True)
    ]
    sums = any(layer.needs.bias for layer in layers)
    asked = asked_of(pairs, flat.shape[0], any(lacks), sums)
    packs = any(line is not None for pair in pairs for line in pair)
    # On a CPU the twin alone saves nothing; on a GPU the kernel is one pass where it makes several.
    if asked is None or not (packs or flat.is_cuda):
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
    prunes, sparse_weight = layer.pruned or _pruned(layer.config)
    assert isinstance(layer.config, SDGPConfig)
    text, first, second = layer.config.text, None, None
    if layer.needs.input and prunes and layer.weight is not None:
        operands = LinearGradInput(grad_output, layer.weight)
        first = prepared.calls.single.get((operands.key(), text))
    if layer.needs.weight and sparse_weight and layer.input is not None:
        flat, tokens = _tokens(grad_output), _tokens(layer.input)
        turned = LinearGradWeight(flat, tokens, layer.row_major)
        second = prepared.calls.single.get((turned.key(), text))
    return first, second


def _key(producer: Producer, layers: tuple[FusedLinear, ...]) -> Key:
    """Return what a line depends on."""
    found: list[object] = [kind_of(producer)]
    if isinstance(producer, ActivationBackward):
        found.append(producer.scale)
        tensors = (producer.upstream, producer.pre, producer.up, producer.mask)
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


def _ordinary(grad_output: Tensor, layer: FusedLinear) -> LayerGradients:
    """Return what a converted layer's own backward would."""
    config, record = layer.config, layer.record
    calls: Any = products
    if torch.compiler.is_compiling() or isinstance(config, str):
        calls = ops
        config = config if isinstance(config, str) else config.text
        record = record if isinstance(record, int) else record.token
    prunes, sparse_weight = layer.pruned or _pruned(layer.config)
    need_input, need_weight, need_bias = layer.needs
    flat = _tokens(grad_output)
    tokens = None if layer.input is None or not need_weight else _tokens(layer.input)
    grad_input: Tensor | None = None
    grad_weight: Tensor | None = None
    if need_input and need_weight and prunes and sparse_weight:
        grad_input, grad_weight = calls.linear_grads(
            grad_output, layer.weight, tokens, config, record
        )
    else:
        if need_input:
            assert layer.weight is not None  # saved where grad_input is needed
            grad_input = (
                calls.linear_grad_input(grad_output, layer.weight, config, record)
                if prunes
                else dense_linear_grad_input(grad_output, layer.weight)
            )
        if tokens is not None:
            grad_weight = (
                calls.linear_grad_weight(flat, tokens, layer.row_major, config, record)
                if sparse_weight
                else _dense_grad_weight(flat, tokens, layer.row_major)
            )
    return LayerGradients(grad_input, grad_weight, flat.sum(0) if need_bias else None)


def _pruned(config: SDGPConfig | str) -> tuple[bool, bool]:
    choices = SDGPConfig.from_text(config) if isinstance(config, str) else config
    return choices.prunes, choices.grad_weight == "sparse"


def _tokens(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _dense_grad_weight(flat: Tensor, tokens: Tensor, row_major: bool) -> Tensor:
    # The same two products that autograd's own addmm backward chooses between, for equal bits.
    return flat.t().mm(tokens) if row_major else tokens.t().mm(flat).t()
