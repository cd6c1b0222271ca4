"""Operands that packers and products are proven on, made block by block of rows.

Most of them hold small integers, whose products and sums are exact in any order: there the result
must be the exact one, and a single wrong or missing term shows at any K. Whatever is wider than
the operand's own dtype exists for one block at a time, so that the largest layer can be proven on
a device that just holds its operands.
"""

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from sdgp_cusparselt.pruning import prune

#: Elements of a block: what a temporary in float32 or int64 may have.
BLOCK = 1 << 22


def row_blocks(rows: int, cols: int) -> Iterator[slice]:
    """Yield slices of rows that cover ``rows``, of at most ``BLOCK`` elements where that goes."""
    step = max(1, BLOCK // max(cols, 1))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def two_of_four(
    rows: int, cols: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Return [rows, cols] with +-1 or +-2 in exactly two places of each whole group of four."""
    made = torch.empty(rows, cols, dtype=dtype, device=device)
    groups = -(-cols // 4)
    pairs = torch.tensor([[i in pair for i in range(4)] for pair in combinations(range(4), 2)])
    # 8-bit types cannot be multiplied by themselves; these numbers are exact in all of them.
    kind = torch.float32 if dtype.itemsize == 1 else dtype
    values = torch.tensor([-2, -1, 1, 2], dtype=kind, device=device)
    pairs = pairs.to(device)
    for part in row_blocks(rows, 4 * cols):
        shape = (part.stop - part.start, groups, 4)
        kept = pairs[torch.randint(6, shape[:2], generator=generator, device=device)]
        drawn = values[torch.randint(4, shape, generator=generator, device=device)]
        made[part] = (kept * drawn).flatten(1)[:, :cols].to(dtype)
    return made


def few_integers(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    share: float = 1.0,
) -> Tensor:
    """Return [rows, cols] of -1, 0 and 1, a ``share`` of them not 0."""
    made = torch.empty(rows, cols, dtype=dtype, device=device)
    for part in row_blocks(rows, 2 * cols):
        draw = torch.rand(part.stop - part.start, cols, generator=generator, device=device)
        signs = (draw < share / 2).to(torch.int8) - (draw > 1 - share / 2).to(torch.int8)
        made[part] = signs.to(dtype)
    return made


def share_of_nonzeros(k: int, dtype: torch.dtype) -> float:
    """Return how many of the dense operand's integers may differ from 0.

    The result's standard deviation is sqrt(1.25 K share); a sixth of the largest integer up to
    which ``dtype`` holds every one keeps nearly all results exactly representable.
    """
    if not dtype.is_floating_point:
        return 1.0
    largest = 2 / torch.finfo(dtype).eps
    return min(1.0, (largest / 6) ** 2 / (1.25 * max(k, 1)))


def normal(
    rows: int, cols: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Return [rows, cols] normal random numbers."""
    made = torch.empty(rows, cols, dtype=dtype, device=device)
    for part in row_blocks(rows, 2 * cols):
        shape = (part.stop - part.start, cols)
        made[part] = torch.randn(shape, generator=generator, device=device).to(dtype)
    return made


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return left @ right, summed in float32 and rounded once, in blocks of both operands.

    Args:
        left: [M, K].
        right: [K, N], any strides.
        dtype: of the result.

    Returns:
        [M, N].
    """
    (rows, inner), cols = left.shape, right.shape[1]
    out = torch.empty(rows, cols, dtype=dtype, device=left.device)
    # Four times the usual block: products of thin slices are slow.
    for part in row_blocks(rows, inner // 4):
        wide = left[part].float()
        for across in row_blocks(cols, max(inner, part.stop - part.start) // 4):
            out[part, across] = (wide @ right[:, across].float()).to(dtype)
    return out


def pruned_24(x: Tensor) -> Tensor:
    """Return a matrix pruned 2:4 along its rows by magnitude, any strides; -0.0 becomes +0."""
    pruned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for part in row_blocks(*x.shape):
        some = prune(x[part].contiguous(), method="magnitude")
        pruned[part] = some.masked_fill(some == 0, 0)
    return pruned


def some_rows(
    rows: int, cols: int, device: torch.device, generator: torch.Generator
) -> Tensor | None:
    """Return which rows of a large result are compared, sorted; None for all of a smaller one."""
    count = max(256, 4 * BLOCK // max(cols, 1))
    if count >= rows:
        return None
    return torch.randperm(rows, generator=generator, device=device)[:count].sort().values


def unpruned(
    rows: int, cols: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield matrices to pack: random numbers, and what a packer gets wrong first."""
    generator = torch.Generator(device=device).manual_seed(rows * 31 + cols)
    yield "random", normal(rows, cols, dtype, device, generator)
    # Ties, and groups with none, one or two non-zeros in every position.
    few = few_integers(rows, cols, dtype, device, generator, share=0.3)
    yield "sparse", few
    special = normal(rows, cols, dtype, device, generator)
    values = [0.0, -0.0, float("inf"), -float("inf"), torch.finfo(dtype).max]
    values.append(torch.finfo(dtype).tiny / 4)
    for part in row_blocks(rows, 2 * cols):
        for value in values:
            draw = torch.rand(special[part].shape, generator=generator, device=device)
            special[part].masked_fill_(draw < 0.1, value)
    yield "special", special
