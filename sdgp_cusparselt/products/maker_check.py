"""Does the kernel that makes gradients write what its twin makes? Asked before its first use.

Once per process, device and sort of kernel, on inputs that are small and take the same tile, as
``packing.agreement`` does for packing alone.
"""

import threading
from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt.devices import current_stream, is_capturing, on_device
from sdgp_cusparselt.packing.agreement import NOT_YET, small_shape
from sdgp_cusparselt.packing.producing import SECOND_OFFSET
from sdgp_cusparselt.packing.reference import Draws, pack_operand
from sdgp_cusparselt.products.makers import (
    Asked,
    KernelMaker,
    Maker,
    Output,
    ReferenceMaker,
    kind_of,
    matrices,
    obstacle,
)
from sdgp_cusparselt.products.packers import Wanted
from sdgp_cusparselt.pruning.producers import ActivationBackward, CrossEntropyBackward, Producer

#: Largest relative distance between two neighbours of a dtype.
_SPACING = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
#: What float32 arithmetic may be off by, for inputs as ``_small_producer`` makes them.
_ABSOLUTE = 2**-12
_SEEDS = (0x1234_5678_9ABC_DEF0, 2**40 + 12345)

_found: dict[tuple[Any, ...], str | None] = {}
_lock = threading.Lock()


def maker_for(producer: Producer, asked: Asked) -> Maker | None:
    """Return what makes gradients like these: the kernel on a GPU, its twin on a CPU, or None.

    Args:
        producer: of the first call; none of its tensors is kept.
        asked: what is to be written of each gradient.
    """
    _, pre, _, _ = matrices(producer)
    assert pre is not None
    if "rescaled_magnitude" in (asked.packed.features, asked.packed.tokens):
        return None  # it reads a gradient twice
    if not pre.is_cuda:
        return ReferenceMaker(producer, asked)
    if obstacle(producer, asked) is not None or maker_fault(producer, asked) is not None:
        return None
    return KernelMaker(producer, asked)


def maker_fault(producer: Producer, asked: Asked) -> str | None:
    """Return the first difference between the kernel and its twin, or None.

    Under graph capture nothing is compared: a reason, if it was not done before.
    """
    _, pre, _, _ = matrices(producer)
    assert pre is not None
    packed = asked.packed
    layouts = (packed.features_layout, packed.tokens_layout)
    shape, _ = small_shape(pre, layouts, None)
    key = (pre.device, pre.dtype, shape, kind_of(producer), asked)
    if key not in _found:
        if is_capturing(pre.device):
            return NOT_YET
        fault = compare(_small_producer(producer, shape), asked)
        with _lock:
            _found[key] = fault
    return _found[key]


def compare(producer: Producer, asked: Asked) -> str | None:
    """Return how the kernel's gradients, packed or not, differ from what its twin makes.

    The gradient itself may be the neighbour of the twin's number; what is packed is compared with
    the packing of the kernel's own gradient, byte for byte.
    """
    _, pre, _, _ = matrices(producer)
    assert pre is not None
    shape, count = (pre.shape[0], pre.shape[1]), len(producer.gradients())
    whole = Asked(Wanted(2, shape[0]), dense=True, sums=False)
    dense = [torch.empty(shape, dtype=pre.dtype, device=pre.device) for _ in range(count)]
    with on_device(pre.device):
        stream = current_stream(pre.device)
        KernelMaker(producer, whole)(producer, [Output(one, 0, None) for one in dense], stream)
    for ours, truth in zip(dense, producer.gradients(), strict=True):
        truth = truth.reshape(shape)
        bound = _SPACING[pre.dtype] * truth.double().abs() + _ABSOLUTE
        apart = (ours.double() - truth.double()).abs() > bound
        if bool(apart.any()) or not torch.equal(ours.isfinite(), truth.isfinite()):
            return f"{kind_of(producer).name}: {int(apart.sum())} elements are wrong"
    return _compare_packed(producer, asked, dense)


def _compare_packed(producer: Producer, asked: Asked, dense: list[Tensor]) -> str | None:
    """Compare what is written beside the gradients and packed of them; see ``compare``."""
    packed, name = asked.packed, kind_of(producer).name
    maker = KernelMaker(producer, asked)
    buffers = [torch.empty(maker.nbytes, dtype=torch.uint8, device=one.device) for one in dense]
    outputs = [
        Output(
            torch.empty_like(one) if asked.dense else None,
            buffer.data_ptr(),
            torch.empty(maker.sums_shape, device=one.device) if asked.sums else None,
        )
        for one, buffer in zip(dense, buffers, strict=True)
    ]
    with on_device(maker.device):
        maker.write(producer, outputs, current_stream(maker.device), _SEEDS)
    for number, (one, buffer, output) in enumerate(zip(dense, buffers, outputs, strict=True)):
        seeds = torch.tensor(_SEEDS, device=one.device)
        seeds[1] += number * SECOND_OFFSET
        for way, method, layout, at in (
            (False, packed.features, packed.features_layout, 0),
            (True, packed.tokens, packed.tokens_layout, maker.tokens_at),
        ):
            if method is None or layout is None:
                continue
            draws = Draws(seeds, int(way))
            operand = one.t() if way else one
            want = pack_operand(operand, layout, method=method, n=packed.n, draws=draws).buffer
            wrong = buffer[at : at + len(want)] != want
            if bool(wrong.any()):
                return f"{name}: {int(wrong.sum())} bytes of {method} are wrong"
        if output.dense is not None and not _same_bits(output.dense, one):
            return f"{name}: the gradient differs where it is packed, too"
        if output.sums is not None:
            exact, size = one.double().sum(0), one.double().abs().sum(0)
            if bool(((output.sums.double().sum(0) - exact).abs() > size * len(one) * 2**-24).any()):
                return f"{name}: the sums are wrong"
    return None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def _small_producer(producer: Producer, shape: tuple[int, int]) -> Producer:
    """Return one of the same kind, with inputs of moderate size that lie as its own do."""
    _, pre, _, _ = matrices(producer)
    assert pre is not None
    generator = torch.Generator(pre.device).manual_seed(1)

    def normal(size: float) -> Tensor:
        made = torch.randn(shape, generator=generator, device=pre.device)
        return (size * made).to(pre.dtype)

    if isinstance(producer, CrossEntropyBackward):
        logits = normal(3)
        rows = torch.arange(shape[0], device=pre.device)
        target, row_scale = rows % shape[1], (rows % 7 != 3) * 1.5
        lse = logits.float().logsumexp(1)
        smoothing = producer.label_smoothing
        return CrossEntropyBackward(logits, lse, target, row_scale, smoothing, 1e-3)
    mask = producer.mask
    if mask is not None:
        mask = (normal(1) < 0.5).to(mask.dtype)
    up = None if producer.up is None else normal(1)
    return ActivationBackward(producer.activation, normal(1), normal(2), up, mask, producer.scale)
