"""The gradients of linear layers whose grad_output is made by a producer: an activation, a loss.

grad_output = producer(upstream, saved)
grad_input  = prune(grad_output) @ weight
grad_weight = prune(grad_output along tokens).T @ input, or grad_output.T @ input

What cannot be fused is what an ordinary converted layer does with the grad_output that plain torch
made.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.products.operators import as_operator
from sdgp_cusparselt.products.produced_layers import FusedLinear as FusedLinear
from sdgp_cusparselt.products.produced_layers import LayerGradients as LayerGradients
from sdgp_cusparselt.products.produced_layers import Needs as Needs
from sdgp_cusparselt.products.produced_layers import apart
from sdgp_cusparselt.products.produced_run import run_produced
from sdgp_cusparselt.pruning.producers import ActivationBackward, Producer
from sdgp_cusparselt.recording.records import record_of

#: Where compiled code calls the operator; elsewhere the compiler fuses the twin by itself.
OPAQUE_ON = ["cuda"]


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
    compiled = torch.compiler.is_compiling()
    if not compiled and not isinstance(layers[0].config, str):
        return run_produced(producer, layers)
    if isinstance(producer, ActivationBackward) and producer.upstream.device.type in OPAQUE_ON:
        texts = {layer.config for layer in layers}
        if len(texts) == 1 and isinstance(layers[0].config, str):
            return _by_operator(producer, layers, layers[0].config)
    return apart(producer.gradients(), layers)


def _by_operator(
    producer: ActivationBackward, layers: tuple[FusedLinear, ...], config: str
) -> tuple[LayerGradients, ...]:
    """Return the gradients by the operator that the compiler does not look into."""
    found = iter(
        activated_linear_grads(
            producer.activation,
            producer.upstream,
            producer.pre,
            producer.up,
            producer.mask,
            producer.scale,
            [layer.weight for layer in layers if layer.needs.input and layer.weight is not None],
            [layer.input for layer in layers if layer.needs.weight and layer.input is not None],
            [need for layer in layers for need in layer.needs],
            [layer.row_major for layer in layers],
            config,
            [layer.record for layer in layers],
        )
    )
    return tuple(
        LayerGradients(*[next(found) if need else None for need in layer.needs]) for layer in layers
    )


def _activated_linear_grads_fake(
    activation: str,
    upstream: Tensor,
    pre: Tensor,
    up: Tensor | None,
    mask: Tensor | None,
    scale: float,
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    row_major: Sequence[bool],
    config: str,
    tokens: Sequence[int],
) -> list[Tensor]:
    width = (weights or inputs)[0].shape[-1] if weights or inputs else 0
    found = []
    for number in range(len(tokens)):
        wants = needs[3 * number : 3 * number + 3]
        shapes = ((*upstream.shape[:-1], width), (upstream.shape[-1], width), upstream.shape[-1:])
        found += [upstream.new_empty(s) for s, want in zip(shapes, wants, strict=True) if want]
    return found


@as_operator(_activated_linear_grads_fake)
def activated_linear_grads(
    activation: str,
    upstream: Tensor,
    pre: Tensor,
    up: Tensor | None,
    mask: Tensor | None,
    scale: float,
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    row_major: Sequence[bool],
    config: str,
    tokens: Sequence[int],
) -> list[Tensor]:
    """Return the gradients that are needed of layers behind an activation, layer by layer.

    Args:
        activation, upstream, pre, up, mask, scale: see ``ActivationBackward``.
        weights: of the layers whose grad_input is needed.
        inputs: of the layers whose grad_weight is needed.
        needs: of input, weight and bias, for each layer.
        row_major: for each layer.
        config: of all layers, as text.
        tokens: of the layers' records.
    """
    held, read = iter(weights), iter(inputs)
    choices = SDGPConfig.from_text(config)
    layers = tuple(
        FusedLinear(
            next(held) if wants.input else None,
            next(read) if wants.weight else None,
            wants,
            row_major[number],
            choices,
            record_of(token),
        )
        for number, (token, wants) in enumerate(zip(tokens, _by_layer(needs), strict=True))
    )
    producer = ActivationBackward(activation, upstream, pre, up, mask, scale)
    made = run_produced(producer, layers)
    return [one.contiguous() for gradients in made for one in gradients if one is not None]


def _by_layer(needs: Sequence[bool]) -> Iterator[Needs]:
    for start in range(0, len(needs), 3):
        yield Needs(*needs[start : start + 3])
