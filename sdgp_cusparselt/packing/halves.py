"""Arithmetic on two 16-bit halves of a 32-bit word: PTX where it runs natively, and its twin.

Each function has two branches that give the same bits. NATIVE is one or a few PTX instructions;
the other is plain integer arithmetic, which Triton's interpreter can run. The strings are what
the tests emulate, instruction by instruction, against the other branch.
"""

import triton
import triton.language as tl

# Two of the kept, in the order of a register: the low half is the member that comes first.
LOW_HALVES = tl.constexpr(0x5410)
HIGH_HALVES = tl.constexpr(0x7632)

PTX_COPY = tl.constexpr("mov.b32 $0, $1;")
PTX_PERMUTE = tl.constexpr("prmt.b32 $0, $1, $2, $3;")
PTX_ROUND_BF16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
PTX_ROUND_FP16 = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
# 0xEA is (a & b) | c: the signs of $1 on the larger amount.
PTX_RAISE_BF16 = tl.constexpr(
    """{ .reg .b32 a, m;
    cvt.rn.bf16x2.f32 a, $2, $2;
    abs.bf16x2 m, $1;
    max.NaN.bf16x2 m, m, a;
    lop3.b32 $0, $1, 0x80008000, m, 0xEA; }"""
)
PTX_RAISE_FP16 = tl.constexpr(
    """{ .reg .b32 a, m;
    cvt.rn.f16x2.f32 a, $2, $2;
    abs.f16x2 m, $1;
    max.NaN.f16x2 m, m, a;
    lop3.b32 $0, $1, 0x80008000, m, 0xEA; }"""
)


@triton.jit
def permute(low, high, selector, NATIVE: tl.constexpr):
    """Four bytes of the eight high:low; each of the selector's low nibbles, 0 to 7, names one."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            PTX_PERMUTE, "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        selector = low * 0 + selector
        eight = low.to(tl.uint32, bitcast=True).to(tl.uint64)
        eight |= high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
        word = eight * 0
        for byte in tl.static_range(4):
            shift = (((selector >> (4 * byte)) & 7) * 8).to(tl.uint64)
            word |= ((eight >> shift) & 0xFF) << (8 * byte)
        return word.to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def beside(word, loaded, NATIVE: tl.constexpr):
    """word itself, computed where ``loaded`` lies and nowhere else.

    To spare an exchange between threads the compiler computes again, in another thread, what
    nothing loaded goes into: without this, all of Philox.
    """
    if NATIVE:
        return tl.inline_asm_elementwise(
            PTX_COPY, "=r,r,r", [word, loaded], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return word


@triton.jit
def without_negative_zero(word):
    """-0 becomes +0 in both halves; nothing else changes."""
    # The sum carries into a half's sign wherever the rest of it is not zero.
    nonzero = (word & 0x7FFF7FFF) + 0x7FFF7FFF
    return word & (nonzero | 0x7FFF7FFF)


@triton.jit
def floats_of(word, DTYPE: tl.constexpr):
    """The low half and the high half as float32."""
    if tl.bfloat16 == DTYPE:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def sizes_of(word, DTYPE: tl.constexpr):
    """|low half| and |high half| as float32."""
    low, high = floats_of(word, DTYPE)
    return tl.abs(low), tl.abs(high)


@triton.jit
def _rounded(value, DTYPE: tl.constexpr):
    """The twin of cvt.rn: the 16 bits nearest to a float32, ties to even; NaN is 0x7FFF."""
    if tl.bfloat16 == DTYPE:
        wide = value.to(tl.uint32, bitcast=True)
        bits = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).to(tl.int32, bitcast=True)
    else:
        bits = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return tl.where(value != value, 0x7FFF, bits)


@triton.jit
def round_halves(low, high, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Two float32 rounded to nearest even, as the halves of a word."""
    if NATIVE:
        if tl.bfloat16 == DTYPE:
            return tl.inline_asm_elementwise(
                PTX_ROUND_BF16, "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                PTX_ROUND_FP16, "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
            )
    else:
        return _rounded(low, DTYPE) | (_rounded(high, DTYPE) << 16)


@triton.jit
def raise_to(word, amount, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """sign | max(|half|, amount rounded) of both halves; NaN is larger than all else."""
    if NATIVE:
        if tl.bfloat16 == DTYPE:
            return tl.inline_asm_elementwise(
                PTX_RAISE_BF16, "=r,r,r", [word, amount], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                PTX_RAISE_FP16, "=r,r,r", [word, amount], dtype=tl.int32, is_pure=True, pack=1
            )
    else:
        size = _rounded(amount, DTYPE)
        low = tl.maximum(word & 0x7FFF, size)
        high = tl.maximum((word >> 16) & 0x7FFF, size)
        return (word & -0x7FFF8000) | low | (high << 16)
