"""Convolutions as matrix products: pixels and columns, without a copy of the gradient.

columns = prune(grad_output as [pixels, out_channels]) @ weight as [out_channels, kH kW in_channels]
grad_input[n, y s - p + i d, x s - p + j d] += columns[(n, y, x), i, j]
"""

import torch
from torch import Tensor

from sdgp_cusparselt.backends.base import ConvGeometry


def pixels(x: Tensor) -> Tensor:
    """Return [N, C, H, W] as [N H W, C]: a view of channels_last memory, else a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def images(tokens: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Return [N H W, C] as [N, C, H, W] in channels_last memory; a view."""
    return tokens.view(batch, height, width, -1).permute(0, 3, 1, 2)


def weight_columns(weight: Tensor) -> Tensor:
    """Return [O, I, kH, kW] as row-major [O, kH kW I]: a view of channels_last memory."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def strided_input(input: Tensor, grad_output: Tensor, conv: ConvGeometry) -> Tensor:
    """Return the pixels of input that an unpadded 1x1 convolution reads: a view."""
    (step_y, step_x), (height, width) = conv.stride, grad_output.shape[2:]
    return input[:, :, ::step_y, ::step_x][:, :, :height, :width]


def is_plain(conv: ConvGeometry, kernel_size: tuple[int, int]) -> bool:
    """Whether the convolution is one product of pixels and channels, with nothing to scatter."""
    return kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)


def scatter_columns(
    columns: Tensor,
    output_shape: torch.Size,
    input_shape: torch.Size,
    weight_shape: torch.Size,
    conv: ConvGeometry,
) -> Tensor:
    """Add columns up at the pixels that they came from.

    Args:
        columns: [N H_out W_out, kH kW in_channels].
        output_shape: [N, out_channels, H_out, W_out].
        input_shape: [N, in_channels, H, W].
        weight_shape: [out_channels, in_channels, kH, kW].
        conv: stride, padding, dilation; groups must be 1.

    Returns:
        [N, in_channels, H, W] in columns' dtype, channels_last, summed in float32.
    """
    batch, channels, height, width = input_shape
    _, _, out_height, out_width = output_shape
    kernel_height, kernel_width = weight_shape[2:]
    if is_plain(conv, (kernel_height, kernel_width)):
        return images(columns, batch, height, width)
    (pad_y, pad_x), (step_y, step_x), (gap_y, gap_x) = conv.padding, conv.stride, conv.dilation
    parts = columns.view(batch, out_height, out_width, kernel_height, kernel_width, channels)
    # A single column per pixel is only moved, never added to: no wider sum is needed.
    wide = columns.dtype if kernel_height * kernel_width == 1 else torch.float32
    full_height = max(height + 2 * pad_y, (out_height - 1) * step_y + gap_y * kernel_height)
    full_width = max(width + 2 * pad_x, (out_width - 1) * step_x + gap_x * kernel_width)
    padded = columns.new_zeros((batch, full_height, full_width, channels), dtype=wide)
    for i in range(kernel_height):
        rows = slice(i * gap_y, i * gap_y + (out_height - 1) * step_y + 1, step_y)
        for j in range(kernel_width):
            cols = slice(j * gap_x, j * gap_x + (out_width - 1) * step_x + 1, step_x)
            padded[:, rows, cols] += parts[:, :, :, i, j]
    grad_input = padded[:, pad_y : pad_y + height, pad_x : pad_x + width].to(columns.dtype)
    return grad_input.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
