"""1x1 convolutions as matrix products of pixels and channels, without a copy of the gradient.

product = prune(grad_output as [pixels, out_channels]) @ weight as [out_channels, in_channels]
grad_input[n, y s, x s] = product[(n, y, x)], and zero between the steps of stride s
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


def strided_input(input: Tensor, grad_output: Tensor, conv: ConvGeometry) -> Tensor:
    """Return the pixels of input that an unpadded 1x1 convolution reads: a view."""
    (step_y, step_x), (height, width) = conv.stride, grad_output.shape[2:]
    return input[:, :, ::step_y, ::step_x][:, :, :height, :width]


def spread(
    product: Tensor, output_shape: torch.Size, input_shape: torch.Size, conv: ConvGeometry
) -> Tensor:
    """Return grad_input from the product of pixels and channels.

    Args:
        product: [N H_out W_out, in_channels].
        output_shape: [N, out_channels, H_out, W_out].
        input_shape: [N, in_channels, H, W].
        conv: stride; the convolution is 1x1 and unpadded.

    Returns:
        [N, in_channels, H, W] in product's dtype, channels_last; a view where no pixel is skipped.
    """
    batch, _, height, width = output_shape
    read = images(product, batch, height, width)
    if read.shape == input_shape:
        return read
    grad_input = product.new_zeros(input_shape).to(memory_format=torch.channels_last)
    strided_input(grad_input, read, conv).copy_(read)
    return grad_input
