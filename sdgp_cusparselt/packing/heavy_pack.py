"""Pack a gradient with heavy tokens: the reference, the kernels resolved, and their comparison.

operand [M + C, K] = draws and tops of x [M, K], then the rests of the C heaviest rows
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt.devices import current_stream, is_capturing, on_device
from sdgp_cusparselt.packing.heavy import heaviest, heavy_capacity, row_energies
from sdgp_cusparselt.packing.launch import OCTET, blocks_of
from sdgp_cusparselt.packing.layout import MetadataLayout, default_layout, padded_shape
from sdgp_cusparselt.packing.nibbles import arrange, collect
from sdgp_cusparselt.packing.packed import BITS, Packed24, buffer_nbytes
from sdgp_cusparselt.packing.reference import Draws, pack_operand
from sdgp_cusparselt.packing.starting import grid_of, interpreted, prepare_kernel
from sdgp_cusparselt.packing.tables import layout_table
from sdgp_cusparselt.packing.trials import normal
from sdgp_cusparselt.packing.variants import Target, triton_dtype

#: Rows whose energies one program sums, and the columns that it reads at a time.
ENERGY_BLOCK = (4, 1024)
#: The most rows that the one program of the choice holds.
MOST_ROWS = 1 << 15
#: Columns that one program adds.
SUM_BLOCK = 1024
#: Rows and columns of what kernel and reference are compared on.
SIDE = 256
NOT_YET = "the kernel of heavy tokens was not compared with its reference before the capture"

_found: dict[tuple[Any, ...], str | None] = {}
_lock = threading.Lock()


def pack_heavy(
    x: Tensor, rows: Tensor, layout: MetadataLayout, draws: Draws, method: str = "mvue"
) -> Packed24:
    """Return the operand of x [M, K] whose ``rows`` are exact, in plain torch.

    Args:
        x: [M, K] of a 16-bit dtype.
        rows: int [C] of x, in increasing order.
        layout: of an operand of M + C rows.
        draws: random numbers of the other rows.
        method: how those are pruned.
    """
    exact = x.index_select(0, rows)
    tops = pack_operand(exact, _own_layout(exact), method="magnitude").unpack()
    bits = BITS[x.element_size()]
    rests = exact.view(bits).masked_fill(tops.view(bits) != 0, 0).view(x.dtype)
    tall = torch.cat((x, rests))
    drawn = pack_operand(tall, layout, method=method, draws=draws)
    kept = pack_operand(tall, layout, method="magnitude")
    is_exact = torch.zeros(drawn.padded_shape[0], dtype=torch.bool, device=x.device)
    is_exact[rows] = True
    is_exact[len(x) :] = True
    packed = Packed24.empty(drawn.shape, x.dtype, layout, device=x.device)
    ours, others = kept.values.view(bits), drawn.values.view(bits)
    packed.values.view(bits).copy_(torch.where(is_exact[:, None], ours, others))
    shape = packed.padded_shape
    exactly, at_random = (collect(one.metadata, layout, *shape) for one in (kept, drawn))
    nibbles = torch.where(is_exact[:, None], exactly, at_random)
    packed.metadata.copy_(arrange(nibbles, layout, *shape))
    return packed


def _own_layout(x: Tensor) -> MetadataLayout:
    return default_layout(*padded_shape(x.shape[0], x.shape[1], x.dtype), x.dtype)


@dataclass(frozen=True)
class PreparedChoice:
    """The kernels that find the heaviest rows of one shape, resolved.

    Attributes:
        num_rows: M.
        capacity: C, how many rows are exact.
    """

    num_rows: int
    capacity: int
    _energies: Callable[..., None]
    _choice: Callable[..., None]

    @property
    def nbytes(self) -> int:
        """Bytes of scratch: float32 energies [M], int32 flags [M] and rows [C], each aligned."""
        return 2 * self._step + 4 * self.capacity

    @property
    def _step(self) -> int:
        # Kernels are compiled for addresses that are multiples of 16.
        return -(-4 * self.num_rows // 16) * 16

    def __call__(self, x: int, scratch: int, stream: int) -> tuple[int, int]:
        """Find them, on a stream of the device, which is current.

        Args:
            x: address of x, a multiple of 16.
            scratch: address of ``nbytes`` bytes, a multiple of 16.
            stream: handle of the CUDA stream.

        Returns:
            Addresses of the rows and of the flags.
        """
        is_heavy, rows = scratch + self._step, self.rows_at(scratch)
        self._energies(stream, x, scratch)
        self._choice(stream, scratch, rows, is_heavy)
        return rows, is_heavy

    def rows_at(self, scratch: int) -> int:
        """Return the address of the rows in a scratch at an address."""
        return scratch + 2 * self._step


@dataclass(frozen=True)
class PreparedHeavy:
    """All kernels of one shape before the product, resolved.

    Attributes:
        choice: finds the heaviest rows.
        nbytes: bytes of the operand.
    """

    choice: PreparedChoice
    nbytes: int
    _pack: Callable[..., None]

    def __call__(
        self,
        x: int,
        operand: int,
        scratch: int,
        seed: int,
        offset: int,
        stream: int,
        *,
        seeds: int = 0,
    ) -> None:
        """Find the heaviest rows and pack, on a stream of the device, which is current.

        Args:
            x: address of x, a multiple of 16.
            operand: address of ``nbytes`` bytes.
            scratch: see ``PreparedChoice``.
            seed, offset, stream, seeds: see ``PreparedPack``.
        """
        rows, is_heavy = self.choice(x, scratch, stream)
        self._pack(stream, x, operand, rows, is_heavy, seeds, seed, offset)


@functools.lru_cache(maxsize=1024)
def prepare_choice(
    shape: tuple[int, int], row_stride: int, dtype: torch.dtype, device: torch.device, share: float
) -> PreparedChoice:
    """Resolve the kernels that find the heaviest rows; see ``prepare_heavy``."""
    num_rows, num_cols = shape
    capacity = heavy_capacity(num_rows, share)
    rows, columns = ENERGY_BLOCK
    energies = prepare_kernel(
        "row_energies_kernel",
        device,
        grid_of((num_rows, 1), rows, 1),
        (num_rows, num_cols // OCTET, row_stride // OCTET),
        {"DTYPE": triton_dtype(dtype), "BLOCK_M": rows, "BLOCK_K": columns},
        4,
    )
    block = max(1024, 1 << (num_rows - 1).bit_length())
    constants, warps = {"BLOCK": block}, min(32, block // 256)
    choice = prepare_kernel(
        "heaviest_kernel", device, (1, 1, 1), (num_rows, capacity), constants, warps
    )
    return PreparedChoice(num_rows, capacity, energies, choice)


@functools.lru_cache(maxsize=1024)
def prepare_heavy(
    shape: tuple[int, int],
    row_stride: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    share: float,
    layout: MetadataLayout,
    seeds_in_memory: bool = False,
) -> PreparedHeavy:
    """Resolve the kernels of one shape.

    Args:
        shape: [M, K] of x, as ``launch.aligned`` returns it; M at most ``MOST_ROWS``.
        row_stride: elements from a row of x to the next, a multiple of 8.
        dtype: float16 or bfloat16.
        device: where x lies.
        share: of the rows that are exact.
        layout: order of the metadata of an operand of M + C rows.
        seeds_in_memory: see ``prepare_pack``.
    """
    choice = prepare_choice(shape, row_stride, dtype, device, share)
    tall = (shape[0] + choice.capacity, shape[1])
    blocks = blocks_of(tall, dtype, Target("mvue", layout), None)
    tile, grid, target, tail = blocks.tile, blocks.grid, blocks.features, blocks.tails[0]
    assert target is not None  # it was given
    constants = {
        "IN_MEMORY": seeds_in_memory,
        "DTYPE": triton_dtype(dtype),
        "NATIVE": not interpreted(),
        "LAYOUT": layout_table(layout, tile.block_m, tile.block_k // 4, target.tail_share),
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
    }
    sizes = (shape[0], choice.capacity, shape[1] // OCTET, row_stride // OCTET, tail)
    pack = prepare_kernel("pack_heavy_kernel", device, grid, sizes, constants, tile.num_warps)
    return PreparedHeavy(choice, buffer_nbytes(tall, dtype, layout), pack)


@functools.lru_cache(maxsize=1024)
def prepare_add(
    num_rows: int, extra: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Callable[..., None]:
    """Return start(stream, product, rows): add the extra rows of a product to their rows.

    Args:
        num_rows: M, rows before the extra ones.
        extra: how many.
        columns: N, a multiple of 8.
        dtype: of the product.
        device: where it lies.
    """
    return prepare_kernel(
        "add_rest_kernel",
        device,
        grid_of((extra, columns), 1, SUM_BLOCK),
        (num_rows, extra, columns // OCTET),
        {"DTYPE": triton_dtype(dtype), "NATIVE": not interpreted(), "BLOCK": SUM_BLOCK},
        4,
    )


def heavy_fault(x: Tensor, share: float, layout: MetadataLayout) -> str | None:
    """Return why the kernels of heavy tokens must not be used on a GPU, or None.

    They are compared with the reference, byte for byte, the first time for each kind.

    Args:
        x: [M, K] what would be packed; its values are not read.
        share: of its rows that are exact.
        layout: of the operand.
    """
    rows, cols = x.shape
    if rows > MOST_ROWS:
        return f"{rows} tokens are more than the {MOST_ROWS} among which the heaviest are found"
    shape = _small((rows, cols), share, layout, x.dtype)
    key = (x.device, x.dtype, shape, share, layout, (rows - 1).bit_length())
    if key not in _found:
        if is_capturing(x.device):
            return NOT_YET
        fault = _compare(x, shape, share, layout)
        with _lock:
            _found[key] = fault
    return _found[key]


def _small(
    shape: tuple[int, int], share: float, layout: MetadataLayout, dtype: torch.dtype
) -> tuple[int, int]:
    """Return a smaller shape that takes the same tile, or the shape itself."""
    width = min(shape[1], max(SIDE, 4 * layout.tile_groups))
    for rows in (SIDE, 2 * SIDE, 4 * SIDE):
        padded = padded_shape(rows + heavy_capacity(rows, share), width, dtype)
        if rows < shape[0] and layout.misfit(*padded) is None:
            return rows, width
    return shape


def _compare(x: Tensor, shape: tuple[int, int], share: float, layout: MetadataLayout) -> str | None:
    generator = torch.Generator(x.device).manual_seed(1)
    made = normal(*shape, x.dtype, x.device, generator)
    rows, draws = heaviest(row_energies(made), heavy_capacity(shape[0], share)), (7, 11)
    seeds = torch.tensor(draws, dtype=torch.int64, device=x.device)
    truth = pack_heavy(made, rows, layout, Draws(seeds, 0)).buffer
    start = prepare_heavy(shape, shape[1], x.dtype, x.device, share=share, layout=layout)
    ours = torch.zeros_like(truth)
    scratch = torch.empty(start.choice.nbytes, dtype=torch.uint8, device=x.device)
    with on_device(x.device):
        stream = current_stream(x.device)
        start(made.data_ptr(), ours.data_ptr(), scratch.data_ptr(), *draws, stream)
    wrong = int((ours != truth).sum())
    if not wrong:
        return None
    return f"the kernel of heavy tokens differs from its reference in {wrong} bytes of {shape}"
