"""What the few PTX instructions of ``packing`` do, in NumPy, written from the PTX manual.

Every half is widened to float64, where products and sums of two 16-bit floats are exact, and
rounded once: an emulation that shares nothing with the code it judges.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
NAN = 0x7FFF  # the canonical NaN of both 16-bit types


def widen(half: NDArray[np.uint32], kind: str) -> NDArray[np.float64]:
    if kind == "bf16":
        return (half.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return half.astype(np.uint16).view(np.float16).astype(np.float64)


def narrow(value: NDArray[np.float64], kind: str) -> NDArray[np.uint32]:
    """Round to nearest, ties to even, from at most a float32's or a 16-bit product's digits."""
    if kind == "f16":
        bits = value.astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        # The exact value lies between two neighbours among bf16; compare distances in float64.
        down = (value.astype(np.float32).view(np.uint32) & 0xFFFF0000).astype(np.uint32)
        # float32 may have rounded across a bf16 border only onto it, where truncation is exact.
        up = down + np.uint32(0x10000)
        low = down.view(np.float32).astype(np.float64)
        high = up.view(np.float32).astype(np.float64)
        infinite = ~np.isfinite(high)
        # Beyond the largest number lies what would be the next one, for the purpose of rounding.
        high = np.where(infinite & np.isfinite(low), np.copysign(2.0**128, low), high)
        to_low, to_high = np.abs(value - low), np.abs(high - value)
        odd = (down >> 16 & 1).astype(bool)
        take_high = (to_high < to_low) | ((to_high == to_low) & odd)
        bits = np.where(take_high & np.isfinite(low), up, down) >> 16
    return np.where(np.isnan(value), NAN, bits).astype(np.uint32)


def _halves(word: Words) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    return word & np.uint32(0xFFFF), word >> np.uint32(16)


def _join(low: NDArray[np.uint32], high: NDArray[np.uint32]) -> Words:
    return (low | high << np.uint32(16)).astype(np.uint32)


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    eight = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        if (nibble & 8).any():
            raise ValueError("prmt: bit 3 of a nibble replicates a sign, which nothing here wants")
        byte = eight >> (nibble.astype(np.uint64) * np.uint64(8)) & np.uint64(255)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def _lop3(a: Words, b: Words, c: Words, table: int) -> Words:
    out = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            term = np.full_like(a, 0xFFFFFFFF)
            for word, bit in ((a, 4), (b, 2), (c, 1)):
                term &= word if index & bit else ~word
            out |= term
    return out


def _max_nan(x: NDArray[np.uint32], y: NDArray[np.uint32], kind: str) -> NDArray[np.uint32]:
    a, b = widen(x, kind), widen(y, kind)
    # +0 is larger than -0.
    larger = np.where((a > b) | ((a == b) & (x <= y)), x, y)
    return np.where(np.isnan(a) | np.isnan(b), NAN, larger).astype(np.uint32)


def _setp(comparison: str, a: Words, b: Words) -> NDArray[np.bool_]:
    """Compare two float32; ordered: false where either is NaN."""
    x, y = a.view(np.float32), b.view(np.float32)
    return {"lt": x < y, "gt": x > y}[comparison]


def _fma(
    x: NDArray[np.uint32], y: NDArray[np.uint32], z: NDArray[np.uint32], kind: str
) -> NDArray[np.uint32]:
    return narrow(widen(x, kind) * widen(y, kind) + widen(z, kind), kind)


@np.errstate(all="ignore")
def run(asm: str, operands: dict[str, Words]) -> Words:
    """Execute PTX text on registers that hold 32-bit words; return $0."""
    registers: dict[str, Words | NDArray[np.bool_]] = dict(operands)
    count = len(next(iter(operands.values())))

    def value(name: str) -> Any:
        if name in registers:
            return registers[name]
        # 0f is followed by the bits of a float32.
        bits = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
        return np.full(count, bits, dtype=np.uint32)

    body = re.sub(r"\.reg\s+\.(b32|pred)[^;]*;", "", asm.replace("{", "").replace("}", ""))
    for statement in filter(None, (line.strip() for line in body.split(";"))):
        opcode, _, rest = statement.partition(" ")
        target, *names = (name.strip() for name in rest.split(","))
        kind = "bf16" if "bf16x2" in opcode else "f16"
        base = opcode.split(".")[0]
        if base == "mov":
            result = value(names[0])
        elif opcode == "or.b32":
            result = value(names[0]) | value(names[1])
        elif opcode in ("setp.lt.f32", "setp.gt.and.f32"):
            result = _setp(opcode.split(".")[1], value(names[0]), value(names[1]))
            result = result & value(names[2]) if ".and." in opcode else result
        elif opcode == "selp.b32":
            result = np.where(value(names[2]), value(names[0]), value(names[1]))
        elif base == "prmt":
            result = _prmt(*(value(name) for name in names))
        elif base == "lop3":
            result = _lop3(*(value(name) for name in names[:3]), int(names[3], 0))
        elif opcode in ("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"):
            high, low = (value(name).view(np.float32).astype(np.float64) for name in names)
            result = _join(narrow(low, kind), narrow(high, kind))
        elif opcode in ("abs.bf16x2", "abs.f16x2"):
            result = value(names[0]) & np.uint32(0x7FFF7FFF)
        elif opcode in ("max.NaN.bf16x2", "max.NaN.f16x2", "fma.rn.bf16x2", "fma.rn.f16x2"):
            split = [_halves(value(name)) for name in names]
            function = _max_nan if base == "max" else _fma
            result = _join(*(function(*(part[i] for part in split), kind) for i in (0, 1)))
        else:
            raise ValueError(f"run: {opcode} is not emulated")
        registers[target] = result
    return registers["$0"]
