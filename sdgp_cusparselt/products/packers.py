"""What writes the packed operands of a prepared product: packer(x, address, stream).

x is a gradient in the memory that the packer was made for, the address that of ``nbytes`` bytes on
its device, and that device is current. Each packer is for one shape and keeps no tensor.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sdgp_cusparselt.backends.plans import PlannedGemm
from sdgp_cusparselt.config.patterns import STOCHASTIC
from sdgp_cusparselt.packing.agreement import packer_fault
from sdgp_cusparselt.packing.launch import OCTET, PreparedPack, aligned, is_aligned, prepare_pack
from sdgp_cusparselt.packing.layout import MetadataLayout
from sdgp_cusparselt.packing.pack import kernel_obstacle
from sdgp_cusparselt.packing.packed import buffer_nbytes
from sdgp_cusparselt.packing.ratios import kernel_ratio, reference_ratio
from sdgp_cusparselt.packing.reference import Draws, pack_operand
from sdgp_cusparselt.packing.seeds import draw_seeds, seeds_tensor

#: What a second operand or a workspace begins at is a multiple of this.
SLOT = 256


class Packer(Protocol):
    """What a prepared product calls."""

    nbytes: int
    #: Where the operand along tokens begins.
    tokens_at: int

    def __call__(self, x: Tensor, address: int, stream: int) -> None:
        """Write the operands of x at an address."""
        ...


@dataclass(frozen=True)
class Wanted:
    """What is to be packed of one gradient [M, K].

    Attributes:
        n: values kept of four, 1 or 2.
        rows_per_sample: rows over which rescaled_magnitude sums along features.
        features: method along features, or None.
        tokens: method along tokens, or None.
        features_layout: order of its metadata.
        tokens_layout: order of its metadata.
    """

    n: int
    rows_per_sample: int
    features: str | None = None
    tokens: str | None = None
    features_layout: MetadataLayout | None = None
    tokens_layout: MetadataLayout | None = None

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn."""
        return self.features in STOCHASTIC or self.tokens in STOCHASTIC

    def places(self, x: Tensor) -> tuple[int, int]:
        """Return where the operand along tokens begins, and the bytes of both."""
        rows, cols = x.shape
        size = tokens_at = 0
        if self.features_layout is not None:
            size = buffer_nbytes((rows, cols), x.dtype, self.features_layout)
        if self.tokens_layout is not None:
            tokens_at = slots(size)
            size = tokens_at + buffer_nbytes((cols, rows), x.dtype, self.tokens_layout)
        return tokens_at, size


def packer_for(x: Tensor, wanted: Wanted) -> Packer | None:
    """Return what packs x: the kernel on a GPU, the reference on a CPU; None if it must not."""
    layouts = [one for one in (wanted.features_layout, wanted.tokens_layout) if one is not None]
    if x.is_cuda and kernel_obstacle(x, *layouts) is not None:
        return None
    fault = packer_fault(
        x,
        features=wanted.features,
        tokens=wanted.tokens,
        features_layout=wanted.features_layout,
        tokens_layout=wanted.tokens_layout,
        tokens_per_sample=wanted.rows_per_sample,
    )
    if fault is not None:
        return None
    return KernelPacker(x, wanted) if x.is_cuda else ReferencePacker(x, wanted)


class KernelPacker:
    """The compiled kernel: one launch, and seeds from the generator's own state.

    Args:
        x: [M, K] of the first call.
        wanted: what it packs.
    """

    def __init__(self, x: Tensor, wanted: Wanted) -> None:
        self.wanted, self.device, self.shape = wanted, x.device, (x.shape[0], x.shape[1])
        self.tokens_at, self.nbytes = wanted.places(x)
        self.draws = wanted.draws
        rescales = "rescaled_magnitude" in (wanted.features, wanted.tokens)
        #: Whether x is taken as it lies in memory, whatever its shape is.
        self.by_address = is_aligned(x) and not rescales
        self.along_features = wanted.features is not None
        self.along_tokens = wanted.tokens is not None
        self.start = self._prepare(x, in_memory=False)
        # A captured graph draws anew at each replay. That kernel cannot be compiled then.
        self.start_captured = self._prepare(x, in_memory=True) if x.is_cuda and self.draws else None

    def __call__(self, x: Tensor, address: int, stream: int) -> None:
        """Write the operands of x at an address."""
        features = address if self.along_features else 0
        tokens = address + self.tokens_at if self.along_tokens else 0
        if not self.by_address:
            self._with_ratios(x, features, tokens, stream)
        elif self.draws:
            seeds = draw_seeds(self.device)
            if isinstance(seeds, Tensor):
                self._captured(x, features, tokens, stream, seeds)
            else:
                self.start(x.data_ptr(), features, tokens, *seeds, stream)
        else:
            self.start(x.data_ptr(), features, tokens, 0, 0, stream)

    def _prepare(self, x: Tensor, in_memory: bool) -> PreparedPack:
        wanted = self.wanted
        # A copy that is made to be aligned has rows of whole octets.
        return prepare_pack(
            self.shape,
            x.stride(0) if is_aligned(x) else -(-self.shape[1] // OCTET) * OCTET,
            x.dtype,
            x.device,
            features=wanted.features,
            tokens=wanted.tokens,
            features_layout=wanted.features_layout,
            tokens_layout=wanted.tokens_layout,
            n=wanted.n,
            rows_per_ratio=wanted.rows_per_sample,
            seeds_in_memory=in_memory,
        )

    def _captured(
        self, x: Tensor, features: int, tokens: int, stream: int, seeds: Tensor, **ratios: int
    ) -> None:
        start = self.start_captured
        assert start is not None  # seeds are in memory on a GPU alone
        start(x.data_ptr(), features, tokens, 0, 0, stream, seeds=seeds.data_ptr(), **ratios)

    def _with_ratios(self, x: Tensor, features: int, tokens: int, stream: int) -> None:
        """Pack what has to be copied, or read once more, first."""
        wanted, read = self.wanted, aligned(x)
        ratio: dict[str, Tensor] = {}
        for name, method in (("features", wanted.features), ("tokens", wanted.tokens)):
            if method == "rescaled_magnitude":
                per_sample = wanted.rows_per_sample
                ratio[name] = kernel_ratio(read, name == "tokens", per_sample, wanted.n)
        addresses = {f"{name}_ratio": held.data_ptr() for name, held in ratio.items()}
        seeds = draw_seeds(self.device) if self.draws else (0, 0)
        if isinstance(seeds, Tensor):
            self._captured(read, features, tokens, stream, seeds, **addresses)
        else:
            self.start(read.data_ptr(), features, tokens, *seeds, stream, **addresses)


class ReferencePacker:
    """The kernel's twin in plain torch, for a CPU.

    Args:
        x: [M, K] of the first call.
        wanted: what it packs.
    """

    def __init__(self, x: Tensor, wanted: Wanted) -> None:
        self.wanted = wanted
        self.tokens_at, self.nbytes = wanted.places(x)

    def __call__(self, x: Tensor, address: int, stream: int) -> None:
        """Write the operands of x at an address."""
        wanted = self.wanted
        seeds = seeds_tensor(draw_seeds(x.device), x.device) if wanted.draws else None
        if wanted.features is not None:
            self._write(x, wanted.features, wanted.features_layout, seeds, address)
        if wanted.tokens is not None:
            at = address + self.tokens_at
            self._write(x.t(), wanted.tokens, wanted.tokens_layout, seeds, at, turned=True)

    def _write(
        self,
        operand: Tensor,
        method: str,
        layout: MetadataLayout | None,
        seeds: Tensor | None,
        address: int,
        turned: bool = False,
    ) -> None:
        assert layout is not None  # of every method
        ratio, n = None, self.wanted.n
        if method == "rescaled_magnitude":
            rows = operand.shape[0] if turned else self.wanted.rows_per_sample
            ratio = reference_ratio(operand, rows, n)
        draws = None if seeds is None else Draws(seeds, int(turned))
        packed = pack_operand(
            operand, layout, method=method, n=n, ratio=ratio, draws=draws, transposed=turned
        )
        bytes_at(address, packed.nbytes).copy_(packed.buffer)


class LibraryPacker:
    """The library's own Compress, after pruning in plain torch: where no order of ours is proven.

    Args:
        planned: the plan whose operand it packs.
        prune: (gradient) -> the operand [M, K], pruned.
    """

    tokens_at = 0

    def __init__(self, planned: PlannedGemm, prune: Callable[[Tensor], Tensor]) -> None:
        self.planned, self.prune = planned, prune
        self.nbytes = planned.compressed_size

    def __call__(self, x: Tensor, address: int, stream: int) -> None:
        """Write the operand of x at an address."""
        self.planned.compress(self.prune(x), address, stream)


def slots(nbytes: int) -> int:
    """Return bytes rounded up to where something else may begin."""
    return -(-nbytes // SLOT) * SLOT


def bytes_at(address: int, nbytes: int) -> Tensor:
    """Return bytes of the CPU's memory as a tensor that does not own them."""
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
