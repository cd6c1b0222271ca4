"""Whole models for training steps: a GPT and a ViT, as plain as their dense form is in practice.

Blocks are pre-norm with biases and scaled_dot_product_attention. Layers inside ``blocks`` are what
SDGP converts; embeddings and head stay dense.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.shapes import Trained


class Block(nn.Module):
    """Attention and an MLP of four times the width, each with a residual."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, tokens, width] to the same shape."""
        x = x + self.out(self._attend(self.qkv(self.norm1(x))))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    def _attend(self, qkv: Tensor) -> Tensor:
        batch, tokens, width = qkv.shape
        heads = qkv.view(batch, tokens, 3, self.heads, width // (3 * self.heads))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return mixed.transpose(1, 2).reshape(batch, tokens, width // 3)


class Head(nn.Module):
    """Norm, output layer and loss in one, so that a compiler sees them together."""

    def __init__(self, width: int, outputs: int, first_only: bool) -> None:
        super().__init__()
        self.norm, self.first_only = nn.LayerNorm(width), first_only
        self.linear = nn.Linear(width, outputs, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of [batch, tokens, width], or of the first tokens."""
        logits = self.linear(self.norm(x[:, 0] if self.first_only else x))
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


class GPT(nn.Module):
    """Token and position embeddings, causal blocks, a head that shares the token embedding."""

    def __init__(self, case: Trained) -> None:
        super().__init__()
        self.tokens = nn.Embedding(case.outputs, case.width)
        self.positions = nn.Embedding(case.sequence, case.width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = _blocks(case, causal=True)
        self.head = Head(case.width, case.outputs, first_only=False)
        self.head.linear.weight = self.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of token ids [batch, sequence] against the next ones."""
        x = self.tokens(tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return self.head(x, targets)


class ViT(nn.Module):
    """Flattened patches, a class token, blocks, and a head on that token."""

    def __init__(self, case: Trained) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * case.patch**2, case.width)
        self.first = nn.Parameter(torch.zeros(1, 1, case.width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, case.sequence, case.width))
        self.blocks = _blocks(case, causal=False)
        self.head = Head(case.width, case.outputs, first_only=True)

    def forward(self, patches: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of images as patches [batch, sequence - 1, 3 * patch ** 2]."""
        x = self.patches(patches)
        first = self.first.to(x.dtype).expand(x.shape[0], -1, -1)
        x = torch.cat((first, x), 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x, targets)


def _blocks(case: Trained, causal: bool) -> nn.ModuleList:
    return nn.ModuleList(Block(case.width, case.heads, causal) for _ in range(case.layers))


def build(case: Trained) -> nn.Module:
    """Return a model with float32 weights on the case's device, in training mode."""
    with case.device:
        model = GPT(case) if case.patch == 0 else ViT(case)
    return model.train()


def batch(case: Trained) -> tuple[Tensor, Tensor]:
    """Return random inputs and targets of the case."""
    shape, place = (case.batch, case.sequence), {"device": case.device}
    if case.patch == 0:
        ids = torch.randint(case.outputs, (case.batch, case.sequence + 1), **place)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    images = torch.randn(shape[0], shape[1] - 1, 3 * case.patch**2, **place)
    return images, torch.randint(case.outputs, shape[:1], **place)


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of the modules around the very same Parameters: one set of weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def compile_(model: nn.Module, backend: str) -> nn.Module:
    """Compile each block, and the head with its loss, in place; all blocks share one code."""
    for part in (*model.blocks, model.head):
        part.compile(dynamic=False, backend=backend)
    return model
