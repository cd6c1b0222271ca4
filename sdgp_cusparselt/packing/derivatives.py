"""The elementwise part of a producer: float32 arithmetic of activations, as device functions.

``pruning.producers`` has the twins. Two transcendentals an element at most, everything else is
multiplied and added, so that the memory stays the slower of the two. Errors relative to the exact
value, beside a rounding's 2**-8 of bfloat16 and 2**-11 of float16; those of the hardware's own exp2
and reciprocal, 2**-22 and 2**-23, are in them:

- gelu: 2**-15.7 of act' (2**-20 absolute where act' is below 0.05), 2**-14 of act.
- gelu_tanh, silu: 2**-17 of both (2**-19 absolute where act' is below 0.25).
- relu, relu_squared: exact before the one rounding.
- cross_entropy: 2**-22 max(|logit|, |lse|, 1) of the probability.
"""

import triton
import triton.language as tl

from sdgp_cusparselt.packing.halves import floats_of, round_halves

PTX_EXP2 = tl.constexpr("ex2.approx.ftz.f32 $0, $1;")
PTX_RECIPROCAL = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
PTX_AT = tl.constexpr(
    """{ .reg .f32 d;
    sub.rn.f32 d, $1, $2;
    abs.f32 d, d;
    sub.rn.sat.f32 $0, 0f3F800000, d; }"""
)

GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
SILU = tl.constexpr(3)
RELU = tl.constexpr(4)
RELU_SQUARED = tl.constexpr(5)
CROSS_ENTROPY = tl.constexpr(6)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x, NATIVE: tl.constexpr):
    """2**x; results below the smallest normal float32 are 0."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            PTX_EXP2, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x, NATIVE: tl.constexpr):
    """1 / x."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            PTX_RECIPROCAL, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _gelu(x, NATIVE: tl.constexpr):
    """act and act' of x * Phi(x): Phi(-|x|) = exp(-x**2 / 2) q(t), t = 1 / (1 + p |x|).

    The form is Hastings' (Abramowitz and Stegun 7.1.26); p and q are fitted to what is relative to
    Phi and act' alike: neither loses its digits where it is small. One exponential serves both.
    """
    density = exp2((x * -0.7213475204444817) * x, NATIVE)
    t = reciprocal(tl.fma(tl.abs(x), 0.369, 1.0), NATIVE)
    q = tl.fma(t, -0.09152645178176712, 0.21418736874575584)
    q = tl.fma(t, q, 0.0732728915257144)
    q = tl.fma(t, q, 0.15757889799294786)
    q = tl.fma(t, q, 0.14647928364992321)
    tail = (q * t) * density
    phi = tl.where(x < 0, tail, 1.0 - tail)
    return x * phi, tl.fma(x * 0.3989422804014327, density, phi)


@triton.jit
def _gelu_tanh(x, NATIVE: tl.constexpr):
    """act and act' of x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x**3)."""
    square = x * x
    # -2 log2(e) sqrt(2 / pi), and that times 0.044715
    exponent = x * tl.fma(square, -0.10294324, -2.3022082)
    s = reciprocal(1.0 + exp2(exponent, NATIVE), NATIVE)
    slope = (1.0 - s) * tl.fma(square, 0.2140644488, 1.5957691216)
    value = x * s
    return value, tl.fma(value, slope, s)


@triton.jit
def _silu(x, NATIVE: tl.constexpr):
    """act and act' of x * sigmoid(x)."""
    s = reciprocal(1.0 + exp2(x * -LOG2_E, NATIVE), NATIVE)
    return x * s, s * tl.fma(x, 1.0 - s, 1.0)


@triton.jit
def activation(x, g, PRODUCER: tl.constexpr, NATIVE: tl.constexpr):
    """act(x) and g * act'(x), in float32; a NaN of x reaches act, and passes g where it is relu."""
    if PRODUCER == GELU:
        value, slope = _gelu(x, NATIVE)
        return value, g * slope
    elif PRODUCER == GELU_TANH:
        value, slope = _gelu_tanh(x, NATIVE)
        return value, g * slope
    elif PRODUCER == SILU:
        value, slope = _silu(x, NATIVE)
        return value, g * slope
    elif PRODUCER == RELU_SQUARED:
        return tl.where(x <= 0, 0.0, x * x), tl.where(x <= 0, 0.0, g * (x + x))
    else:
        return tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, g)


@triton.jit
def activation_words(
    g, x, up, keep, PRODUCER: tl.constexpr, GATED: tl.constexpr, MASKED: tl.constexpr,
    DTYPE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Words of the gradients of x and of up, each rounded once; the second is g if not gated.

    Args:
        g, x, up: int32, two columns a word.
        keep: float32 factors of the two columns, a pair; not looked at if not MASKED.
    """
    g_low, g_high = floats_of(g, DTYPE)
    x_low, x_high = floats_of(x, DTYPE)
    if MASKED:
        g_low *= keep[0]
        g_high *= keep[1]
    d_low, d_high = g_low, g_high
    if GATED:
        up_low, up_high = floats_of(up, DTYPE)
        d_low *= up_low
        d_high *= up_high
    value_low, d_low = activation(x_low, d_low, PRODUCER, NATIVE)
    value_high, d_high = activation(x_high, d_high, PRODUCER, NATIVE)
    first = round_halves(d_low, d_high, DTYPE, NATIVE)
    second = g
    if GATED:
        second = round_halves(g_low * value_low, g_high * value_high, DTYPE, NATIVE)
    return first, second


@triton.jit
def _at(place, number, NATIVE: tl.constexpr):
    """1.0 where two float32 integers are equal, else 0.0: on the pipe that packing leaves idle."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            PTX_AT, "=f,f,f", [place, number], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.where(place == number, 1.0, 0.0)


@triton.jit
def cross_entropy_words(
    x, pair, shift, weight, base, low_hit, high_hit, place, DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Words of the gradient of logits: 2**(x log2(e) + shift) * weight + base (+ hit).

    Args:
        x: int32, two columns a word.
        pair: float32, number of each word in its row.
        shift, weight, base: float32 [rows, 1]: -lse log2(e); row_scale (1 + 2 z_loss lse); what is
            added in every column.
        place, low_hit, high_hit: float32 [rows, 1]: the pair with the target, and what is added
            to its two columns, of which one is the target's.
    """
    low, high = floats_of(x, DTYPE)
    low = exp2(tl.fma(low, LOG2_E, shift), NATIVE)
    high = exp2(tl.fma(high, LOG2_E, shift), NATIVE)
    here = _at(place, pair, NATIVE)
    low = tl.fma(here, low_hit, tl.fma(low, weight, base))
    high = tl.fma(here, high_hit, tl.fma(high, weight, base))
    return round_halves(low, high, DTYPE, NATIVE)
