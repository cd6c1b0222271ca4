"""Packed24: a 2:4 operand as the library holds it, values then metadata in one allocation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdgp_cusparselt.errors import type_error, value_error
from sdgp_cusparselt.packing.layout import MetadataLayout, padded_shape
from sdgp_cusparselt.packing.nibbles import collect

# Integers as wide as an element: packing moves bits and never rounds.
BITS = {1: torch.int8, 2: torch.int16}

# Element types whose groups are 2 of 4; fp32 is 1 of 2 on this hardware and has another format.
PACKED_DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


@dataclass(frozen=True)
class Packed24:
    """A [rows, cols] operand with two of every four elements along cols kept.

    buffer = values [padded_rows, padded_cols / 2], row-major | metadata, in ``layout``

    Attributes:
        buffer: uint8, the one allocation that the library is given a pointer to.
        shape: rows and columns of the operand before padding.
        dtype: element type of the values.
        layout: where each nibble of the metadata lies.
        transposed: whether the operand is the transpose of the tensor that was packed.
    """

    buffer: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    layout: MetadataLayout
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.buffer.dtype != torch.uint8 or not self.buffer.is_contiguous():
            raise type_error(
                "Packed24",
                "buffer",
                "one contiguous uint8 tensor",
                f"{self.buffer.dtype} with strides {self.buffer.stride()}",
                "Allocate it with Packed24.empty.",
            )
        expected = buffer_nbytes(self.shape, self.dtype, self.layout)
        if self.buffer.numel() != expected:
            raise value_error(
                "Packed24",
                "buffer",
                f"{expected} bytes for {self.shape} {self.dtype} in layout {self.layout.name!r}",
                self.buffer.numel(),
                "Allocate it with Packed24.empty.",
            )

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        dtype: torch.dtype,
        layout: MetadataLayout,
        *,
        device: torch.device | str = "cpu",
        transposed: bool = False,
    ) -> Packed24:
        """Allocate an operand whose bytes are still to be written.

        Raises:
            TypeError: if the dtype has no 2:4 format.
            ValueError: if the layout's tiles do not fit the padded shape.
        """
        buffer = torch.empty(buffer_nbytes(shape, dtype, layout), dtype=torch.uint8, device=device)
        return cls(buffer, shape, dtype, layout, transposed)

    @property
    def padded_shape(self) -> tuple[int, int]:
        """Rows and columns as the library sees them."""
        return padded_shape(*self.shape, self.dtype)

    @property
    def values(self) -> Tensor:
        """[padded_rows, padded_cols / 2] view of the kept elements, in column order."""
        rows, cols = self.padded_shape
        flat = self.buffer[: rows * cols // 2 * self.dtype.itemsize].view(self.dtype)
        return flat.view(rows, cols // 2)

    @property
    def metadata(self) -> Tensor:
        """uint8 view of the index nibbles, two a byte, in ``layout``."""
        rows, cols = self.padded_shape
        return self.buffer[rows * cols // 2 * self.dtype.itemsize :]

    @property
    def device(self) -> torch.device:
        """Where the buffer lies."""
        return self.buffer.device

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata together."""
        return self.buffer.numel()

    def unpack(self) -> Tensor:
        """Return the dense operand, exactly.

        dense[r, 4 g + i] = the kept value whose index is i, or +0

        Returns:
            Tensor: [rows, cols] of ``dtype``, padding removed.
        """
        rows, cols = self.padded_shape
        nibbles = collect(self.metadata, self.layout, rows, cols)
        index = torch.stack((nibbles & 3, nibbles >> 2), -1).to(torch.int64)
        kept = self.values.view(BITS[self.dtype.itemsize]).view(rows, -1, 2)
        dense = kept.new_zeros((rows, cols // 4, 4)).scatter_(-1, index, kept)
        dense = dense.view(rows, cols).view(self.dtype)
        return dense[: self.shape[0], : self.shape[1]].contiguous()

    def __repr__(self) -> str:
        rows, cols = self.shape
        return (
            f"Packed24({rows} x {cols}, {self.dtype}, layout={self.layout.name!r}, "
            f"{self.nbytes} bytes on {self.device}{', transposed' if self.transposed else ''})"
        )


def buffer_nbytes(shape: tuple[int, int], dtype: torch.dtype, layout: MetadataLayout) -> int:
    """Return the bytes of values and metadata of an operand.

    Raises:
        TypeError: if the dtype has no 2:4 format.
        ValueError: if the layout's tiles do not fit the padded shape.
    """
    if dtype not in PACKED_DTYPES:
        raise type_error(
            "Packed24",
            "dtype",
            "one of " + ", ".join(str(known) for known in PACKED_DTYPES),
            dtype,
            "Cast the tensor; fp32 has another sparse format (1 of 2).",
        )
    rows, cols = padded_shape(*shape, dtype)
    misfit = layout.misfit(rows, cols)
    if misfit is not None:
        raise value_error(
            "Packed24",
            "layout",
            f"one that fits {rows} x {cols}",
            f"{layout.name!r}: {misfit}",
            "Use default_layout(rows, cols) or the layout learned for this shape.",
        )
    return rows * cols // 2 * dtype.itemsize + layout.nbytes(rows, cols)
