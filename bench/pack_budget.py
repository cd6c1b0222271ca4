"""What packing costs by its machine code: counted and modelled, on no GPU. Nothing is measured.

python -m bench.pack_budget            every variant that is launched, about half an hour
python -m bench.pack_budget --quick    the common ones: about two
python -m bench.pack_budget --json     the same, for programs

Each variant is compiled by Triton's own ptxas for sm_80 to sm_120, with the block that a launch
would choose for a large gradient, and disassembled. Printed are instructions per element of x, by
pipe, registers, resident warps, accesses, half-filled sectors, and the modelled time in clones of
the tensor (``bench.pack_model`` says what that assumes), for kernels that make their gradient in
times of its bytes (``bench.pack_produced``). A variant outside its budget makes the exit status 1;
tests/packing holds the same budgets.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.pack_count import (
    COLS,
    LAYOUTS,
    METHODS,
    ROWS,
    TARGETS,
    WIDE,
    WORD,
    count,
    operands,
    written,
)
from bench.pack_model import CARDS, SECTOR, Pass, clones, partial_sectors
from bench.pack_produced import ProducedCase, produced_cases, produced_report
from sdgp_cusparselt.packing import variants
from sdgp_cusparselt.packing.variants import PackVariant, PruneVariant, SumsVariant, Target

#: In clones: one direction, both, and pruning to a dense tensor; on each card.
BUDGETS = {
    "one": {"A100-80": 0.80, "H100": 0.80, "H200": 0.95},
    "both": {"A100-80": 1.15, "H100": 1.15, "H200": 1.60},
    "dense": {"A100-80": 1.05, "H100": 1.05, "H200": 1.20},
    # The sums are a pass of their own, that reads x once more.
    "one rescaled": {"A100-80": 1.40, "H100": 1.40},
    "both rescaled": {"A100-80": 2.30, "H100": 2.30},
    "dense rescaled": {"A100-80": 1.65, "H100": 1.65},
}


@dataclass(frozen=True)
class Case:
    """One thing that is launched: a kernel's variant, or a prune, on one architecture."""

    features: str | None
    tokens: str | None
    layout: str
    target: int
    n: int = 2
    column_sums: bool = False
    dense: bool = False
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """What the table calls it."""
        if self.features and self.tokens:
            alike = self.features == self.tokens
            ways = f"both {self.features}" + ("" if alike else f" and {self.tokens}")
        else:
            ways = f"features {self.features}" if self.features else f"tokens {self.tokens}"
        more = [f"1:{4}"] if self.n == 1 else []
        more += ["sums"] if self.column_sums else []
        more += ["fp16"] if self.dtype == "float16" else []
        where = "to dense" if self.dense else self.layout
        return f"{' '.join([ways, *more])} {where} sm_{self.target}"

    @property
    def kind(self) -> str:
        """Which budget it has."""
        ways = "dense" if self.dense else "both" if self.features and self.tokens else "one"
        return f"{ways} rescaled" if "rescaled_magnitude" in (self.features, self.tokens) else ways


def cases(quick: bool) -> Iterator[Case]:
    """Yield what is launched; quick: each of everything, but few mixtures."""
    if quick:
        yield Case("mvue", None, "blocked", 90)
        yield Case("magnitude", "magnitude", "blocked", 90)
        yield Case("mvue", "mvue", "blocked", 90)
        yield Case("mvue", "mvue", "blocked", 80)
        yield Case("mvue", "mvue", "sm90-interleaved", 100)
        yield Case("mvue", "mvue", "sm90-atom", 120)
        yield Case("mvue", "magnitude", "plain", 80, column_sums=True, dtype="float16")
        yield Case("rescaled_magnitude", None, "blocked", 90)
        yield Case(None, "random", "", 80, n=1, dense=True)
        return
    for target, name in itertools.product(TARGETS, LAYOUTS):
        for method in METHODS:
            yield Case(method, None, name, target)
            yield Case(None, method, name, target)
        for pair in itertools.product(METHODS, METHODS):
            if pair[0] == pair[1] or name == "blocked":
                yield Case(*pair, name, target)
    for target, method in itertools.product(TARGETS, METHODS):
        for features, tokens in ((method, None), (None, method)):
            for n in (2, 1):
                yield Case(features, tokens, "", target, n=n, dense=True)
            yield Case(features, tokens, "blocked", target, n=1)
            yield Case(features, tokens, "blocked", target, dtype="float16")
        yield Case(method, method, "blocked", target, column_sums=True)
        yield Case(method, method, "blocked", target, dtype="float16")


def passes(case: Case) -> list[Pass]:
    """Compile and count the kernels of a case, in the order in which they run."""
    dtype = getattr(torch, case.dtype)
    found = [
        _sums(SumsVariant(dtype, tokens, case.n), case.target)
        for tokens, method in ((False, case.features), (True, case.tokens))
        if method == "rescaled_magnitude"
    ]
    if case.dense:
        prune = PruneVariant(dtype, case.features or case.tokens or "", bool(case.tokens), case.n)
        tile = prune.tile
        moved = 4.0 + 4 * _ratio_reads(case, tile)
        return [*found, count("prune_kernel", prune.constants(True), tile, case.target, moved)]
    layout = LAYOUTS[case.layout]
    features = None if case.features is None else Target(case.features, layout)
    tokens = None if case.tokens is None else Target(case.tokens, layout)
    tile = variants.choose_tile(ROWS, COLS, features, tokens)
    ratio = variants.RATIO_PER_BLOCK if case.features == "rescaled_magnitude" else 0
    variant = PackVariant(
        dtype, features, tokens, tile, case.n, ratio, column_sums=case.column_sums
    )
    moved = 2.0 + written(layout, features, tokens, tile) + 4 * _ratio_reads(case, tile)
    if case.column_sums:
        moved += 2 * 4 / tile.block_m  # written, and read once to be added up
    pack = count("pack_kernel", variant.constants(True), tile, case.target, moved)
    return [*found, pack]


def half_filled(case: Case) -> float:
    """Return the share of sectors, of values and metadata, that a block fills in part."""
    if case.dense:
        return 0.0
    layout = LAYOUTS[case.layout]
    features, tokens = (
        None if method is None else Target(method, layout)
        for method in (case.features, case.tokens)
    )
    tile = variants.choose_tile(ROWS, COLS, features, tokens)
    shares = []
    for wanted, rows, cols in operands(features, tokens, tile):
        if wanted is not None:
            # A row of values of a block is as many bytes as it has columns.
            shares += [float(cols % SECTOR != 0), partial_sectors(layout, rows, cols)]
    return max(shares)


def _ratio_reads(case: Case, tile: variants.Tile) -> float:
    """Return the ratios that come from DRAM per element: each is read by many blocks, once new."""
    along_features = case.features == "rescaled_magnitude"
    return (1 / ROWS if along_features else 0) + (
        1 / COLS if case.tokens == "rescaled_magnitude" else 0
    )


def _sums(variant: SumsVariant, target: int) -> Pass:
    # Two sums of 4 bytes, written and read again by the reduction that follows.
    moved = 2.0 + 2 * 2 * 4 / variant.span
    return count(
        variant.kernel, variant.constants(), variant.tile, target, moved, variants.SUM_STEPS
    )


def report(case: Case) -> dict[str, Any]:
    """Return what was counted of a case, what is modelled from it, and what is over budget."""
    found = passes(case)
    last = found[-1]
    modelled = {card.name: clones(found, card) for card in CARDS if card.target == case.target}
    loads, stores = (
        sorted({width for (name, width) in last.code.accesses if name == kind})
        for kind in ("LDG", "STG")
    )
    answer: dict[str, Any] = {
        "case": asdict(case),
        "name": case.name,
        "kind": case.kind,
        "instructions": sum(32 * one.code.issued * one.code.warps / one.elements for one in found),
        "cycles": {
            name: sum(one.pipes(case.target)[name] for one in found)
            for name in found[0].pipes(case.target)
        },
        "bytes": sum(one.bytes for one in found),
        "registers": max(one.code.registers for one in found),
        "stack": max(one.code.stack for one in found),
        "shared": max(one.code.shared for one in found),
        "warps": last.code.resident,
        "loads": loads,
        "stores": stores,
        "half_filled": half_filled(case),
        "modelled_clones": modelled,
        "ptx": sorted(frozenset().union(*(one.ptx for one in found))),
    }
    answer["over"] = over_budget(case, answer)
    return answer


def over_budget(case: Case, answer: dict[str, Any]) -> list[str]:
    """Return what a case exceeds: clones, stack, narrow accesses, half-filled sectors."""
    limits = BUDGETS[case.kind]
    over = [
        f"{card}: {ratio:.3f} clones, budget {limits[card]}"
        for card, ratio in answer["modelled_clones"].items()
        if ratio > limits.get(card, ratio)
    ]
    if answer["half_filled"]:
        over.append(f"{answer['half_filled']:.2f} of the sectors half-filled")
    if answer["stack"]:
        over.append(f"{answer['stack']} bytes of stack")
    # Ratios and seeds are words; nothing else may be narrower than half a vector.
    word_loads = (WORD,) if "rescaled_magnitude" in (case.features, case.tokens) else ()
    word_stores = () if case.dense else (WORD,)
    for name, allowed in (("loads", (*word_loads, *WIDE)), ("stores", (*word_stores, *WIDE))):
        narrow = [width for width in answer[name] if width not in allowed]
        if narrow:
            over.append(f"{name} of {narrow} bytes")
    return over


def report_of(case: Case | ProducedCase) -> dict[str, Any]:
    """Return the report of a pack or of what makes a gradient and packs it."""
    return report(case) if isinstance(case, Case) else produced_report(case)


def table(reports: list[dict[str, Any]]) -> str:
    """Return the counts and the model's ratios, a line a case."""
    lines = [
        "Counted from machine code, times modelled, nothing measured. Per element of x:"
        " instructions, cycles of the busiest pipe of one scheduler per 32 elements, bytes.",
        f"{'case':60} {'instr':>6} {'busiest':>12} {'bytes':>6} {'regs':>5} {'warps':>5}"
        "  half  clones of the tensor, modelled",
    ]
    for one in reports:
        pipe, cycles = max(one["cycles"].items(), key=lambda item: item[1])
        ratios = ", ".join(f"{card} {ratio:.2f}" for card, ratio in one["modelled_clones"].items())
        for card, ratio in one.get("modelled_floors", {}).items():
            ratios += f", {card} {ratio:.3f} of its bytes"
        lines.append(
            f"{one['name']:60} {one['instructions']:6.1f} {pipe + f' {cycles:.1f}':>12}"
            f" {one['bytes']:6.2f} {one['registers']:5} {one['warps']:5}"
            f" {one['half_filled']:5.2f}  {ratios}"
            + "".join(f"  OVER: {reason}" for reason in one["over"])
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table or JSON; return 1 if a variant is over its budget."""
    parser = argparse.ArgumentParser(prog="python -m bench.pack_budget", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the common variants only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    wanted = [*cases(options.quick), *produced_cases(options.quick)]
    with ProcessPoolExecutor(options.jobs) as pool:
        reports = list(pool.map(report_of, wanted))
    print(json.dumps(reports) if options.json else table(reports))
    return int(any(one["over"] for one in reports))


if __name__ == "__main__":
    sys.exit(main())
