"""What packing says in PTX, emulated, against its twin, which the interpreter runs."""

import itertools

import numpy as np
import ptx
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the device functions are Triton's")
import triton.language as tl  # noqa: E402

from sdgp_cusparselt.packing import halves, selection, starting  # noqa: E402

pytestmark = pytest.mark.skipif(
    not starting.interpreted(), reason="the twin is what the interpreter runs"
)
KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
EDGES = (0, 1, 2, 0x7F, 0x80, 0x3FF, 0x400, 0x3C00, 0x3F80, 0x7BFF, 0x7C00, 0x7C01, 0x7F7F)
EDGES = (*EDGES, 0x7F80, 0x7F81, 0x7FFF)


@triton.jit
def _run(
    out, a, b, c, WHICH: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr, SIZE: tl.constexpr
):
    at = tl.arange(0, SIZE)
    if WHICH == "permute":
        got = halves.permute(tl.load(a + at), tl.load(b + at), tl.load(c + at), NATIVE)
    elif WHICH == "beside":
        got = halves.beside(tl.load(a + at), tl.load(b + at), NATIVE)
    elif WHICH == "round":
        low = tl.load(b + at).to(tl.float32, bitcast=True)
        high = tl.load(c + at).to(tl.float32, bitcast=True)
        got = halves.round_halves(low, high, DTYPE, NATIVE)
    elif WHICH == "raise":
        amount = tl.load(b + at).to(tl.float32, bitcast=True)
        got = halves.raise_to(tl.load(a + at), amount, DTYPE, NATIVE)
    else:
        got = halves.without_negative_zero(tl.load(a + at))
    tl.store(out + at, got)


@triton.jit
def _run_drawn(out, points, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    before, behind = tl.load(points + at), tl.load(points + SIZE + at)
    a0, left_two = tl.load(points + 2 * SIZE + at), tl.load(points + 3 * SIZE + at)
    right_two = tl.load(points + 4 * SIZE + at)
    a2, a3 = tl.load(points + 5 * SIZE + at), tl.load(points + 6 * SIZE + at)
    got = selection.drawn_two(before, behind, a0, left_two, right_two, a2, a3, False)
    tl.store(out + at, got)


def twin(which: str, dtype: torch.dtype, a: Tensor, b: Tensor, c: Tensor) -> np.ndarray:
    size = 1 << (len(a) - 1).bit_length()
    padded = [torch.nn.functional.pad(t, (0, size - len(t))) for t in (a, b, c)]
    out = torch.empty(size, dtype=torch.int32)
    _run[(1,)](out, *padded, WHICH=which, DTYPE=KINDS[dtype], NATIVE=False, SIZE=size)
    return out[: len(a)].numpy().view(np.uint32)


def emulated(asm: str, *operands: Tensor) -> np.ndarray:
    registers = {f"${i + 1}": t.numpy().view(np.uint32) for i, t in enumerate(operands)}
    return ptx.run(asm, registers)


def ptx_of(which: str, dtype: torch.dtype) -> str:
    suffix = "BF16" if dtype == torch.bfloat16 else "FP16"
    return str(getattr(halves, f"PTX_{which}_{suffix}").value)


def every_half() -> Tensor:
    """Each 16-bit pattern once in each half, against shuffled others."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.arange(65536)
    words = pattern | torch.randperm(65536, generator=generator) << 16
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def floats(count: int, sign: bool) -> Tensor:
    """float32 bits: every exponent, ties of both 16-bit types, Inf and NaN."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 2**31, (count,), generator=generator)
    # Halves of an ulp of bf16 and of fp16, exactly and next to them.
    near = torch.randint(-1, 2, (count,), generator=generator)
    for step, share in ((0x8000, 0.25), (0x1000, 0.5)):
        tie = (bits // (2 * step) * 2 * step + step + near).clamp(0, 2**31 - 1)
        bits = torch.where(torch.rand(count, generator=generator) < share, tie, bits)
    special = torch.tensor([0, 1, 0x200, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001])
    bits[: len(special)] = special
    # Around fp16's range, where most of all float32 are not.
    middle = torch.rand(count, generator=generator) < 0.4
    exponent = torch.randint(100, 146, (count,), generator=generator) << 23
    bits = torch.where(middle, exponent | bits & 0x7FFFFF, bits)
    if sign:
        bits = torch.where(torch.rand(count, generator=generator) < 0.5, bits - 2**31, bits)
    return bits.to(torch.int32)


def test_permute() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (
        torch.randint(-(2**31), 2**31, (4096,), generator=generator, dtype=torch.int64).int()
        for _ in range(2)
    )
    every = torch.tensor([int("".join(d), 8) for d in itertools.product("01234567", repeat=4)])
    octal = [every >> 3 * i & 7 for i in range(4)]
    selector = sum(nibble << 4 * i for i, nibble in enumerate(octal)).int()
    got = twin("permute", torch.half, a, b, selector)
    assert np.array_equal(got, emulated(str(halves.PTX_PERMUTE.value), a, b, selector))
    # Bits above the four nibbles are cargo.
    loaded = selector | 0x5 << 28
    assert np.array_equal(got, twin("permute", torch.half, a, b, loaded))
    assert np.array_equal(got, emulated(str(halves.PTX_PERMUTE.value), a, b, loaded))


def test_beside_is_the_word_itself() -> None:
    words, others = every_half(), floats(65536, True)
    got = twin("beside", torch.half, words, others, others)
    assert np.array_equal(got, words.numpy().view(np.uint32))
    asm = str(halves.PTX_COPY.value)
    assert np.array_equal(emulated(asm, words, others), words.numpy().view(np.uint32))


@pytest.mark.parametrize("dtype", KINDS)
def test_round_halves(dtype: torch.dtype) -> None:
    low, high = floats(65536, True), floats(65536, True).flip(0).contiguous()
    got = twin("round", dtype, low, low, high)
    assert np.array_equal(got, emulated(ptx_of("ROUND", dtype), low, high))
    value = low.view(torch.float32)
    want = value.to(dtype).view(torch.int16).int() & 0xFFFF
    known = ~value.isnan()
    assert torch.equal(torch.from_numpy(got.astype(np.int64) & 0xFFFF)[known].int(), want[known])


@pytest.mark.parametrize("dtype", KINDS)
def test_raise_to(dtype: torch.dtype) -> None:
    """Every pattern of 16 bits, NaN among them, with amounts of every exponent, Inf and NaN."""
    words = every_half()
    for amount in (floats(65536, False), torch.zeros(65536, dtype=torch.int32)):
        if amount.any():
            # As in the kernels: a group that holds an Inf or a NaN has a NaN amount.
            limit = 0x7F80 if dtype == torch.bfloat16 else 0x7C00
            size = torch.maximum(words & 0x7FFF, (words >> 16) & 0x7FFF)
            amount = torch.where(size < limit, amount, 0x7FC00000).to(torch.int32)
        else:
            words = torch.where(nan_half(words, dtype), 0, words).to(torch.int32)
        got = twin("raise", dtype, words, amount, words)
        assert np.array_equal(got, emulated(ptx_of("RAISE", dtype), words, amount))
        value = torch.from_numpy(got.view(np.int32).copy()).view(torch.int16).view(dtype)
        given = words.view(torch.int16).view(dtype)
        want = torch.maximum(
            given.float().abs(),
            amount.view(torch.float32).to(dtype).float().repeat_interleave(2),
        )
        assert torch.equal(value.float().abs().nan_to_num(-1), want.nan_to_num(-1))
        assert torch.equal(value.signbit(), given.signbit())


def test_the_selector_of_two_drawn() -> None:
    """Every order of a few sizes and points, ties, zeros, Inf and NaN among them."""
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, torch.inf, torch.nan])
    members = torch.cartesian_prod(*[sizes] * 4)
    points = torch.cartesian_prod(*[torch.tensor([0.0, 0.75, 1.0, 1.5, 2.0, torch.nan])] * 2)
    a0, a1, a2, a3 = members.repeat_interleave(len(points), 0).T
    before, behind = points.repeat(len(members), 1).T
    rows = [before, behind, a0, a0 + a1, a2 + a3, a2, a3]
    count = len(a0)
    size = 1 << (count - 1).bit_length()
    given = torch.zeros(7, size)
    given[:, :count] = torch.stack(rows)
    out = torch.empty(size, dtype=torch.int32)
    _run_drawn[(1,)](out, given, SIZE=size)
    got = out[:count].numpy().view(np.uint32)
    asm = str(selection.PTX_DRAWN_TWO.value)
    bits = [row.contiguous().view(torch.int32) for row in rows]
    assert np.array_equal(got, emulated(asm, *bits))
    # Every pair of members, in order; what each names is ``sampling``'s to judge.
    assert set((got >> 28).tolist()) == {1 << 2, 2 << 2, 3 << 2, 1 | 2 << 2, 1 | 3 << 2, 2 | 3 << 2}


def nan_half(words: Tensor, dtype: torch.dtype) -> Tensor:
    return words.view(torch.int16).view(dtype).isnan().view(-1, 2).any(-1)


def test_without_negative_zero() -> None:
    words = every_half()
    got = twin("zero", torch.half, words, words, words).view(np.uint16)
    before = words.numpy().view(np.uint16)
    assert np.array_equal(got, np.where(before == 0x8000, 0, before))


def test_the_emulation_refuses_what_it_does_not_know() -> None:
    word = {"$1": np.zeros(1, dtype=np.uint32)}
    with pytest.raises(ValueError, match="not emulated"):
        ptx.run("add.s32 $0, $1, $1;", word)
    with pytest.raises(ValueError, match="replicates a sign"):
        ptx.run("prmt.b32 $0, $1, $1, 0x0008;", word)
