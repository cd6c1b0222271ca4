"""mlp and gated_mlp: linear layers around an activation whose backward is fused with pruning."""

from torch import Tensor
from torch.nn import functional as F

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.layers.autograd import pruned_linear
from sdgp_cusparselt.layers.functional import NO_RECORD, check, linear
from sdgp_cusparselt.layers.fused import Part, activated_linear, can_fuse
from sdgp_cusparselt.layers.plain import linear_prunes
from sdgp_cusparselt.pruning import producers
from sdgp_cusparselt.recording.records import LayerRecord


def mlp(
    input: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    activation: str = "gelu",
    dropout: float = 0.0,
    training: bool = True,
    config: SDGPConfig,
    down_config: SDGPConfig | None = None,
    record: LayerRecord | None = None,
    down_record: LayerRecord | None = None,
) -> Tensor:
    """Apply two linear layers around an activation, whose backward is fused with the pruning.

    pre      = input @ up_weight.T + up_bias
    output   = dropout(act(pre)) @ down_weight.T + down_bias
    grad_pre = (prune(grad_output) @ down_weight) * mask * act'(pre), never written where all that
    reads it is packed;  grad_input = prune(grad_pre) @ up_weight

    Args:
        input: [..., in_features] float, any strides.
        up_weight: [hidden_features, in_features], any strides.
        up_bias: [hidden_features] or None.
        down_weight: [out_features, hidden_features], any strides.
        down_bias: [out_features] or None.
        activation: gelu, gelu_tanh, silu, relu or relu_squared.
        dropout: probability with which a hidden feature is set to zero, 0 to 1.
        training: False draws nothing and drops nothing.
        config: how the gradient of pre is pruned, and on what backend.
        down_config: the same for the gradient of the output; as config if None.
        record: where calls and fallbacks of the first layer are counted; a shared one if None.
        down_record: the same for the second layer.

    Returns:
        [..., out_features].

    Raises:
        TypeError: a configuration is no SDGPConfig, or it prunes and an operand is complex.
        ValueError: a configuration has a schedule, the activation is unknown, or dropout is no
            probability.
        NotSupportedError, SDGPError: as ``linear``.

    Note:
        The gradients are those of the separate layers within the rounding that is saved where the
        mask is applied. Kept for backward: the input, pre (of relu its output), the mask, and what
        the second layer multiplies.

    Source:
        SDGP (arXiv 2202.00774) for the pruning; the backward of the activation is torch's.
    """
    _check("mlp", activation, dropout)
    down_config = config if down_config is None else down_config
    check("mlp", config, input, up_weight)
    check("mlp", down_config, input, down_weight)
    p = dropout if training else 0.0
    first = Part(up_weight, up_bias, config, record or NO_RECORD)
    hidden = _hidden(input, (first,), activation, p)
    return linear(hidden, down_weight, down_bias, config=down_config, record=down_record)


def gated_mlp(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    dropout: float = 0.0,
    training: bool = True,
    config: SDGPConfig,
    up_config: SDGPConfig | None = None,
    down_config: SDGPConfig | None = None,
    record: LayerRecord | None = None,
    up_record: LayerRecord | None = None,
    down_record: LayerRecord | None = None,
) -> Tensor:
    """Apply a gated MLP, such as Llama's, whose gate's backward is fused with the pruning.

    gate, up = input @ gate_weight.T, input @ up_weight.T          (each with its bias, if any)
    output   = dropout(act(gate) * up) @ down_weight.T + down_bias
    grad_gate, grad_up from one kernel that packs both as it makes them

    Args:
        input: [..., in_features] float, any strides.
        gate_weight: [hidden_features, in_features], any strides.
        up_weight: as gate_weight.
        down_weight: [out_features, hidden_features], any strides.
        gate_bias: [hidden_features] or None.
        up_bias: as gate_bias.
        down_bias: [out_features] or None.
        activation: of the gate: gelu, gelu_tanh, silu, relu or relu_squared.
        dropout: probability with which a hidden feature is set to zero, 0 to 1.
        training: False draws nothing and drops nothing.
        config: how the gradient of gate is pruned, and on what backend.
        up_config: the same for that of up; as config if None.
        down_config: the same for that of the output; as config if None.
        record: where calls and fallbacks of the gate's layer are counted; a shared one if None.
        up_record: the same for the layer of up.
        down_record: the same for the layer of the output.

    Returns:
        [..., out_features].

    Raises:
        TypeError, ValueError, NotSupportedError, SDGPError: as ``mlp``.

    Note:
        Kept for backward: the input, gate, up, the mask, and what the last layer multiplies; the
        separate layers keep act(gate), too.
    """
    _check("gated_mlp", activation, dropout)
    up_config = config if up_config is None else up_config
    down_config = config if down_config is None else down_config
    for own, weight in zip(
        (config, up_config, down_config), (gate_weight, up_weight, down_weight), strict=True
    ):
        check("gated_mlp", own, input, weight)
    gate = Part(gate_weight, gate_bias, config, record or NO_RECORD)
    up = Part(up_weight, up_bias, up_config, up_record or NO_RECORD)
    hidden = _hidden(input, (gate, up), activation, dropout if training else 0.0)
    return linear(hidden, down_weight, down_bias, config=down_config, record=down_record)


def _hidden(input: Tensor, layers: tuple[Part, ...], activation: str, p: float) -> Tensor:
    """Return what the last layer reads, fused where a product of each layer is pruned."""
    if any(x.config.masks_weight for x in layers):  # not what a producer's kernel is followed by
        pre, *up = [linear(input, x[0], x[1], config=x[2], record=x[3]) for x in layers]
        return F.dropout(producers.forward(activation, pre, up[0] if up else None), p)
    prunes = [linear_prunes(input, x.weight, x.config, x.record) for x in layers]
    if all(prunes) and can_fuse(input, *(x.weight for x in layers)):
        return activated_linear(input, layers, activation, p)
    pre, *up = [
        pruned_linear(input, x.weight, x.bias, x.config, x.record)
        if pruned
        else F.linear(input, x.weight, x.bias)
        for x, pruned in zip(layers, prunes, strict=True)
    ]
    return F.dropout(producers.forward(activation, pre, up[0] if up else None), p)


def _check(function: str, activation: str, dropout: float) -> None:
    if activation not in producers.ACTIVATIONS:
        rule = f"one of {', '.join(producers.ACTIVATIONS)}"
        fix = "Compose others from sdgp.functional.linear."
        raise value_error(function, "activation", rule, repr(activation), fix)
    if not 0 <= dropout <= 1:
        raise value_error(function, "dropout", "in 0..1", dropout, "It is a probability.")
