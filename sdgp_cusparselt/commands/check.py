"""``sdgp check``: does every way on this machine compute what float64 says?"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table

from sdgp_cusparselt.commands.arguments import device_of, integer
from sdgp_cusparselt.commands.console import Output
from sdgp_cusparselt.devices import on_device
from sdgp_cusparselt.products import routes
from sdgp_cusparselt.products.selfcheck import CASES, DTYPES, WAYS, Outcome, check
from sdgp_cusparselt.versions import versions

WRONG = 1
MISMATCH, NOT_RUN = "MISMATCH", "not run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdgp check``."""
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--seed", type=integer(0), default=0, help="of the data")
    parser.add_argument("--details", action="store_true", help="list what is right, too")


def run(args: argparse.Namespace) -> int:
    """Check, print the verdict and what is wrong; 1 on any mismatch."""
    device = device_of(args.device)
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
    output = Output(args)
    wrong = sum(outcome.status == MISMATCH for outcome in outcomes)
    output.write_json(_document(outcomes, unavailable, wrong))
    _print(output, outcomes, unavailable, wrong, args.details)
    return WRONG if wrong else 0


def _document(
    outcomes: Sequence[Outcome], unavailable: Mapping[str, str], wrong: int
) -> dict[str, Any]:
    return {
        "versions": versions(),
        "mismatches": wrong,
        "unavailable": dict(unavailable),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def _print(
    output: Output,
    outcomes: Sequence[Outcome],
    unavailable: Mapping[str, str],
    wrong: int,
    details: bool,
) -> None:
    for name in dict.fromkeys(outcome.way for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.way == name]
        ran = sum(outcome.status != NOT_RUN for outcome in own)
        bad = sum(outcome.status == MISMATCH for outcome in own)
        verdict = f"WRONG: {bad} out of bound" if bad else "right: none out of bound"
        left = f"; {len(own) - ran} that it cannot run" if ran < len(own) else ""
        output.prose(f"{name} is {verdict}, of {ran} products compared with float64{left}.")
    for name, reason in unavailable.items():
        output.prose(f"{name} is not checked: {reason}")
    shown = [o for o in outcomes if details or o.status == MISMATCH]
    if shown:
        output.print()
        output.print(_table(shown))
    if not details and len(shown) < len(outcomes):
        output.print("Every product: --details")


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("way", "product", "case", "dtype", "device", "result"):
        table.add_column(column, overflow="fold")
    for o in outcomes:
        result = f"{o.status}: {o.detail}" if o.detail else o.status
        table.add_row(o.way, o.product, o.case, o.dtype, o.device, result)
    return table


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
