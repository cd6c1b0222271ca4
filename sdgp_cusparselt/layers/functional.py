"""linear and conv2d with a pruned data gradient or weight, and what they refuse."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.config.choices import SDGPConfig, check_config
from sdgp_cusparselt.errors import type_error, value_error
from sdgp_cusparselt.layers.autograd import pruned_conv2d, pruned_linear
from sdgp_cusparselt.layers.masked import masked_conv2d, masked_linear
from sdgp_cusparselt.layers.plain import conv2d_prunes, linear_prunes, may_prune
from sdgp_cusparselt.recording.records import LayerRecord

NO_RECORD = LayerRecord()
#: One number for both directions, or one for each.
Pair = int | Sequence[int]
#: Masks of a weight, bool of its shape: what output keeps of it, and what grad_input keeps of that.
Masks = tuple[Tensor | None, Tensor | None]


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    config: SDGPConfig,
    record: LayerRecord | None = None,
    masks: Masks | None = None,
    keeps: bool = True,
) -> Tensor:
    """Apply a linear layer whose data gradient, or weight, is pruned.

    output      = input @ weight.T + bias        (weight pruned if so configured)
    grad_input  = prune(grad_output) @ weight    (or with the weight pruned both ways)
    grad_weight = grad_output.T @ input          (grad_output pruned along tokens if so configured)
    grad_bias   = grad_output summed over tokens

    Args:
        input: [..., in_features] float, any strides.
        weight: [out_features, in_features], any strides.
        bias: [out_features] or None.
        config: how to prune and on what backend.
        record: where calls and fallbacks are counted; a shared one if None.
        masks: of a weight that ``config`` prunes: what output keeps of it, and what grad_input
            keeps of that; None for the largest.
        keeps: whether a packed weight is kept until its version changes. False for one that
            something fills anew without a word, as FSDP does.

    Returns:
        [..., out_features].

    Raises:
        TypeError: config is not an SDGPConfig, or it prunes and an operand is complex.
        ValueError: config has a schedule.
        NotSupportedError: where the wanted backend cannot run the product and
            ``config.on_unsupported`` is "raise".
        SDGPError: in double backward, for batched gradients and forward-mode derivatives.

    Note:
        Under autocast the operands are cast as ``torch.nn.functional.linear`` casts them. Where
        nothing is pruned it is that function: by ``config``, because no gradient is asked for, or
        because an operand is nested, sparse, 1-D or a subclass that only itself can multiply.

    Source:
        SDGP (arXiv 2202.00774), section on the data gradient.
    """
    check("linear", config, input, weight)
    record = NO_RECORD if record is None else record
    if config.masks_weight:
        return masked_linear(input, weight, bias, masks or (None, None), keeps, config, record)
    if not linear_prunes(input, weight, config, record):
        return F.linear(input, weight, bias)
    return pruned_linear(input, weight, bias, config, record)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    config: SDGPConfig,
    record: LayerRecord | None = None,
    masks: Masks | None = None,
    keeps: bool = True,
) -> Tensor:
    """Apply a convolution whose data gradient, or weight, is pruned along its channels.

    output     = conv2d(input, weight) + bias
    grad_input = conv_transpose2d(prune(grad_output along channels), weight)
    grad_weight and grad_bias from the dense grad_output   (pixels pruned if so configured)

    Args:
        input: [N, in_channels, H, W] or [in_channels, H, W] float, any memory format.
        weight: [out_channels, in_channels / groups, kH, kW].
        bias: [out_channels] or None.
        stride: in pixels.
        padding: in pixels, or "valid" or "same" (stride 1 only).
        dilation: in pixels.
        groups: number of convolution groups; pruning groups never cross their borders.
        config: how to prune and on what backend.
        record: where calls and fallbacks are counted; a shared one if None.
        masks: as ``linear``; groups run along the input channels of one tap.
        keeps: as ``linear``.

    Returns:
        [N, out_channels, H_out, W_out] or without N, as input.

    Raises:
        TypeError: config is not an SDGPConfig, or it prunes and an operand is complex.
        ValueError: config has a schedule, padding is an unknown word, or "same" with a stride, or
            an argument has more than two numbers.
        NotSupportedError, SDGPError: as ``linear``.

    Source:
        SDGP (arXiv 2202.00774); groups along channels whatever the memory format is.
    """
    check("conv2d", config, input, weight)
    record = NO_RECORD if record is None else record
    steps, reach = _pair("stride", stride), _pair("dilation", dilation)
    edges = _edges(padding, steps)
    images = weight.ndim == 4 and input.ndim in (3, 4)  # torch says what is wrong with others
    pruned = images and (config.masks_weight or may_prune(input, weight, config, record))
    if not pruned:
        return F.conv2d(input, weight, bias, steps, edges, reach, groups)
    batch = input if input.ndim == 4 else input.unsqueeze(0)
    batch, pads = _padded(batch, weight, edges, reach)
    conv = ConvGeometry(steps, pads, reach, groups)
    if config.masks_weight:
        both = masks or (None, None)
        output = masked_conv2d(batch, weight, bias, both, conv, keeps, config, record)
    elif conv2d_prunes(batch, weight, conv, config, record):
        output = pruned_conv2d(batch, weight, bias, conv, config, record)
    else:
        output = F.conv2d(batch, weight, bias, steps, pads, reach, groups)
    return output if input.ndim == 4 else output.squeeze(0)


def check(function: str, config: SDGPConfig, input: Tensor, weight: Tensor) -> None:
    """Raise unless config is an SDGPConfig without a schedule, and what it prunes is real."""
    check_config(function, config)
    if config.schedule is not None:
        fix = "Pass config.at(step); only layers that convert_ made follow a schedule."
        raise value_error(function, "config", "one without a schedule", config.describe(), fix)
    for name, operand in (("input", input), ("weight", weight)):
        if operand.is_complex() and (config.prunes or config.grad_weight == "sparse"):
            fix = f"Use torch.nn.functional.{function}: pruning is defined for real gradients."
            raise type_error(function, name, "real", operand.dtype, fix)


def _pair(argument: str, value: Pair) -> tuple[int, int]:
    """Return one number for each direction from one number, one in a tuple, or two."""
    if isinstance(value, int):
        return value, value
    if len(value) not in (1, 2):
        fix = "Images have a height and a width."
        raise value_error("conv2d", argument, "a number or a pair", tuple(value), fix)
    return value[0], value[-1]


def _edges(padding: Pair | str, stride: tuple[int, int]) -> tuple[int, int] | str:
    """Return padding in pixels, or one of its two words."""
    if not isinstance(padding, str):
        return _pair("padding", padding)
    if padding not in ("valid", "same"):
        rule = 'a number, a pair, "valid" or "same"'
        raise value_error("conv2d", "padding", rule, repr(padding), "Pick one of these.")
    if padding == "same" and stride != (1, 1):
        fix = "Pass the padding in pixels."
        raise value_error("conv2d", "stride", 'one with padding="same"', stride, fix)
    return padding


def _padded(
    input: Tensor, weight: Tensor, padding: tuple[int, int] | str, dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Return the input, padded where the padding is lopsided, and what the convolution pads."""
    if not isinstance(padding, str):
        return input, padding
    if padding == "valid":
        return input, (0, 0)
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    low = (total[0] // 2, total[1] // 2)
    odd_h, odd_w = total[0] % 2, total[1] % 2
    return (F.pad(input, (0, odd_w, 0, odd_h)) if odd_h or odd_w else input), low
