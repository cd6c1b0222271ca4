"""Floats as integers: magnitudes that compare without arithmetic, and what is too large for one."""

import torch
from torch import Tensor

#: Bytes of an element -> the integer dtype that its bits are seen as.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: n -> (every 4-bit mask with n bits set, one per hex digit; how many there are). Integer constants
#: and not a tensor: a table would have to be copied to the device on every call.
SUBSETS = {1: (0x8421, 4), 2: (0xCA9653, 6), 3: (0xEDB7, 4)}
FNUZ = tuple(
    getattr(torch, name) for name in ("float8_e4m3fnuz", "float8_e5m2fnuz") if hasattr(torch, name)
)
FLOAT_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    *FNUZ,
)
# dtype -> the magnitude_bits of its largest finite number: Inf and NaN alone lie above.
_LARGEST_FINITE = {
    torch.float64: 0x7FEF_FFFF_FFFF_FFFF,
    torch.float32: 0x7F7F_FFFF,
    torch.float16: 0x7BFF,
    torch.bfloat16: 0x7F7F,
    torch.float8_e4m3fn: 0x7E,
    torch.float8_e5m2: 0x7B,
    **dict.fromkeys(FNUZ, 0x7F),
}


def magnitude_bits(x: Tensor) -> Tensor:
    """Return integers that order like |x| with NaN on top: the bits with the sign cleared."""
    size = x.element_size()
    bits = x.view(BITS[size])
    cleared: Tensor = bits & (2 ** (8 * size - 1) - 1)
    if x.dtype in FNUZ:  # NaN is what would be -0.0 elsewhere
        return cleared.to(torch.int16).masked_fill(bits == -128, 128)
    return cleared


def overflows(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return where keys, the ``magnitude_bits`` of numbers of dtype, stand for an Inf or NaN."""
    return keys > _LARGEST_FINITE[dtype]


def where(mask: Tensor, x: Tensor, other: Tensor | int = 0) -> Tensor:
    """Return x where mask, else other, by their bits: -0.0 stays, and fp8 has no torch.where."""
    if isinstance(other, Tensor):
        other = other.view(BITS[other.element_size()])
    return torch.where(mask, x.view(BITS[x.element_size()]), other).view(x.dtype)
