"""Start the kernel that makes a gradient and packs it: resolved once, as ``launch`` does."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdgp_cusparselt.config.patterns import STOCHASTIC
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.packing.launch import OCTET, blocks_of, operand_nbytes, target_of
from sdgp_cusparselt.packing.layout import MetadataLayout
from sdgp_cusparselt.packing.starting import interpreted, prepare_kernel
from sdgp_cusparselt.packing.variants import (
    MAX_BLOCK,
    NO_RATIO,
    PackVariant,
    ProducedVariant,
    ProducerKind,
)

# float32 of a row of ``cross_entropy_rows``; the kernel's ROW_FLOATS.
_ROW_FLOATS = 8
#: Columns that end with every block: smoothed labels add something to all of a row, and to what a
#: block that reaches beyond it would write there.
WHOLE_BLOCKS = MAX_BLOCK
# What the second gradient of a gated producer adds to the offset; the kernel's SECOND_OFFSET.
SECOND_OFFSET = 4


@dataclass(frozen=True)
class PreparedProduced:
    """One way of making and packing one shape, resolved.

    Attributes:
        covered_rows: rows of all blocks, M or more.
        sums_shape: float32 [row blocks, K] of the partial column sums of each gradient, or None.
        features_nbytes: bytes of each operand along features, 0 if there is none.
        tokens_nbytes: bytes of each operand along tokens, likewise.
        draws: whether seed and offset matter.
    """

    covered_rows: int
    sums_shape: tuple[int, int] | None
    features_nbytes: int
    tokens_nbytes: int
    draws: bool
    _start: Callable[..., None]

    def __call__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        seed: int,
        offset: int,
        stream: int,
        *,
        seeds: int = 0,
    ) -> None:
        """Make and pack on a stream of the device that this was prepared for, which is current.

        Args:
            inputs: addresses of upstream, pre, up, the mask and the rows of a cross-entropy, whose
                logits are pre; 0 for what the producer does not take.
            outputs: addresses of the dense gradient, the operands along features and along tokens
                and the sums, 0 for what was not asked for; then the same of the second gradient.
            seed, offset, stream, seeds: see ``launch.PreparedPack``. The second gradient draws
                with an offset that is SECOND_OFFSET more.
        """
        self._start(stream, *inputs, *outputs, seeds, seed, offset)


@functools.lru_cache(maxsize=1024)
def prepare_produced(
    kind: ProducerKind,
    shape: tuple[int, int],
    row_strides: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    dense: bool = False,
    features: str | None = None,
    tokens: str | None = None,
    features_layout: MetadataLayout | None = None,
    tokens_layout: MetadataLayout | None = None,
    n: int = 2,
    column_sums: bool = False,
    scale: float = 1.0,
    smooths: bool = False,
    seeds_in_memory: bool = False,
) -> PreparedProduced:
    """Resolve once what makes a gradient and writes it as it is asked for.

    Args:
        kind: what it is made of.
        shape: [M, K], K a multiple of 8.
        row_strides: elements from a row to the next of upstream, pre and up; multiples of 8. What
            is not taken counts for nothing.
        dtype: float16 or bfloat16.
        device: see ``launch.prepare_pack``.
        dense: whether the gradient is written as it is, [M, K] without gaps.
        features, tokens, features_layout, tokens_layout, n, column_sums, seeds_in_memory: see
            ``launch.prepare_pack``; no method is rescaled_magnitude, which reads twice.
        scale: what dropout multiplies the kept by, if masked.
        smooths: whether labels are smoothed, for cross_entropy: no block reaches beyond K then, as
            where K is a multiple of WHOLE_BLOCKS.

    Returns:
        PreparedProduced: the same object for the same arguments, up to 1024 of them.

    Raises:
        ValueError: a width or stride that is not whole octets, smoothed labels over blocks that
            reach beyond a row, a method that cannot be fused, or a layout that does not fit.
        ModuleNotFoundError: where Triton cannot be imported.
    """
    num_rows, num_cols = shape
    for name, value in (("width", num_cols), *(("row_stride", stride) for stride in row_strides)):
        if value % OCTET:
            rule = f"a multiple of {OCTET}"
            raise value_error("prepare_produced", name, rule, value, "Leave it unfused.")
    if "rescaled_magnitude" in (features, tokens):
        rule = "one that reads the gradient once"
        raise value_error("prepare_produced", "method", rule, features, "Leave it unfused.")
    along_features = target_of(features, features_layout)
    along_tokens = target_of(tokens, tokens_layout)
    blocks = blocks_of(shape, dtype, along_features, along_tokens)
    tile, grid = blocks.tile, blocks.grid
    pack = PackVariant(
        dtype,
        blocks.features,
        blocks.tokens,
        tile,
        n,
        NO_RATIO,
        column_sums,
        seeds_in_memory,
    )
    if smooths and grid[0] * tile.block_k != num_cols:
        rule = f"a multiple of {WHOLE_BLOCKS} where labels are smoothed"
        raise value_error("prepare_produced", "width", rule, num_cols, "Leave it unfused.")
    start = prepare_kernel(
        "produced_kernel",
        device,
        grid,
        (
            num_rows,
            num_cols // OCTET,
            *(stride // OCTET for stride in row_strides),
            *blocks.tails,
            _bits(scale),
        ),
        ProducedVariant(kind, dense, pack).constants(native=not interpreted()),
        kind.tile(tile).num_warps,
    )
    return PreparedProduced(
        grid[1] * grid[2] * tile.block_m,
        (grid[1] * grid[2], num_cols) if column_sums else None,
        *operand_nbytes(shape, dtype, along_features, along_tokens),
        features in STOCHASTIC or tokens in STOCHASTIC,
        start,
    )


def cross_entropy_rows(
    lse: Tensor,
    target: Tensor,
    row_scale: Tensor,
    columns: int,
    covered_rows: int,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    first: int = 0,
    vocabulary: int | None = None,
) -> Tensor:
    """Return what the kernel knows of each row of logits.

    g = 2**(logit log2(e) + shift) * weight + base, and + hit in the column of the target

    Args:
        lse, target, row_scale, label_smoothing, z_loss, first, vocabulary: see
            ``pruning.producers.cross_entropy_gradient``.
        columns: of the logits.
        covered_rows: of the prepared call.

    Returns:
        float32 [covered_rows, 8]: shift, weight, base, what is added to the two columns
        of the target's pair, the number of that pair, and two without a meaning. Rows without
        weight, and those beyond M, are zero.
    """
    table = lse.new_zeros((covered_rows, _ROW_FLOATS), dtype=torch.float32)
    kept = row_scale != 0
    column = target - first
    column = torch.where(kept & (column >= 0) & (column < columns), column, -2)
    odd = column & 1
    hit = row_scale * (label_smoothing - 1)
    floats = (
        lse * -math.log2(math.e),
        row_scale * (1 + 2 * z_loss * lse),
        row_scale * (-label_smoothing / (vocabulary or columns)),
        hit * (1 - odd),
        hit * odd,
        column >> 1,
    )
    stacked = torch.stack([one.float() for one in floats], 1)
    table[: len(lse), : len(floats)] = torch.where(kept[:, None], stacked, 0.0)
    return table


def _bits(scale: float) -> int:
    """Return a float32 as the integer with the same bits."""
    return int(struct.unpack("<i", struct.pack("<f", scale))[0])
