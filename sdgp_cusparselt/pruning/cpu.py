"""The blocked ways of a CPU: groups of four, a block at a time, in scratch that each thread keeps.

Every temporary of whole size would be fresh pages from the kernel, which cost more than the
arithmetic. A block's members are copied into four rows (``fours``), and its result is copied out.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sdgp_cusparselt.pruning import fours, plain
from sdgp_cusparselt.pruning.bits import BITS
from sdgp_cusparselt.pruning.eager import is_plain
from sdgp_cusparselt.pruning.scratch import rows

#: Elements at a time of what has no way of its own: its temporaries are some bytes an element each.
PLAIN_ELEMENTS = 1 << 14
_DRAWN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_RANKED_DTYPES = (*_DRAWN_DTYPES, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


def takes(groups: Tensor, at: int, method: str, n: int) -> bool:
    """Whether ``prune_fours`` has a way for these groups, of a plain tensor on a CPU.

    Scratch is written in place and read back: to whatever watches operations it would be a
    constant, or state that leaks from one call into the next.
    """
    dtypes = _RANKED_DTYPES if method == "magnitude" else _DRAWN_DTYPES
    return (
        groups.dtype in dtypes
        and groups.shape[at] == 4
        and (method != "mvue" or n < 3)
        and groups.is_contiguous()
        and _eager(groups)
    )


def prune_plainly(
    groups: Tensor, at: int, method: str, n: int, generator: torch.Generator | None
) -> Tensor:
    """Return ``plain.prune_groups``; on a CPU a block at a time, so that temporaries stay small."""
    if not (_eager(groups) and groups.is_contiguous() and groups.numel() > PLAIN_ELEMENTS):
        return plain.prune_groups(groups, at, method, n, generator)
    m, inner = groups.shape[at], math.prod(groups.shape[at + 1 :])
    out = torch.empty_like(groups)
    pairs = _blocks(groups.view(-1, m, inner), out.view(-1, m, inner), PLAIN_ELEMENTS // m)
    for block, into in pairs:
        into.copy_(plain.prune_groups(block, 1, method, n, generator))
    return out


def _eager(x: Tensor) -> bool:
    return x.device.type == "cpu" and is_plain(x)


def prune_fours(
    groups: Tensor, at: int, method: str, n: int, generator: torch.Generator | None
) -> Tensor:
    """Return groups of four with n of each kept, else +0.

    Args:
        groups: [..., 4, ...] for which ``takes`` holds.
        at: dimension of the four members.
        method: magnitude, random or mvue.
        n: 1, 2 or 3; not 3 for mvue.
        generator: source of random numbers; torch's own if None.

    Returns:
        Tensor like groups.
    """
    out = torch.empty_like(groups)
    inner = math.prod(groups.shape[at + 1 :])
    prune_block = {"magnitude": _magnitude, "random": _random, "mvue": _mvue}[method]
    for block, into in _blocks(groups.view(-1, 4, inner), out.view(-1, 4, inner), fours.CHUNK):
        prune_block(block.transpose(0, 1), into.transpose(0, 1), n, generator)
    return out


def _blocks(x: Tensor, out: Tensor, groups: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield [some, m, some] of both, at most so many groups each."""
    outer, _, inner = x.shape
    step, columns = max(1, groups // inner), min(inner, groups)
    for row in range(0, outer, step):
        for column in range(0, inner, columns):
            at = (slice(row, row + step), slice(None), slice(column, column + columns))
            yield x[at], out[at]


def _magnitude(x: Tensor, out: Tensor, n: int, _: torch.Generator | None) -> None:
    dtype = BITS[x.element_size()]
    ranks = fours.ranks_of(x.shape[1] * x.shape[2], x.element_size())
    ranks.x.view(x.shape).copy_(x.view(dtype))
    out.view(dtype).copy_(ranks.largest(n).bitwise_and_(ranks.x).view(x.shape))


def _random(x: Tensor, out: Tensor, n: int, generator: torch.Generator | None) -> None:
    size = x.element_size()
    dtype, count = BITS[size], x.shape[1] * x.shape[2]
    mask = fours.subsets_of(count, size).drawn(n, generator)
    if not all(math.isfinite(bound) for bound in torch.aminmax(x)):  # rare
        ranks = fours.ranks_of(count, size)
        ranks.x.view(x.shape).copy_(x.view(dtype))
        infinite = (~torch.isfinite(x)).any(0).view(-1)
        mask = torch.where(infinite, ranks.largest(n), mask)
    torch.bitwise_and(x.view(dtype), mask.view(x.shape), out=out.view(dtype))


def _mvue(x: Tensor, out: Tensor, n: int, generator: torch.Generator | None) -> None:
    estimates = fours.estimates_of(x.shape[1] * x.shape[2])
    estimates.x.view(x.shape).copy_(x)
    values = estimates.drawn(n, generator).view(torch.float32)
    if x.dtype != torch.float32:  # rounded where it is adjacent: twice as fast as on the way out
        values = rows("rounded", 4, fours.CHUNK, x.dtype)[:, : values.shape[1]].copy_(values)
    bits = BITS[x.element_size()]
    out.view(bits).copy_(values.view(bits).view(x.shape))
