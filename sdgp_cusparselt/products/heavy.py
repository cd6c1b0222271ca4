"""The sparse product whose heaviest tokens are exact: what packs its operand, and adds the rests.

[M + C, N] = operand @ weight;  grad_input = its first M rows, plus the last C where they belong

See ``packing.heavy``. What packs is like a ``Packer`` and has one more thing to do at the end.
"""

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from sdgp_cusparselt.backends.plans import PlannedGemm
from sdgp_cusparselt.devices import current_stream, on_device
from sdgp_cusparselt.errors import NotSupportedError
from sdgp_cusparselt.packing.heavy import heaviest, heavy_capacity, row_energies
from sdgp_cusparselt.packing.heavy_pack import (
    MOST_ROWS,
    heavy_fault,
    pack_heavy,
    prepare_add,
    prepare_choice,
    prepare_heavy,
)
from sdgp_cusparselt.packing.launch import OCTET, aligned, is_aligned
from sdgp_cusparselt.packing.layout import MetadataLayout
from sdgp_cusparselt.packing.pack import kernel_obstacle
from sdgp_cusparselt.packing.packed import buffer_nbytes
from sdgp_cusparselt.packing.reference import Draws
from sdgp_cusparselt.packing.seeds import draw_seeds, seeds_tensor
from sdgp_cusparselt.products.packers import bytes_at, slots
from sdgp_cusparselt.tuning import MATMUL, Rival


class HeavyPacker(Protocol):
    """What a prepared product with heavy tokens calls."""

    nbytes: int
    tokens_at: int

    def __call__(self, x: Tensor, address: int, stream: int) -> None:
        """Write the operand of x, and which rows are heavy, at an address."""
        ...

    def add(self, product: Tensor, address: int, stream: int) -> Tensor:
        """Return the M rows of a product [M + C, N], the rests added to theirs.

        Args:
            product: of the operand that was written at ``address``; it is written to.
            address: where the operand is, and behind it the rows.
            stream: on which all of this runs.
        """
        ...


def heavy_packer_for(
    x: Tensor, share: float, layout: MetadataLayout | None, planned: PlannedGemm
) -> HeavyPacker:
    """Return what packs x: the kernels on a GPU, the reference on a CPU.

    Args:
        x: [M, K] of the first call; not kept.
        share: of its rows that are exact.
        layout: order of the operand's metadata; None where ours is not proven.
        planned: the plan that multiplies.

    Raises:
        NotSupportedError: it must not be packed by us, and the library's own Compress has no rows
            to leave over.
    """
    reason = "this package's packer is not proven for this plan" if layout is None else None
    if layout is not None and x.is_cuda:
        reason = kernel_obstacle(x, layout) or heavy_fault(x, share, layout)
    if reason is not None:
        raise NotSupportedError(f"heavy_packer_for: heavy_tokens={share}: {reason}")
    assert layout is not None
    kind = HeavyKernels if x.is_cuda else HeavyReference
    return kind(x, share, layout, planned.compressed_size)


class HeavyKernels:
    """Three launches before the product and one behind it; nothing waits for the device.

    Args:
        x: [M, K] of the first call.
        share: of its rows that are exact.
        layout: order of the operand's metadata.
        compressed_size: bytes that the library may read of the operand.
    """

    tokens_at = 0

    def __init__(
        self, x: Tensor, share: float, layout: MetadataLayout, compressed_size: int
    ) -> None:
        self.device, self.num_rows = x.device, x.shape[0]
        prepare = partial(
            prepare_heavy,
            (x.shape[0], x.shape[1]),
            # A copy that is made to be aligned has rows of whole octets.
            x.stride(0) if is_aligned(x) else -(-x.shape[1] // OCTET) * OCTET,
            x.dtype,
            x.device,
            share=share,
            layout=layout,
        )
        self.start = prepare()
        # A captured graph draws anew at each replay. That kernel cannot be compiled then.
        self.start_captured = prepare(seeds_in_memory=True) if x.is_cuda else self.start
        self.capacity = self.start.choice.capacity
        self.scratch_at = slots(max(self.start.nbytes, compressed_size))
        self.nbytes = self.scratch_at + self.start.choice.nbytes

    def __call__(self, x: Tensor, address: int, stream: int) -> None:
        """Write the operand of x, and which rows are heavy, at an address."""
        read, seeds = aligned(x), draw_seeds(self.device)
        given = read.data_ptr(), address, address + self.scratch_at
        if isinstance(seeds, Tensor):
            self.start_captured(*given, 0, 0, stream, seeds=seeds.data_ptr())
        else:
            self.start(*given, *seeds, stream)

    def add(self, product: Tensor, address: int, stream: int) -> Tensor:
        """Return the M rows of a product, the rests added to theirs."""
        rows = self.start.choice.rows_at(address + self.scratch_at)
        add = prepare_add(
            self.num_rows, self.capacity, product.shape[1], product.dtype, self.device
        )
        add(stream, product.data_ptr(), rows)
        return product[: self.num_rows]


class HeavyReference:
    """The kernels' twin in plain torch, for a CPU; arguments as ``HeavyKernels``."""

    tokens_at = 0

    def __init__(
        self, x: Tensor, share: float, layout: MetadataLayout, compressed_size: int
    ) -> None:
        self.num_rows, self.layout = x.shape[0], layout
        self.capacity = heavy_capacity(self.num_rows, share)
        tall = (self.num_rows + self.capacity, x.shape[1])
        self.scratch_at = slots(max(buffer_nbytes(tall, x.dtype, layout), compressed_size))
        self.nbytes = self.scratch_at + 8 * self.capacity

    def __call__(self, x: Tensor, address: int, stream: int) -> None:
        """Write the operand of x, and which rows are heavy, at an address."""
        rows = heaviest(row_energies(x), self.capacity)
        draws = Draws(seeds_tensor(draw_seeds(x.device), x.device), 0)
        packed = pack_heavy(x, rows, self.layout, draws)
        bytes_at(address, packed.nbytes).copy_(packed.buffer)
        self._rows(address).copy_(rows)

    def add(self, product: Tensor, address: int, stream: int) -> Tensor:
        """Return the M rows of a product, the rests added to theirs."""
        rests = product[self.num_rows : self.num_rows + self.capacity]
        return product[: self.num_rows].index_add_(0, self._rows(address), rests)

    def _rows(self, address: int) -> Tensor:
        return bytes_at(address + self.scratch_at, 8 * self.capacity).view(torch.int64)


def heavy_rival(share: float) -> Rival:
    """Return what a product with heavy tokens races against: ``mm`` of the rows without extras.

    Args:
        share: of the rows that are exact. The race has operands of M + C rows and knows no other
            size: their rows are taken apart again.
    """
    return Rival(
        f"{MATMUL.name} heavy {share:g}",
        lambda left, right: left[: rows_without_extra(len(left), share)].mm(right),
        partial(_added, share=share),
        partial(_found, share=share),
    )


def rows_without_extra(total: int, share: float) -> int:
    """Return the most rows that with their heavy ones are at most ``total``."""
    rows = int(total / (1 + share)) + 1
    while rows and rows + heavy_capacity(rows, share) > total:
        rows -= 1
    return rows


def _found(left: Tensor, share: float) -> object:
    """Find the heaviest rows, as before a pack."""
    x = left[: rows_without_extra(len(left), share)]
    if not x.is_cuda or len(x) > MOST_ROWS or not is_aligned(x):
        return heaviest(row_energies(x), heavy_capacity(len(x), share))
    start = prepare_choice((x.shape[0], x.shape[1]), x.stride(0), x.dtype, x.device, share)
    scratch = torch.empty(start.nbytes, dtype=torch.uint8, device=x.device)
    with on_device(x.device):
        return start(x.data_ptr(), scratch.data_ptr(), current_stream(x.device)), scratch


def _added(product: Tensor, share: float) -> object:
    """Add the last rows of a product to some of the first, as behind it."""
    rows = rows_without_extra(len(product), share)
    return product[:rows].narrow(0, 0, len(product) - rows).add_(product[rows:])
