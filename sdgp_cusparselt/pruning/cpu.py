"""Magnitude pruning of groups of four on a CPU, where torch's time goes into memory.

A chunk at a time, in scratch that each thread keeps (5 MB for float32): every temporary of whole
size would be fresh pages from the kernel. The masks of a group are the four bytes of one 32-bit
word, so that they are computed for four elements at once and never interleaved.
"""

import sys
import threading
from itertools import combinations

import torch
from torch import Tensor

#: Groups per chunk: scratch of some megabytes, which a core's cache holds.
CHUNK = 1 << 17
_LANES = 0x01010101
_PAIRS = tuple(combinations(range(4), 2))


class _Local(threading.local):
    def __init__(self) -> None:
        self.kept: dict[tuple[torch.dtype, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}


_local = _Local()


def usable(groups: Tensor, at: int) -> bool:
    """Whether ``top_of_four`` takes these groups: on a CPU, in eager mode, members adjacent."""
    return (
        groups.device.type == "cpu"
        and sys.byteorder == "little"
        and at == groups.ndim - 1
        and groups.is_contiguous()
        and not torch.compiler.is_compiling()
    )


def top_of_four(bits: Tensor, n: int) -> Tensor:
    """Return bits where they are among the n largest of their four, sign aside, else 0.

    Args:
        bits: [..., 4] int8|int16|int32|int64, contiguous, on a CPU: floats seen as integers.
        n: 1, 2 or 3.

    Returns:
        Tensor like bits. On a tie the lower index stays.
    """
    groups = bits.view(-1, 4)
    total, dtype = groups.shape[0], bits.dtype
    size = min(CHUNK, total)
    out = torch.empty_like(groups)
    keys, wide, beats, losses = _scratch(dtype)
    sign_cleared = 2 ** (8 * bits.element_size() - 1) - 1
    for start in range(0, total, size):
        chunk = groups[start : start + size]
        count = chunk.shape[0]
        members = torch.bitwise_and(chunk, sign_cleared, out=keys[:count]).unbind(1)
        lost, word = losses[:count], beats[:count]
        # Byte i counts to how many others member i loses: at first to every later one, ...
        lost.fill_(0x00010203)
        for i, j in _PAIRS:
            # ... and each i that beats a j moves that loss from i to j.
            torch.ge(members[i], members[j], out=word)
            lost.add_(word, alpha=256**j - 256**i)
        kept = _fewer_losses_than(n, lost).mul_(255).view(torch.int8)  # 0 or -1 in each byte
        mask = wide[:count]
        mask.view(-1).copy_(kept)  # widening keeps every bit set
        torch.bitwise_and(mask, chunk, out=out[start : start + count])
    return out.view(bits.shape)


def _scratch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return this thread's buffers of CHUNK groups; what they hold is of no use to a later call."""
    found = _local.kept.get((dtype, CHUNK))
    if found is None:
        keys, wide = (torch.empty((CHUNK, 4), dtype=dtype) for _ in range(2))
        beats, losses = (torch.empty(CHUNK, dtype=torch.int32) for _ in range(2))
        found = _local.kept[dtype, CHUNK] = (keys, wide, beats, losses)
    return found


def _fewer_losses_than(n: int, lost: Tensor) -> Tensor:
    """Return words whose bytes are 1 where that byte of ``lost``, 0 to 3, is below n."""
    high = lost >> 1
    if n == 1:
        high.bitwise_or_(lost)
    elif n == 3:
        high.bitwise_and_(lost)
    return high.bitwise_and_(_LANES).bitwise_xor_(_LANES)
