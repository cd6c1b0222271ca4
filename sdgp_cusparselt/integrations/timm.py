"""Flags for timm's train.py, or any script with argparse; three lines, and timm is not imported.

add_arguments(parser)                             # beside the script's own
convert_from(args, model)                         # after create_model, before it is wrapped
handle = follow(args, optimizer, model)           # after create_optimizer
"""

import argparse
from typing import get_args

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.config.patterns import METHODS
from sdgp_cusparselt.config.schedule import Ramp, Schedule
from sdgp_cusparselt.layers.convert import convert_
from sdgp_cusparselt.layers.fuse import fuse_
from sdgp_cusparselt.layers.report import ConversionReport
from sdgp_cusparselt.layers.stepping import step_with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group of flags; without --sdgp nothing is converted."""
    group = parser.add_argument_group("SDGP", "pruned data gradients on 2:4 sparse tensor cores")
    group.add_argument("--sdgp", choices=METHODS[1:], default=None, help="prune method")
    group.add_argument("--sdgp-n", type=int, default=2, help="kept elements of a group")
    group.add_argument("--sdgp-m", type=int, default=4, help="elements of a group")
    group.add_argument("--sdgp-steps", type=int, help="optimizer steps of the whole training")
    group.add_argument("--sdgp-warmup", type=float, default=0.0, help="dense share at the start")
    group.add_argument("--sdgp-tail", type=float, default=0.0, help="dense share at the end")
    group.add_argument("--sdgp-fuse", action="store_true", help="fuse the activations' backward")
    group.add_argument("--sdgp-ramp", choices=get_args(Ramp), default="none")


def convert_from(args: argparse.Namespace, model: nn.Module) -> ConversionReport | None:
    """Convert as the flags say.

    Args:
        args: with what ``add_arguments`` declared.
        model: before DDP, EMA copies and ``torch.compile``.

    Returns:
        The report; None without --sdgp.

    Raises:
        ValueError: the flags contradict each other, see ``SDGPConfig`` and ``Schedule``, or there
            is nothing to fuse.
    """
    if args.sdgp is None:
        return None
    schedule = None
    if args.sdgp_warmup or args.sdgp_tail or args.sdgp_ramp != "none":
        schedule = Schedule(
            total_steps=args.sdgp_steps,
            warmup=args.sdgp_warmup,
            tail=args.sdgp_tail,
            ramp=args.sdgp_ramp,
        )
    config = SDGPConfig(prune=args.sdgp, n=args.sdgp_n, m=args.sdgp_m, schedule=schedule)
    report = convert_(model, config)
    if args.sdgp_fuse:
        fuse_(model)
    return report


def follow(
    args: argparse.Namespace, optimizer: Optimizer, model: nn.Module
) -> RemovableHandle | None:
    """Count the optimizer's steps; None without --sdgp."""
    return None if args.sdgp is None else step_with(optimizer, model)
