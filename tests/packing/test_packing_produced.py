"""The kernel that makes gradients and packs them: its gradient against float64, its bytes against
the reference's packing of that very gradient.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import packing_cases as cases
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="there is no kernel without Triton")
import triton
import triton.language as tl

from sdgp_cusparselt.devices import current_stream, on_device
from sdgp_cusparselt.packing import derivatives
from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing.launch import blocks_of
from sdgp_cusparselt.packing.layout import MetadataLayout
from sdgp_cusparselt.packing.packed import Packed24
from sdgp_cusparselt.packing.producing import (
    SECOND_OFFSET,
    WHOLE_BLOCKS,
    cross_entropy_rows,
    prepare_produced,
)
from sdgp_cusparselt.packing.reference import Draws, pack_operand
from sdgp_cusparselt.packing.variants import PRODUCER_CODES, ProducerKind, Target
from sdgp_cusparselt.pruning.producers import (
    ACTIVATIONS,
    ActivationBackward,
    CrossEntropyBackward,
    Producer,
)

SEED, OFFSET = 0x1234_5678_9ABC_DEF0, 2**40 + 12345
KINDS = [
    ProducerKind(name, gated, masked)
    for name, gated, masked in itertools.product(ACTIVATIONS, (False, True), (False, True))
]
# Relative to the exact value: of act' (absolute below the floor), and of act.
ERRORS = {
    "gelu": (2**-15.7, 0.05, 2**-14),
    "gelu_tanh": (2**-17, 0.25, 2**-17),
    "silu": (2**-17, 0.25, 2**-17),
    "relu": (0.0, 0.0, 0.0),
    "relu_squared": (2**-23, 0.0, 2**-23),
}
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass
class Made:
    """What the kernel wrote of each gradient."""

    dense: list[Tensor]
    features: list[Packed24]
    tokens: list[Packed24]
    sums: list[Tensor]


def name_of(kind: ProducerKind) -> str:
    more = ["gated"] * kind.gated + ["masked"] * kind.masked
    return " ".join([kind.name, *more])


def producer_of(kind: ProducerKind, rows: int, cols: int, dtype: torch.dtype) -> ActivationBackward:
    """Random inputs; those of the layer lie in rows that are further apart than they are wide."""
    upstream = torch.randn(rows, cols).to(dtype)
    wide = (3 * torch.randn(rows, 2 * cols)).to(dtype)
    up = wide[:, cols:] if kind.gated else None
    mask = torch.rand(rows, cols) < 0.7 if kind.masked else None
    return ActivationBackward(kind.name, upstream, wide[:, :cols], up, mask, 1 / 0.7)


def run_kernel(
    producer: Producer,
    method: str = "magnitude",
    layout: MetadataLayout = layouts.PLAIN,
    *,
    n: int = 2,
    features: bool = True,
    tokens: bool = True,
    dense: bool = True,
    device: str = "cpu",
) -> Made:
    """Launch on outputs that start as garbage."""
    if isinstance(producer, ActivationBackward):
        x = producer.upstream
        kind = ProducerKind(producer.activation, producer.up is not None, producer.mask is not None)
        tensors = [x, producer.pre, producer.up, producer.mask, None]
        scale, smooths = producer.scale, False
    else:
        x = producer.logits
        kind = ProducerKind("cross_entropy")
        tensors = [None, x, None, None, None]
        scale, smooths = 1.0, producer.label_smoothing > 0
    tensors = [None if t is None else t.to(device) for t in tensors]
    rows, cols = x.shape
    strides = [8 if t is None else t.stride(0) for t in tensors[:3]]
    prepared = prepare_produced(
        kind, (rows, cols), (strides[0], strides[1], strides[2]), x.dtype, torch.device(device),
        dense=dense, features=method if features else None, tokens=method if tokens else None,
        features_layout=layout, tokens_layout=layout, n=n, column_sums=True, scale=scale,
        smooths=smooths,
    )  # fmt: skip
    if isinstance(producer, CrossEntropyBackward):
        tensors[4] = cross_entropy_rows(
            producer.lse, producer.target, producer.row_scale, cols, prepared.covered_rows,
            label_smoothing=producer.label_smoothing, z_loss=producer.z_loss,
            first=producer.first, vocabulary=producer.vocabulary,
        ).to(device)  # fmt: skip
    made, addresses = Made([], [], [], []), []
    for _ in range(2 if kind.gated else 1):
        made.dense.append(torch.full((rows, cols), torch.nan, dtype=x.dtype, device=device))
        for way, size, found in (
            (False, prepared.features_nbytes, made.features),
            (True, prepared.tokens_nbytes, made.tokens),
        ):
            buffer = torch.full((size,), 0x5A, dtype=torch.uint8, device=device)
            shape = (cols, rows) if way else (rows, cols)
            if size:
                found.append(Packed24(buffer, shape, x.dtype, layout, way))
            addresses.append(buffer.data_ptr() if size else 0)
        assert prepared.sums_shape is not None
        made.sums.append(torch.full(prepared.sums_shape, torch.nan, device=device))
        place = len(addresses) - 2
        addresses.insert(place, made.dense[-1].data_ptr() if dense else 0)
        addresses.append(made.sums[-1].data_ptr())
    addresses += [0] * (8 - len(addresses))
    inputs = [0 if t is None else t.data_ptr() for t in tensors]
    with on_device(torch.device(device)):
        stream = current_stream(torch.device(device))
        prepared(inputs, addresses, SEED, OFFSET, stream)
    return made


def assert_packed(made: Made, method: str, layout: MetadataLayout, n: int = 2) -> None:
    """What is packed is what the reference packs of the gradient that was written."""
    for number, dense in enumerate(made.dense):
        seeds = torch.tensor([SEED, OFFSET + number * SECOND_OFFSET])
        for way, found in ((False, made.features), (True, made.tokens)):
            if found:
                operand = dense.cpu().t() if way else dense.cpu()
                draws = Draws(seeds, int(way))
                want = pack_operand(operand, layout, method=method, n=n, draws=draws)
                assert cases.same_bits(found[number].values.cpu(), want.values)
                assert cases.same_bits(found[number].metadata.cpu(), want.metadata)


def activation_exactly(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """act(x) and act'(x) in float64; torch's own gelu loses the digits of its tail there."""
    if name == "gelu":
        phi = torch.special.erfc(x * -(0.5**0.5)) / 2
        return x * phi, phi + x * (-x * x / 2).exp() / (2 * torch.pi) ** 0.5
    if name == "gelu_tanh":
        beta = (2 / torch.pi) ** 0.5
        double = 2 * beta * (x + 0.044715 * x**3)
        s, rest = torch.sigmoid(double), torch.sigmoid(-double)
        return x * s, s + x * s * rest * 2 * beta * (1 + 3 * 0.044715 * x * x)
    ones = torch.ones_like(x)
    slope, value = ActivationBackward(name, ones, x, ones).gradients()
    return value, slope


def exact(producer: Producer) -> tuple[Tensor, ...]:
    """The gradients in float64 from the same inputs."""
    if isinstance(producer, ActivationBackward):
        if producer.activation.startswith("relu"):  # a choice, and no product with zero
            wide = [None if t is None else t.double() for t in (producer.pre, producer.up)]
            assert wide[0] is not None
            scale = float(np.float32(producer.scale))
            upstream = producer.upstream.double()
            return ActivationBackward(
                producer.activation, upstream, wide[0], wide[1], producer.mask, scale
            ).gradients()
        value, slope = activation_exactly(producer.activation, producer.pre.double())
        g = producer.upstream.double()
        if producer.mask is not None:
            g = g * producer.mask * float(np.float32(producer.scale))
        if producer.up is None:
            return (g * slope,)
        return g * producer.up.double() * slope, g * value
    return CrossEntropyBackward(
        producer.logits.double(),
        producer.lse.double(),
        producer.target,
        producer.row_scale.double(),
        producer.label_smoothing,
        producer.z_loss,
        producer.first,
        producer.vocabulary,
    ).gradients()


@pytest.mark.parametrize("dtype", cases.FLOAT_DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_gradients_are_within_one_rounding(
    device: str, kind: ProducerKind, dtype: torch.dtype
) -> None:
    producer = producer_of(kind, 37, 40, dtype)
    made = run_kernel(producer, device=device)
    slope_error, floor, value_error = ERRORS[kind.name]
    want = exact(producer)
    # Of the gradient of act(pre), what act' multiplies.
    _, slope = activation_exactly(kind.name, producer.pre.double())
    into = producer.upstream.double().abs()
    if producer.mask is not None:
        into = into * producer.mask * producer.scale
    if producer.up is not None:
        into = into * producer.up.double().abs()
    # Three products and a sum in float32 go before the one rounding to the dtype.
    errors = [into * slope.abs().clamp(min=floor) * (slope_error + 2**-22)]
    errors += [g.abs() * (value_error + 2**-22) for g in want[1:]]
    tiny = torch.finfo(dtype).smallest_normal * UNIT[dtype]
    for got, true, error in zip(made.dense, want, errors, strict=True):
        bound = UNIT[dtype] * (true.abs() + error) + error + tiny
        assert ((got.cpu().double() - true).abs() <= bound).all()
    assert_packed(made, "magnitude", layouts.PLAIN)
    for dense, sums in zip(made.dense, made.sums, strict=True):
        terms = dense.double()
        bound = 37 * 2**-24 * terms.abs().sum(0)
        assert ((sums.double().sum(0) - terms.sum(0)).abs() <= bound).all()


@pytest.mark.parametrize(
    "method, n, layout",
    [
        ("magnitude", 1, layouts.PLAIN),
        ("random", 2, layouts.SM90_ATOM),
        ("mvue", 2, layouts.BLOCKED),
        ("mvue", 1, layouts.PLAIN),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("kind", [KINDS[3], KINDS[8]], ids=name_of)
def test_packed_bytes_equal_the_reference(
    device: str, kind: ProducerKind, method: str, n: int, layout: MetadataLayout
) -> None:
    """In several blocks of rows and of columns; where the layout can be, none of them whole."""
    shape = (70, 72) if layout is layouts.PLAIN else (128, 128)
    producer = producer_of(kind, *shape, torch.bfloat16)
    assert_packed(run_kernel(producer, method, layout, n=n, device=device), method, layout, n)


@pytest.mark.parametrize("features, tokens, dense", [(1, 0, 0), (0, 1, 1), (0, 0, 1)])
def test_only_what_is_asked_for_is_written(
    device: str, features: int, tokens: int, dense: int
) -> None:
    producer = producer_of(ProducerKind("silu", gated=True), 20, 24, torch.float16)
    whole = run_kernel(producer, "mvue", device=device)
    made = run_kernel(
        producer, "mvue", features=bool(features), tokens=bool(tokens), dense=bool(dense),
        device=device,
    )  # fmt: skip
    for number in range(2):
        if dense:
            assert cases.same_bits(made.dense[number], whole.dense[number])
        else:
            assert made.dense[number].isnan().all()
        for wanted, part, found in (
            (features, made.features, whole.features),
            (tokens, made.tokens, whole.tokens),
        ):
            assert len(part) == (2 if wanted else 0)
            if wanted:
                assert cases.same_bits(part[number].buffer, found[number].buffer)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.masked == k.gated], ids=name_of)
def test_an_overflow_stays_visible(device: str, kind: ProducerKind) -> None:
    """Wherever float64 has an Inf or NaN, so has the kernel: in either input, or by overflow."""
    producer = producer_of(kind, 16, 64, torch.bfloat16)
    hot = cases.adversarial(16, 64, torch.bfloat16, 3)
    # float64 has no overflow where float32 has one, so the largest number is left out.
    hot = torch.where(hot.abs() > 1e30, torch.where(hot.isinf(), hot, 1.0), hot)
    producer.upstream = hot
    producer.pre = cases.adversarial(16, 64, torch.bfloat16, 4).clamp(-1e9, 1e9)
    made = run_kernel(producer, "mvue", device=device)
    for got, true in zip(made.dense, exact(producer), strict=True):
        assert torch.equal(got.cpu().isfinite(), true.to(torch.bfloat16).isfinite())
    assert_packed(made, "mvue", layouts.PLAIN)


def head(rows: int, classes: int, dtype: torch.dtype, smoothing: float) -> CrossEntropyBackward:
    logits = (4 * torch.randn(rows, classes)).to(dtype)
    target = torch.randint(classes, (rows,))
    target[0], target[1] = 0, classes - 1
    row_scale = torch.rand(rows) + 0.5
    # Ignored rows may hold anything, and a target that is no class.
    row_scale[5], target[5] = 0.0, -100
    lse = logits.float().logsumexp(1)
    logits[5, 3], logits[5, 4], lse[5] = torch.nan, torch.inf, torch.nan
    return CrossEntropyBackward(logits, lse, target, row_scale, smoothing, 1e-3)


@pytest.mark.parametrize("dtype", cases.FLOAT_DTYPES)
@pytest.mark.parametrize("smoothing, classes", [(0.0, 72), (0.0, 128), (0.1, 128)])
def test_the_gradient_of_a_cross_entropy(
    device: str, dtype: torch.dtype, smoothing: float, classes: int
) -> None:
    producer = head(37, classes, dtype, smoothing)
    (true,) = exact(producer)
    made = run_kernel(producer, "mvue", device=device)
    got = made.dense[0].cpu().double()
    # Two fused products and a sum of at most 2 each, beside the probability's own error.
    size = producer.logits.double().abs().nan_to_num(0, 0).amax(1) + 20
    error = (producer.row_scale.double() * 2**-22 * size)[:, None]
    tiny = torch.finfo(dtype).smallest_normal * UNIT[dtype]
    assert ((got - true).abs() <= UNIT[dtype] * (true.abs() + error) + error + tiny).all()
    assert (got[5] == 0).all()
    assert_packed(made, "mvue", layouts.PLAIN)


def test_a_slice_of_the_vocabulary_is_a_slice_of_the_gradient(device: str) -> None:
    whole = head(20, 192, torch.bfloat16, 0.1)
    dense = run_kernel(whole, device=device).dense[0]
    for first, last in ((0, 64), (64, 192)):
        part = CrossEntropyBackward(
            whole.logits[:, first:last], whole.lse, whole.target, whole.row_scale,
            whole.label_smoothing, whole.z_loss, first, 192,
        )  # fmt: skip
        made = run_kernel(part, "mvue", device=device)
        assert cases.same_bits(made.dense[0], dense[:, first:last])
        assert_packed(made, "mvue", layouts.PLAIN)


def test_smoothed_labels_end_with_a_block() -> None:
    with pytest.raises(ValueError, match="multiple of 256 where labels are smoothed"):
        run_kernel(head(20, 72, torch.bfloat16, 0.1))
    for layout, method in itertools.product(layouts.NAMED.values(), (None, "mvue")):
        target = None if method is None else Target(method, layout)
        for classes in (WHOLE_BLOCKS, 3 * WHOLE_BLOCKS):
            blocks = blocks_of((200, classes), torch.bfloat16, Target("mvue", layout), target)
            assert blocks.grid[0] * blocks.tile.block_k == classes


def test_an_overflow_of_logits_stays_visible(device: str) -> None:
    for value in (torch.nan, torch.inf):
        producer = head(20, 64, torch.bfloat16, 0.1)
        producer.logits[7, 9] = value
        producer.lse = producer.logits.float().logsumexp(1)
        made = run_kernel(producer, "mvue", device=device)
        finite = made.dense[0].isfinite().all(1)
        assert not finite[7] and finite[:7].all() and finite[8:].all()
        assert_packed(made, "mvue", layouts.PLAIN)
    # A logit that is masked out is no overflow.
    producer = head(20, 64, torch.bfloat16, 0.0)
    producer.logits[7, 9] = -torch.inf
    producer.target[7] = 11
    producer.lse = producer.logits.float().logsumexp(1)
    dense = run_kernel(producer, device=device).dense[0]
    assert dense[7].isfinite().all() and dense[7, 9] == 0


@triton.jit
def _both(x_ptr, value_ptr, slope_ptr, PRODUCER: tl.constexpr, NATIVE: tl.constexpr):
    place = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    x = tl.load(x_ptr + place)
    value, slope = derivatives.activation(x, x * 0.0 + 1.0, PRODUCER, NATIVE)
    tl.store(value_ptr + place, value)
    tl.store(slope_ptr + place, slope)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_stated_errors_hold_for_every_number(device: str, name: str) -> None:
    """Over every finite bfloat16 and float16 whose square is one."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = torch.cat([bits.view(torch.bfloat16).float(), bits.view(torch.float16).float()])
    x = torch.where(x.abs() < 1e9, x, 0.0).to(device)
    value, slope = torch.empty_like(x), torch.empty_like(x)
    _both[(len(x) // 1024,)](x, value, slope, PRODUCER_CODES[name], device == "cuda")
    value_true, slope_true = activation_exactly(name, x.double().cpu())
    slope_error, floor, value_error = ERRORS[name]
    tiny = torch.finfo(torch.float32).smallest_normal
    error = (slope.cpu().double() - slope_true).abs()
    assert (error <= slope_error * slope_true.abs().clamp(min=floor) + tiny).all()
    error = (value.cpu().double() - value_true).abs()
    # |x| times what a flushed exponential leaves out.
    assert (error <= value_error * value_true.abs() + 100 * tiny).all()


def test_what_cannot_be_fused_is_refused() -> None:
    kind, cpu = ProducerKind("gelu"), torch.device("cpu")
    for shape, strides in (((16, 20), (24, 24, 8)), ((16, 24), (24, 28, 8))):
        with pytest.raises(ValueError, match="prepare_produced: .* must be a multiple of 8"):
            prepare_produced(kind, shape, strides, torch.half, cpu, dense=True)
    with pytest.raises(ValueError, match="reads the gradient once"):
        prepare_produced(
            kind, (16, 24), (24, 24, 8), torch.half, cpu,
            features="rescaled_magnitude", features_layout=layouts.PLAIN,
        )  # fmt: skip
