"""The best of the 90 patterns of a 4 x 4 block: in plain torch, or by the kernel on a GPU.

Sums are taken as ((row 0 + row 1) + (row 2 + row 3)), each row's two scores first, and of equal
sums the first pattern wins: the kernel and plain torch find the same one, bit for bit.
"""

import functools

import torch
from torch import Tensor

from sdgp_cusparselt.packing.starting import interpreted, kernels
from sdgp_cusparselt.weights.patterns import PAIRS, PATTERNS, SIDE, pattern_code

#: Blocks whose 90 sums are held at once.
_CHUNK = 1 << 14


def best_of_blocks(scores: Tensor, *, absolute: bool = False) -> Tensor:
    """Return the mask of the best pattern of every 4 x 4 block.

    Args:
        scores: [B, M, K] float, M and K multiples of 4; no NaN.
        absolute: take |scores|; the kernel does so as it reads.

    Returns:
        Bool tensor [B, M, K].
    """
    if scores.dtype != torch.float64 and _kernel_runs(scores.device):
        from sdgp_cusparselt.weights.transposable_kernel import launch

        return launch(scores, absolute=absolute)
    return best_in_torch(scores.abs() if absolute else scores)


def best_in_torch(scores: Tensor) -> Tensor:
    """Return what ``best_of_blocks`` does, in plain torch."""
    batch, m, k = scores.shape
    wide = scores if scores.dtype == torch.float64 else scores.float()
    blocks = wide.reshape(batch, m // SIDE, SIDE, k // SIDE, SIDE).transpose(2, 3)
    found = [_best(part) for part in torch.split(blocks.reshape(-1, SIDE, SIDE), _CHUNK)]
    masks = torch.cat(found).view(batch, m // SIDE, k // SIDE, SIDE, SIDE)
    return masks.transpose(2, 3).reshape(batch, m, k)


def _best(blocks: Tensor) -> Tensor:
    """Return the masks [N, 4, 4] of blocks [N, 4, 4]."""
    first, second = _columns(blocks.device)
    pairs = blocks[:, :, first] + blocks[:, :, second]  # [N, 4 rows, 6 pairs]
    table, masks = _tables(blocks.device)
    a, b, c, d = (pairs[:, row, table[:, row]] for row in range(SIDE))  # each [N, 90]
    return masks[((a + b) + (c + d)).argmax(dim=1)]


@functools.cache
def _columns(device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = zip(*PAIRS, strict=True)
    return torch.tensor(first, device=device), torch.tensor(second, device=device)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the pairs [90, 4] and the masks [90, 4, 4] of all patterns."""
    codes = torch.tensor([pattern_code(rows) for rows in PATTERNS], device=device)
    bits = torch.arange(SIDE * SIDE, device=device)
    masks = (codes[:, None] >> bits & 1).bool().view(-1, SIDE, SIDE)
    return torch.tensor(PATTERNS, device=device), masks


def _kernel_runs(device: torch.device) -> bool:
    return device.type == "cuda" and kernels() is not None and not interpreted()
