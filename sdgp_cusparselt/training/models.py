"""The networks that ``sdgp train`` trains; small, but each of the shape of a real one."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


def _conv_norm(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, padding: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, as in ResNet-18."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm(in_channels, out_channels, stride=stride)
        self.conv2 = _conv_norm(out_channels, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _conv_norm(in_channels, out_channels, 1, stride, 0)

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, out_channels, H / stride, W / stride]."""
        hidden = F.relu(self.conv1(input))
        return F.relu(self.conv2(hidden) + self.shortcut(input))


class SmallResNet(nn.Module):
    """A 3x3 stem and stages of basic blocks; every stage after the first halves the image.

    Args:
        in_channels: of the image.
        widths: output channels of each stage; multiples of 32 so that any n:m of the paper fits.
        depth: blocks per stage.
        num_classes: outputs of ``fc``.
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], depth: int, num_classes: int
    ) -> None:
        super().__init__()
        self.stem = _conv_norm(in_channels, widths[0])
        blocks: list[nn.Module] = []
        previous = widths[0]
        for stage, width in enumerate(widths):
            for block in range(depth):
                blocks.append(BasicBlock(previous, width, 2 if stage and not block else 1))
                previous = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(previous, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, num_classes]."""
        hidden = self.blocks(F.relu(self.stem(input)))
        logits: Tensor = self.fc(hidden.mean(dim=(2, 3)))
        return logits


class Residual(nn.Module):
    """input + inner(input)."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, input: Tensor) -> Tensor:
        """Keep the shape."""
        hidden: Tensor = self.inner(input)
        return input + hidden


class ResNet9(nn.Module):
    """The network of the SDGP paper's CIFAR-10 table, its widths divided by ``scale_down``.

    A 3x3 stem, a strided 5x5 convolution, two residual stages of two 3x3 convolutions, a 3x3
    convolution without padding, and a max over what is left of the image.

    Args:
        in_channels: of the image.
        num_classes: outputs of ``fc``.
        scale_down: 1 gives the widths 64, 128, 256 and 128.

    Source: KakaoBrain's ResNet-9 for DAWNBench, which the paper's CIFAR-10 configuration names.
    """

    def __init__(self, in_channels: int, num_classes: int, scale_down: int) -> None:
        super().__init__()
        stem, narrow, wide = (width // scale_down for width in (64, 128, 256))

        def block(a: int, b: int, size: int = 3, stride: int = 1, pad: int = 1) -> nn.Sequential:
            return nn.Sequential(_conv_norm(a, b, size, stride, pad), nn.ReLU())

        self.stem = block(in_channels, stem)
        self.body = nn.Sequential(
            block(stem, narrow, 5, 2, 2),
            Residual(block(narrow, narrow), block(narrow, narrow)),
            block(narrow, wide),
            nn.MaxPool2d(2),
            Residual(block(wide, wide), block(wide, wide)),
            block(wide, narrow, pad=0),
        )
        self.fc = nn.Linear(narrow, num_classes, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, num_classes]."""
        hidden = self.body(self.stem(input)).amax(dim=(2, 3))
        logits: Tensor = self.fc(hidden)
        return logits * 0.2


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and a GELU MLP of four times the width, as in GPT-2 and ViT.

    Args:
        width: of the residual stream.
        num_heads: of the attention; divides ``width``.
        causal: whether a position sees only those before it.
    """

    def __init__(self, width: int, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, T, width] to the same shape."""
        batch, length, width = input.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        query, key, value = self.qkv(self.norm1(input)).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(
            query.view(heads).transpose(1, 2),
            key.view(heads).transpose(1, 2),
            value.view(heads).transpose(1, 2),
            is_causal=self.causal,
        )
        hidden: Tensor = input + self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        expanded: Tensor = self.up(self.norm2(hidden))
        contracted: Tensor = self.down(F.gelu(expanded))
        return hidden + contracted


class ByteGPT(nn.Module):
    """A GPT over bytes.

    Args:
        context: longest sequence.
        width: of the residual stream.
        num_layers: blocks.
        num_heads: of each attention; divides ``width``.
    """

    def __init__(self, context: int, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.byte_embedding = nn.Embedding(VOCABULARY, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, num_heads, causal=True) for _ in range(num_layers))
        )
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(_initialise)

    def forward(self, input: Tensor) -> Tensor:
        """Map bytes [B, T] int64 to logits [B, T, 256] of the byte after each position."""
        positions = torch.arange(input.shape[1], device=input.device)
        hidden = self.byte_embedding(input) + self.position_embedding(positions)
        logits: Tensor = self.lm_head(self.norm(self.blocks(hidden)))
        return logits


class ViT(nn.Module):
    """A vision transformer over patches of one size, its last tokens averaged.

    Args:
        in_channels: of the image.
        image_size: height and width, a multiple of ``patch_size``.
        patch_size: height and width of a patch.
        width: of the residual stream.
        num_layers: blocks.
        num_heads: of each attention; divides ``width``.
        num_classes: outputs of ``head``.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        patch_size: int,
        width: int,
        num_layers: int,
        num_heads: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.position_embedding = nn.Embedding((image_size // patch_size) ** 2, width)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, num_heads, causal=False) for _ in range(num_layers))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        self.apply(_initialise)

    def forward(self, input: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, num_classes]."""
        patches = self.patch_embedding(input).flatten(2).transpose(1, 2)
        hidden = self.blocks(patches + self.position_embedding.weight)
        logits: Tensor = self.head(self.norm(hidden).mean(dim=1))
        return logits


def _initialise(module: nn.Module) -> None:
    # GPT-2's 0.02 suits a width of about 2,500; at 128 it wastes the first hundred steps.
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)
