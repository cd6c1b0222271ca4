"""``sdgp check``: does every way on this machine compute what float64 says?"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sdgp_cusparselt.devices import on_device
from sdgp_cusparselt.products import routes
from sdgp_cusparselt.products.selfcheck import CASES, DTYPES, WAYS, Outcome, check
from sdgp_cusparselt.versions import versions

MISMATCH, CANNOT = 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdgp check``."""
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("--json", metavar="PATH", help="write the outcome as JSON; - for stdout")


def run(args: argparse.Namespace) -> int:
    """Check, print the table; 1 on any mismatch, 2 if the device is none."""
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        print(f"sdgp check: device {args.device!r} cannot be used: {error}", file=sys.stderr)
        return CANNOT
    reasons = routes.LIBRARY.machine_reasons(device)
    unavailable = {"sparse": "; ".join(reasons)} if reasons else {}
    with _full_precision(), on_device(device):
        outcomes = [
            check(way, case, dtype, device, args.seed)
            for way in WAYS
            if way not in unavailable
            for case in CASES
            for dtype in DTYPES
        ]
    wrong = sum(outcome.status == "MISMATCH" for outcome in outcomes)
    if args.json:
        text = json.dumps(_document(outcomes, unavailable, wrong), indent=1)
        if args.json == "-":
            print(text)
            return MISMATCH if wrong else 0
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    _print(outcomes, unavailable, wrong)
    return MISMATCH if wrong else 0


def _document(
    outcomes: Sequence[Outcome], unavailable: Mapping[str, str], wrong: int
) -> dict[str, Any]:
    return {
        "versions": versions(),
        "mismatches": wrong,
        "unavailable": dict(unavailable),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def _print(outcomes: Sequence[Outcome], unavailable: Mapping[str, str], wrong: int) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("way", "product", "case", "dtype", "device", "result"):
        table.add_column(column, overflow="fold")
    for o in outcomes:
        result = f"{o.status}: {o.detail}" if o.detail else o.status
        table.add_row(o.way, o.product, o.case, o.dtype, o.device, result)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)
    for name, reason in unavailable.items():
        print(f"{name} is not checked: {reason}")
    ran = sum(outcome.status != "not run" for outcome in outcomes)
    print(f"{ran} products compared with float64, {wrong} out of bound")


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keep dense products of torch from rounding operands to TF32 or partial sums to 16 bits."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    flags = [
        (matmul, "allow_tf32"),
        (cudnn, "allow_tf32"),
        (matmul, "allow_bf16_reduced_precision_reduction"),
        (matmul, "allow_fp16_reduced_precision_reduction"),
    ]
    before = [getattr(owner, name) for owner, name in flags]
    try:
        for owner, name in flags:
            setattr(owner, name, False)
        yield
    finally:
        for (owner, name), value in zip(flags, before, strict=True):
            setattr(owner, name, value)
