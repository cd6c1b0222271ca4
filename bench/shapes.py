"""What is measured: shapes named after the models they come from, shared by every benchmark.

M, N, K are those of the product at hand, K reduced and pruned:

    grad_input  [M tokens, N in_features]       = grad_output [M, K out_features] @ weight [K, N]
    grad_weight [M out_features, N in_features] = grad_output.T [M, K tokens] @ input [K, N]
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

Product = Literal["grad_input", "grad_weight"]

#: (model, layer, in_features, out_features): linear layers as the models' configurations give them.
LINEARS = (
    ("llama-3-8b", "attn.q", 4096, 4096),
    ("llama-3-8b", "attn.kv", 4096, 1024),
    ("llama-3-8b", "mlp.up", 4096, 14336),
    ("llama-3-8b", "mlp.down", 14336, 4096),
    ("llama-2-13b", "attn.q", 5120, 5120),
    ("llama-2-13b", "mlp.up", 5120, 13824),
    ("llama-2-13b", "mlp.down", 13824, 5120),
    ("gpt-3-6.7b", "attn.qkv", 4096, 12288),
    ("gpt-3-6.7b", "attn.out", 4096, 4096),
    ("gpt-3-6.7b", "mlp.up", 4096, 16384),
    ("gpt-3-6.7b", "mlp.down", 16384, 4096),
    ("vit-g-14", "attn.qkv", 1408, 4224),
    ("vit-g-14", "mlp.up", 1408, 6144),
    ("vit-g-14", "mlp.down", 6144, 1408),
    ("vit-l-16", "attn.q", 1024, 1024),
    ("vit-l-16", "mlp.up", 1024, 4096),
    ("vit-l-16", "mlp.down", 4096, 1024),
    ("gpt2-medium", "attn.qkv", 1024, 3072),
    ("gpt2-medium", "mlp.up", 1024, 4096),
    ("gpt2-medium", "mlp.down", 4096, 1024),
)
#: The quick run: two that should gain, two that should lose.
QUICK = {
    ("llama-3-8b", "mlp.up"),
    ("llama-3-8b", "mlp.down"),
    ("vit-l-16", "mlp.up"),
    ("gpt2-medium", "mlp.down"),
}
TOKENS = (4096, 8192, 16384)
#: Rivals are slow to set up; they run at this many tokens only, in both scopes.
RIVAL_TOKENS = 8192
CPU_LINEARS = (("tiny", "mlp.up", 128, 256), ("tiny", "mlp.down", 256, 128))
CPU_TOKENS = 256


@dataclass(frozen=True)
class Case:
    """A linear layer of a model with its tokens, on one kind of device.

    Attributes:
        model, layer: where the shape comes from.
        tokens, in_features, out_features: its sizes.
        device_type: "cuda", or "cpu" for the emulated and the fallback path.
        dtype: of every operand.
    """

    model: str
    layer: str
    tokens: int
    in_features: int
    out_features: int
    device_type: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    @property
    def label(self) -> str:
        """Name for tests and tables."""
        return f"{self.model}-{self.layer}-{self.tokens}"

    @property
    def device(self) -> torch.device:
        """Where it runs: the current device of its type."""
        return torch.device(self.device_type, 0 if self.device_type == "cuda" else None)

    @property
    def with_rivals(self) -> bool:
        """Whether the slow rivals run on it."""
        return self.device_type == "cpu" or self.tokens == RIVAL_TOKENS

    def sizes(self, product: Product) -> tuple[int, int, int]:
        """Return (M, N, K) of one of the two products of the backward pass."""
        if product == "grad_input":
            return self.tokens, self.in_features, self.out_features
        return self.out_features, self.in_features, self.tokens


@dataclass(frozen=True)
class Selection:
    """Which of the GPU's cases are measured; the CPU's few always are.

    Attributes:
        full: every shape and rival, and compiled code; else a few that fit into minutes.
        dtype: of every operand.
        models: names to keep; all if empty.
        tokens: to keep; all if empty.
    """

    full: bool = False
    dtype: torch.dtype = torch.bfloat16
    models: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()

    def keeps(self, model: str, quick: bool) -> bool:
        """Return whether a model is wanted, in the quick run only if that has it."""
        return (self.full or quick) and (not self.models or model in self.models)


def linear_cases(selection: Selection) -> list[Case]:
    """Return the GPU's cases, those of one layer side by side, then the CPU's in bfloat16."""
    tokens = selection.tokens or (TOKENS if selection.full else (RIVAL_TOKENS,))
    gpu = [
        Case(model, layer, count, n, k, dtype=selection.dtype)
        for model, layer, n, k in LINEARS
        for count in tokens
        if selection.keeps(model, (model, layer) in QUICK)
    ]
    return gpu + [Case(model, layer, CPU_TOKENS, n, k, "cpu") for model, layer, n, k in CPU_LINEARS]


@dataclass(frozen=True)
class Convolution:
    """A convolution of a model with its batch of images.

    Attributes:
        model, layer: where the shape comes from.
        batch, in_channels, out_channels, edge, kernel, stride: its sizes; edge in input pixels.
        device_type, dtype: as in ``Case``.
    """

    model: str
    layer: str
    batch: int
    in_channels: int
    out_channels: int
    edge: int
    kernel: int = 1
    stride: int = 1
    device_type: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    @property
    def label(self) -> str:
        """Name for tests and tables."""
        return f"{self.model}-{self.layer}-{self.batch}"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.device_type, 0 if self.device_type == "cuda" else None)

    @property
    def pixels(self) -> int:
        """Output pixels of the batch: M of grad_input."""
        return self.batch * (-(-self.edge // self.stride)) ** 2


#: (model, layer, batch, in_channels, out_channels, edge, kernel, stride, in the quick run).
CONVOLUTIONS = (
    ("resnet-50", "stage3.1x1.expand", 256, 256, 1024, 14, 1, 1, True),
    ("resnet-50", "stage3.1x1.reduce", 256, 1024, 256, 14, 1, 1, False),
    ("resnet-50", "stage3.3x3", 256, 256, 256, 14, 3, 1, True),
    ("resnet-50", "stage4.1x1.expand", 256, 512, 2048, 7, 1, 1, False),
    ("regnet-y-16gf", "stage3.1x1", 128, 1232, 1232, 14, 1, 1, False),
    ("regnet-y-16gf", "stage4.1x1", 128, 3024, 3024, 7, 1, 1, False),
)
CPU_CONVOLUTIONS = (
    Convolution("tiny", "1x1", 2, 32, 64, 8, device_type="cpu"),
    Convolution("tiny", "3x3", 2, 16, 32, 8, 3, device_type="cpu"),
)


def convolution_cases(selection: Selection) -> list[Convolution]:
    """Return the GPU's convolutions, then the CPU's."""
    gpu = [
        Convolution(*sizes, dtype=selection.dtype)
        for *sizes, quick in CONVOLUTIONS
        if selection.keeps(sizes[0], quick)
    ]
    return [*gpu, *CPU_CONVOLUTIONS]


@dataclass(frozen=True)
class Trained:
    """A whole model that is trained, with its batch: bf16 autocast over float32 weights.

    Attributes:
        model: what the sizes are of.
        batch, sequence: samples, and tokens in one.
        width, layers, heads: of its blocks.
        outputs: vocabulary, or classes.
        patch: edge of an image patch in pixels; 0 for a model that reads tokens.
        quick: part of the quick run.
        device_type, dtype: as in ``Case``; dtype is that of autocast.
    """

    model: str
    batch: int
    sequence: int
    width: int
    layers: int
    heads: int
    outputs: int
    patch: int = 0
    quick: bool = False
    device_type: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    @property
    def layer(self) -> str:
        """What result files have in place of one layer's name."""
        return f"{self.layers} blocks"

    @property
    def label(self) -> str:
        """Name for tests and tables."""
        return f"{self.model}-{self.batch}x{self.sequence}"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.device_type, 0 if self.device_type == "cuda" else None)


#: The vocabulary is GPT-2's, rounded up to a multiple of 64; 197 tokens are 196 patches and one.
TRAINED = (
    Trained("gpt-350m", 16, 1024, 1024, 24, 16, 50304, quick=True),
    Trained("gpt-1.3b", 8, 2048, 2048, 24, 16, 50304),
    Trained("vit-l-16", 128, 197, 1024, 24, 16, 1000, patch=16),
)
CPU_TRAINED = (
    Trained("tiny-gpt", 2, 32, 64, 2, 4, 96, device_type="cpu"),
    Trained("tiny-vit", 4, 17, 64, 2, 4, 10, patch=4, device_type="cpu"),
)


def trained_cases(selection: Selection) -> list[Trained]:
    """Return the GPU's whole models, samples as ``tokens`` asks for, then the CPU's."""
    gpu = [
        replace(case, batch=max(1, count // case.sequence) if count else case.batch)
        for case in TRAINED
        for count in selection.tokens or (0,)
        if selection.keeps(case.model, case.quick)
    ]
    return [replace(case, dtype=selection.dtype) for case in gpu] + list(CPU_TRAINED)
