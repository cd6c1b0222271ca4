"""How long a counted kernel would take on a card, relative to a clone of the same tensor.

A model, not a measurement. It assumes:
- A multiprocessor issues four warp instructions a cycle, one from each of four schedulers. ALU
  instructions (logic, shifts, selects, compares, minima, conversions) and integer multiplies run at
  half that rate, 64-bit multiplies at a quarter, transcendentals at an eighth; float arithmetic at
  half the rate on sm_80, at the full rate from sm_90 on. Uniform instructions cost an issue slot.
- Loads and stores, shared memory's included, move 128 bytes a cycle and multiprocessor; bank
  conflicts are not counted.
- DRAM gives 88 % of its peak to a clone and to a pack alike; every sector of 32 bytes that a block
  fills in part is written twice.
- The slowest of these decides, and all overlap perfectly: latency, tails of a grid and clocks that
  drop are not in it. So the model is optimistic, for a kernel near a border by perhaps 5 to 20 %.
Clocks are sustained ones as published; bandwidths are peaks as published.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.sass import Code
from sdgp_cusparselt.packing.layout import MetadataLayout

DRAM_SHARE = 0.88
SECTOR = 32
CLONE_BYTES = 4.0


@dataclass(frozen=True)
class Card:
    """What the model knows of a GPU: multiprocessors, clock in GHz, DRAM in TB/s, architecture."""

    name: str
    target: int
    processors: int
    clock: float
    bandwidth: float


CARDS = (
    Card("A100-80", 80, 108, 1.41, 2.039),
    Card("H100", 90, 132, 1.70, 3.35),
    Card("H200", 90, 132, 1.70, 4.80),
)


@dataclass(frozen=True)
class Pass:
    """One kernel over a tensor: its code, and what it covers and moves.

    Attributes:
        code: counted for one warp.
        elements: of x that one block covers.
        bytes: of DRAM traffic per element of x.
        ptx: the PTX instructions that it was assembled from.
    """

    code: Code
    elements: int
    bytes: float
    ptx: frozenset[str] = frozenset()

    def pipes(self, target: int) -> dict[str, float]:
        """Return cycles of one scheduler per 32 elements, by what would take them."""
        pipes, share = self.code.pipes, 32 * self.code.warps / self.elements
        float_cost = 2 if target == 80 else 1
        multiplies = 2 * pipes["imad"] + 4 * pipes["imad.wide"]
        moved = sum(
            max(32 * width, 128) * times
            for (name, width), times in self.code.accesses.items()
            if name in ("LDG", "STG", "LDS", "STS")
        )
        cycles = {
            "issue": self.code.issued,
            "alu": 2 * pipes["alu"],
            "fma": multiplies + float_cost * pipes["fma"],
            "xu": 8 * pipes["xu"],
            # 128 bytes a cycle for all four schedulers.
            "memory": 4 * moved / 128,
        }
        return {name: count * share for name, count in cycles.items()}

    def seconds_per_element(self, card: Card) -> float:
        """Return the slower of instructions and bytes."""
        cycles = max(self.pipes(card.target).values()) / 32
        computing = cycles / (card.processors * 4 * card.clock * 1e9)
        return max(computing, self.bytes / (card.bandwidth * 1e12 * DRAM_SHARE))


def clones(passes: list[Pass], card: Card) -> float:
    """Return the modelled time of kernels, one after another, in clones of the tensor."""
    clone = CLONE_BYTES / (card.bandwidth * 1e12 * DRAM_SHARE)
    return sum(one.seconds_per_element(card) for one in passes) / clone


def partial_sectors(layout: MetadataLayout, block_rows: int, block_cols: int) -> float:
    """Return the share of metadata sectors that a block away from every border fills in part."""
    rows, groups = torch.arange(block_rows), torch.arange(block_cols // 4)
    # Large enough for whole tiles around the block, at multiples of its size.
    size = 4096
    place = layout.address(1024 + rows[:, None], 256 + groups[None, :], size, size)
    _, counts = torch.unique(place.flatten() // (2 * SECTOR), return_counts=True)
    return float((counts < 2 * SECTOR).double().mean())
