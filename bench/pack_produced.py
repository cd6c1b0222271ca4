"""What making a gradient and packing it costs by its machine code, beside the bytes it moves.

A fused producer is worth its name where the memory stays the slower: its modelled time is at most
``LIMIT`` of what its bytes take, on an A100 and an H100.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.pack_count import COLS, LAYOUTS, ROWS, TARGETS, WIDE, WORD, count, written
from bench.pack_model import CARDS, DRAM_SHARE, Card, Pass, clones
from sdgp_cusparselt.packing import variants
from sdgp_cusparselt.packing.variants import PackVariant, ProducedVariant, ProducerKind, Target

#: Of the time that the bytes take.
LIMIT = 1.05
LIMITED = ("A100-80", "H100")


@dataclass(frozen=True)
class ProducedCase:
    """One variant of the kernel that makes a gradient, on one architecture.

    Attributes:
        producer, gated, masked: what is made; see ``variants.ProducerKind``.
        features, tokens: method of each direction, or None.
        dense, sums: what is written beside.
        layout: of the metadata.
        target: compute capability.
        dtype: of the gradient.
    """

    producer: str
    features: str | None
    tokens: str | None
    target: int
    gated: bool = False
    masked: bool = False
    dense: bool = False
    sums: bool = False
    layout: str = "blocked"
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """What the table calls it."""
        words = [self.producer]
        words += [word for word in ("gated", "masked") if getattr(self, word)]
        words += ["->"]
        if self.features and self.tokens:
            words += ["both", self.features]
        elif self.features or self.tokens:
            words += ["features" if self.features else "tokens", str(self.features or self.tokens)]
        words += [word for word in ("dense", "sums") if getattr(self, word)]
        words += ["fp16"] if self.dtype == "float16" else []
        return " ".join([*words, self.layout, f"sm_{self.target}"])


def produced_cases(quick: bool) -> Iterator[ProducedCase]:
    """Yield what is launched; quick: each producer and each output once, and every architecture."""
    if quick:
        yield ProducedCase("gelu", "mvue", None, 100, dense=True, sums=True, dtype="float16")
        yield ProducedCase("relu_squared", "mvue", "mvue", 80, gated=True)
        yield ProducedCase("gelu_tanh", "mvue", "mvue", 90, masked=True)
        yield ProducedCase("silu", "mvue", "mvue", 90, gated=True, sums=True)
        yield ProducedCase("relu", None, "random", 120, gated=True, layout="plain")
        yield ProducedCase("cross_entropy", "mvue", "mvue", 90)
        yield ProducedCase("cross_entropy", "mvue", None, 80, dense=True)
        return
    plain = [(name, False, False) for name in variants.PRODUCER_CODES]
    gated = [(name, True, False) for name in variants.PRODUCER_CODES if name != "cross_entropy"]
    masked = [("gelu", False, True), ("silu", True, True)]
    for target in TARGETS:
        for name, gate, mask in (*plain, *gated, *masked):
            for features, tokens, dense in (
                ("mvue", "mvue", False), ("mvue", None, True), ("magnitude", None, True),
                ("mvue", None, False), ("magnitude", "magnitude", False), (None, "mvue", True),
            ):  # fmt: skip
                yield ProducedCase(name, features, tokens, target, gate, mask, dense)
        for layout in LAYOUTS:
            if layout != "blocked":
                yield ProducedCase("gelu", "mvue", "mvue", target, layout=layout)
        yield ProducedCase("gelu", "random", "random", target)
        yield ProducedCase("gelu", "mvue", "mvue", target, sums=True)
        yield ProducedCase("gelu", "mvue", None, target, dense=True, sums=True)
        yield ProducedCase("silu", "mvue", "mvue", target, gated=True, sums=True)
        yield ProducedCase("silu", "mvue", "mvue", target, gated=True, dtype="float16")
        yield ProducedCase("cross_entropy", "mvue", "mvue", target, dtype="float16")


def produced_pass(case: ProducedCase) -> Pass:
    """Compile and count one case."""
    layout, dtype = LAYOUTS[case.layout], getattr(torch, case.dtype)
    features = None if case.features is None else Target(case.features, layout)
    tokens = None if case.tokens is None else Target(case.tokens, layout)
    kind = ProducerKind(case.producer, case.gated, case.masked)
    tile = kind.tile(variants.choose_tile(ROWS, COLS, features, tokens))
    pack = PackVariant(dtype, features, tokens, tile, column_sums=case.sums)
    variant = ProducedVariant(kind, case.dense, pack)
    gradients = 2 if case.gated else 1
    # Upstream and one saved tensor for each gradient; the logits alone; a byte of the mask.
    read = 2.0 if case.producer == "cross_entropy" else 2.0 + 2 * gradients + case.masked
    wrote = 2.0 * case.dense + written(layout, features, tokens, tile)
    wrote += 2 * 4 / tile.block_m if case.sums else 0  # written, and read once to be added up
    moved = read + gradients * wrote
    return count("produced_kernel", variant.constants(True), tile, case.target, moved)


def floor_ratio(one: Pass, card: Card) -> float:
    """Return the modelled time of a kernel over the time that its bytes take."""
    floor = one.bytes / (card.bandwidth * 1e12 * DRAM_SHARE)
    return one.seconds_per_element(card) / floor


def produced_report(case: ProducedCase) -> dict[str, Any]:
    """Return what was counted, what is modelled from it, and what is over budget."""
    one = produced_pass(case)
    cards = [card for card in CARDS if card.target == case.target]
    loads, stores = (
        sorted({width for (name, width) in one.code.accesses if name == kind})
        for kind in ("LDG", "STG")
    )
    answer: dict[str, Any] = {
        "case": asdict(case),
        "name": case.name,
        "kind": "produced",
        "instructions": 32 * one.code.issued * one.code.warps / one.elements,
        "cycles": one.pipes(case.target),
        "bytes": one.bytes,
        "registers": one.code.registers,
        "stack": one.code.stack,
        "shared": one.code.shared,
        "warps": one.code.resident,
        "loads": loads,
        "stores": stores,
        "half_filled": 0.0,
        "modelled_clones": {card.name: clones([one], card) for card in cards},
        "modelled_floors": {card.name: floor_ratio(one, card) for card in cards},
        "ptx": sorted(one.ptx),
    }
    answer["over"] = over_budget(case, answer)
    return answer


def over_budget(case: ProducedCase, answer: dict[str, Any]) -> list[str]:
    """Return what a case exceeds: the time of its bytes, stack, narrow accesses."""
    over = [
        f"{card}: {ratio:.3f} of the time of its bytes, budget {LIMIT}"
        for card, ratio in answer["modelled_floors"].items()
        if card in LIMITED and ratio > LIMIT
    ]
    if answer["stack"]:
        over.append(f"{answer['stack']} bytes of stack")
    # Rows of a cross-entropy, metadata and sums are words; nothing else may be narrower.
    word = (WORD,) if case.producer == "cross_entropy" else ()
    narrow = [width for width in answer["loads"] if width not in (*word, *WIDE)]
    narrow += [width for width in answer["stores"] if width not in (WORD, *WIDE)]
    return [*over, *([f"accesses of {narrow} bytes"] if narrow else [])]
