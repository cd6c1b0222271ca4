"""What makes gradients and writes them as products ask for them: the kernel, and its twin.

maker(producer, outputs, stream): the device is current, and of the kind that it was made for.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sdgp_cusparselt.packing.launch import is_aligned
from sdgp_cusparselt.packing.pack import kernel_obstacle
from sdgp_cusparselt.packing.producing import (
    WHOLE_BLOCKS,
    PreparedProduced,
    cross_entropy_rows,
    prepare_produced,
)
from sdgp_cusparselt.packing.seeds import Seeds, draw_seeds
from sdgp_cusparselt.packing.variants import ProducerKind
from sdgp_cusparselt.products.packers import ReferencePacker, Wanted
from sdgp_cusparselt.pruning.producers import ActivationBackward, CrossEntropyBackward, Producer

# Addresses that the kernel reads are multiples of this.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Asked:
    """What is to be written of each gradient.

    Attributes:
        packed: how it is packed along features and along tokens, if at all.
        dense: whether it is written as it is.
        sums: whether its columns are summed.
    """

    packed: Wanted
    dense: bool
    sums: bool


class Output(NamedTuple):
    """Where one gradient goes.

    Attributes:
        dense: [M, K] to be filled, or None.
        operands: address of the operand along features; that along tokens lies ``tokens_at``
            behind it.
        sums: float32 [blocks, K] to be filled with sums of rows, or None.
    """

    dense: Tensor | None
    operands: int
    sums: Tensor | None


class Maker(Protocol):
    """What a prepared line calls."""

    nbytes: int
    tokens_at: int
    #: Of the sums of each gradient.
    sums_shape: tuple[int, int]

    def __call__(self, producer: Producer, outputs: list[Output], stream: int) -> None:
        """Make the gradients and write them."""
        ...


def kind_of(producer: Producer) -> ProducerKind:
    """Return what a kernel has to know of a producer at compile time."""
    if isinstance(producer, CrossEntropyBackward):
        return ProducerKind("cross_entropy")
    return ProducerKind(producer.activation, producer.up is not None, producer.mask is not None)


def matrices(producer: Producer) -> tuple[Tensor | None, ...]:
    """Return upstream, pre (or the logits), up and mask as matrices [M, K]."""
    if isinstance(producer, CrossEntropyBackward):
        return None, producer.logits, None, None
    found = (producer.upstream, producer.pre, producer.up, producer.mask)
    return tuple(None if t is None else t.reshape(-1, t.shape[-1]) for t in found)


def obstacle(producer: Producer, asked: Asked) -> str | None:
    """Return why the kernel cannot make these gradients, or None."""
    *read, mask = matrices(producer)
    pre = read[1]
    assert pre is not None
    if isinstance(producer, ActivationBackward):
        for given in (producer.upstream, producer.pre, producer.up, producer.mask):
            if given is not None and given.ndim > 1 and not _is_matrix(given):
                return "an input is no matrix in memory"
    if any(t is not None and (t.dtype != pre.dtype or not is_aligned(t)) for t in read):
        return "an input has another dtype, or rows that are not whole vectors"
    if mask is not None and not (
        mask.is_contiguous()
        and mask.dtype in (torch.bool, torch.uint8)
        and mask.data_ptr() % _ALIGNMENT == 0
    ):
        return "the mask is no matrix of bytes"
    if isinstance(producer, CrossEntropyBackward) and (
        producer.label_smoothing and pre.shape[1] % WHOLE_BLOCKS
    ):
        return f"labels are smoothed over classes that are no multiple of {WHOLE_BLOCKS}"
    packed = asked.packed
    layouts = [one for one in (packed.features_layout, packed.tokens_layout) if one is not None]
    return kernel_obstacle(pre, *layouts)


def _is_matrix(x: Tensor) -> bool:
    """Whether x is one [M, K] without a copy."""
    return x.reshape(-1, x.shape[-1]).data_ptr() == x.data_ptr()


class KernelMaker:
    """The compiled kernel: one launch.

    Args:
        producer: of the first call; no tensor of it is kept.
        asked: what is to be written.
    """

    def __init__(self, producer: Producer, asked: Asked) -> None:
        self.asked, self.kind = asked, kind_of(producer)
        upstream, pre, up, _ = matrices(producer)
        assert pre is not None
        self.device, self.dtype, self.shape = pre.device, pre.dtype, (pre.shape[0], pre.shape[1])
        self.strides = tuple(8 if t is None else t.stride(0) for t in (upstream, pre, up))
        self.scale, self.smooths = 1.0, False
        if isinstance(producer, CrossEntropyBackward):
            self.smooths = producer.label_smoothing > 0
        else:
            self.scale = producer.scale
        self.tokens_at, self.nbytes = asked.packed.places(pre)
        self.draws = asked.packed.draws
        self.start = self._prepare(in_memory=False)
        # A captured graph draws anew at each replay. That kernel cannot be compiled then.
        self.start_captured = self._prepare(in_memory=True) if pre.is_cuda and self.draws else None
        self.sums_shape = self.start.sums_shape or (0, self.shape[1])

    def __call__(self, producer: Producer, outputs: list[Output], stream: int) -> None:
        """Make the gradients and write them."""
        seeds: Seeds = (0, 0)
        if self.draws:
            seeds = draw_seeds(self.device)
            if len(outputs) > 1:
                draw_seeds(self.device)  # the second gradient's step, which the kernel takes itself
        self.write(producer, outputs, stream, seeds)

    def write(self, producer: Producer, outputs: list[Output], stream: int, seeds: Seeds) -> None:
        """Make the gradients and write them, with these draws."""
        inputs = [0 if t is None else t.data_ptr() for t in matrices(producer)]
        rows = self._rows(producer)
        inputs.append(0 if rows is None else rows.data_ptr())
        addresses: list[int] = []
        packed = self.asked.packed
        for dense, operands, sums in outputs:
            addresses.append(0 if dense is None else dense.data_ptr())
            addresses.append(operands if packed.features is not None else 0)
            addresses.append(0 if packed.tokens is None else operands + self.tokens_at)
            addresses.append(0 if sums is None else sums.data_ptr())
        addresses += [0] * (8 - len(addresses))
        if isinstance(seeds, Tensor):
            assert self.start_captured is not None  # seeds are in memory on a GPU alone
            self.start_captured(inputs, addresses, 0, 0, stream, seeds=seeds.data_ptr())
        else:
            self.start(inputs, addresses, *seeds, stream)

    def _rows(self, producer: Producer) -> Tensor | None:
        if isinstance(producer, ActivationBackward):
            return None
        return cross_entropy_rows(
            producer.lse,
            producer.target,
            producer.row_scale,
            self.shape[1],
            self.start.covered_rows,
            label_smoothing=producer.label_smoothing,
            z_loss=producer.z_loss,
            first=producer.first,
            vocabulary=producer.vocabulary,
        )

    def _prepare(self, in_memory: bool) -> PreparedProduced:
        packed = self.asked.packed
        return prepare_produced(
            self.kind,
            self.shape,
            (self.strides[0], self.strides[1], self.strides[2]),
            self.dtype,
            self.device,
            dense=self.asked.dense,
            features=packed.features,
            tokens=packed.tokens,
            features_layout=packed.features_layout,
            tokens_layout=packed.tokens_layout,
            n=packed.n,
            column_sums=self.asked.sums,
            scale=self.scale,
            smooths=self.smooths,
            seeds_in_memory=in_memory,
        )


class ReferenceMaker:
    """The kernel's twin in plain torch, for a CPU.

    Args:
        producer: of the first call; no tensor of it is kept.
        asked: what is to be written.
    """

    def __init__(self, producer: Producer, asked: Asked) -> None:
        _, pre, _, _ = matrices(producer)
        assert pre is not None
        self.asked, self.packer = asked, ReferencePacker(pre, asked.packed)
        self.tokens_at, self.nbytes = self.packer.tokens_at, self.packer.nbytes
        self.sums_shape = (1, pre.shape[1])

    def __call__(self, producer: Producer, outputs: list[Output], stream: int) -> None:
        """Make the gradients and write them."""
        made = zip(producer.gradients(), outputs, strict=True)
        # From the last to the first, as autograd comes to the layers.
        for gradient, (dense, operands, sums) in list(made)[::-1]:
            flat = gradient.reshape(-1, gradient.shape[-1])
            if dense is not None:
                dense.copy_(flat)
            if sums is not None:
                torch.sum(flat, 0, keepdim=True, dtype=torch.float32, out=sums)
            self.packer(flat, operands, stream)
