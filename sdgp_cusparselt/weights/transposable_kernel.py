"""The Triton kernel of transposable masks: one read of the scores, one write of the mask.

A lane holds one 4 x 4 block in sixteen registers: 24 pair sums, 72 sums of two rows, 90 of four.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdgp_cusparselt.devices import on_device
from sdgp_cusparselt.weights.patterns import PATTERNS, SIDE, pattern_code

BLOCKS, NUM_WARPS = 128, 4
#: Of every compilation: plain torch rounds after every addition, and so must the kernel.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
#: The patterns for the kernel: pairs of the four rows at three bits each, and the code above them.
TABLE = tuple(
    a | b << 3 | c << 6 | d << 9 | pattern_code((a, b, c, d)) << 12 for a, b, c, d in PATTERNS
)
NUM_PATTERNS = tl.constexpr(len(PATTERNS))


@triton.jit
def _four(ptr, inside):
    """Load four neighbours of every lane, [BLOCKS, 4] split into its columns, as float32."""
    x = tl.load(ptr[:, None] + tl.arange(0, 4)[None, :], mask=inside[:, None], other=0.0)
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _pairs(x0, x1, x2, x3):
    """Sums of every two columns, in the order of PAIRS."""
    return x0 + x1, x0 + x2, x0 + x3, x1 + x2, x1 + x3, x2 + x3


@triton.jit
def _store(ptr, code, inside):
    """Write the four bits of code as four bytes."""
    column = tl.arange(0, 4)[None, :]
    bits = (code[:, None] >> column) & 1
    tl.store(ptr[:, None] + column, bits.to(tl.int8), mask=inside[:, None])


@triton.jit(do_not_specialize=("num_blocks", "blocks_per_row"))
def mask_kernel(
    scores_ptr,
    mask_ptr,
    num_blocks,
    blocks_per_row,
    ABSOLUTE: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Read scores [rows, 4 * blocks_per_row] once; write the best pattern of every block.

    Args:
        scores_ptr: float, contiguous.
        mask_ptr: int8, contiguous.
        num_blocks: 4 x 4 blocks in all.
        blocks_per_row: blocks side by side.
        ABSOLUTE: whether the scores are |scores|.
        TABLE: see ``TABLE``.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    width = 4 * blocks_per_row
    start = block // blocks_per_row * (4 * width) + block % blocks_per_row * 4
    x0, x1, x2, x3 = _four(scores_ptr + start, inside)
    y0, y1, y2, y3 = _four(scores_ptr + start + width, inside)
    z0, z1, z2, z3 = _four(scores_ptr + start + 2 * width, inside)
    w0, w1, w2, w3 = _four(scores_ptr + start + 3 * width, inside)
    if ABSOLUTE:
        x0, x1, x2, x3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
        y0, y1, y2, y3 = tl.abs(y0), tl.abs(y1), tl.abs(y2), tl.abs(y3)
        z0, z1, z2, z3 = tl.abs(z0), tl.abs(z1), tl.abs(z2), tl.abs(z3)
        w0, w1, w2, w3 = tl.abs(w0), tl.abs(w1), tl.abs(w2), tl.abs(w3)
    a, b = _pairs(x0, x1, x2, x3), _pairs(y0, y1, y2, y3)
    c, d = _pairs(z0, z1, z2, z3), _pairs(w0, w1, w2, w3)
    best = tl.full((BLOCKS,), float("-inf"), tl.float32)
    code = tl.full((BLOCKS,), TABLE[0] >> 12, tl.int32)
    for i in tl.static_range(NUM_PATTERNS):
        total = (a[TABLE[i] & 7] + b[TABLE[i] >> 3 & 7]) + (
            c[TABLE[i] >> 6 & 7] + d[TABLE[i] >> 9 & 7]
        )
        better = total > best
        best = tl.where(better, total, best)
        code = tl.where(better, TABLE[i] >> 12, code)
    _store(mask_ptr + start, code, inside)
    _store(mask_ptr + start + width, code >> 4, inside)
    _store(mask_ptr + start + 2 * width, code >> 8, inside)
    _store(mask_ptr + start + 3 * width, code >> 12, inside)


def launch(scores: Tensor, *, absolute: bool = False) -> Tensor:
    """Return the mask of the best pattern of every 4 x 4 block, from the kernel.

    Args:
        scores: [B, M, K] float16, bfloat16 or float32; M and K multiples of 4; no NaN.
        absolute: take |scores|, so that a weight needs no pass of its own for that.

    Returns:
        Bool tensor [B, M, K].
    """
    scores = scores.contiguous()
    mask = torch.empty(scores.shape, dtype=torch.int8, device=scores.device)
    num_blocks, per_row = scores.numel() // SIDE**2, scores.shape[-1] // SIDE
    with on_device(scores.device):
        mask_kernel[(triton.cdiv(num_blocks, BLOCKS),)](
            scores, mask, num_blocks, per_row,
            ABSOLUTE=absolute, TABLE=TABLE, BLOCKS=BLOCKS, **OPTIONS,
        )  # fmt: skip
    return mask.view(torch.bool)
