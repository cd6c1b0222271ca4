"""Read a packed buffer back in a layout and compare it with the operand that it should hold."""

import torch
from torch import Tensor

from sdgp_cusparselt.packing.layout import MetadataLayout
from sdgp_cusparselt.packing.nibbles import collect
from sdgp_cusparselt.packing.packed import BITS
from sdgp_cusparselt.packing.trials import row_blocks


def reading_fault(
    buffer: Tensor, layout: MetadataLayout, operand: Tensor, *, increasing: bool
) -> str | None:
    """Return where a buffer, read in a layout, is not the operand, or None if it is everywhere.

    Bytes that no product reads are left out of it: padding, and which pair an empty group or a
    lone non-zero was given.

    Args:
        buffer: uint8, values and metadata.
        layout: the order to read it in.
        operand: [rows, cols], padded and contiguous; its zeros are +0.
        increasing: whether every group must keep two increasing indices, as we write them.
    """
    rows, cols = operand.shape
    value_bytes = rows * cols // 2 * operand.dtype.itemsize
    size = value_bytes + layout.nbytes(rows, cols)
    if buffer.numel() != size:
        return f"{buffer.numel()} bytes, and layout {layout.name!r} has {size}"
    kind = BITS[operand.dtype.itemsize]
    values = buffer[:value_bytes].view(kind).view(rows, -1, 2)
    nibbles = collect(buffer[value_bytes:], layout, rows, cols)
    for part in row_blocks(rows, 4 * cols):
        first, second = nibbles[part] & 3, nibbles[part] >> 2
        if increasing and bool((first >= second).any()):
            return f"{int((first >= second).sum())} groups keep indices that do not increase"
        v0, v1 = values[part].unbind(-1)
        members = [(first == i) * v0 | (second == i) * v1 for i in range(4)]
        held = torch.stack(members, -1).flatten(1)
        wrong = held != operand[part].view(kind)
        if bool(wrong.any()):
            row, col = (int(i) for i in wrong.nonzero()[0])
            count = int(wrong.sum())
            return f"{count} elements differ, first ({part.start + row}, {col})"
    return None
