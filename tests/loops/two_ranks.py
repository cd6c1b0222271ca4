"""Run by torchrun in two processes: everything that needs more than one, in one launch.

Writes what rank 0 found to the JSON file in argv[1]; test_distributed.py judges it.
"""

import copy
import datetime
import json
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.tuning import Decision, TuningCache, decision_for
from tests.helpers import in_float64
from tests.loops.examples import EXAMPLES, load, pruned_by
from tests.tuning.fakes import GEMM, FakeExecutor, fixed

STEPS = 3


class FailingExecutor(FakeExecutor):
    """Dies of something that no tuning expects, once the other rank knows that it tunes."""

    def candidates(self, gemm: Gemm, *, safe: bool = True) -> list[Candidate]:
        dist.barrier()
        raise RuntimeError("this rank's GPU fell off the bus")


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[k] - other[k]).abs().max()) for k in other)


def scripts() -> None:
    """Run the scripts as torchrun runs them, but in the process group that is there already."""
    with (
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
    ):
        for name in ("ddp", "fsdp2"):
            sys.argv = [name, "--steps", "1"]
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def examples(found: dict[str, Any]) -> None:
    """Train the examples on half batches here and on whole batches alone."""
    half = load("tiny_gpt").BATCH // 2
    with pruned_by("magnitude"), in_float64():
        alone, losses = load("plain_pytorch").train(STEPS)
        reference = alone.state_dict()
        wrapped, found["ddp losses"] = load("ddp").train(STEPS, half)
        found["ddp distance"] = distance(wrapped.state_dict(), reference)
        sharded, found["fsdp2 losses"] = load("fsdp2").train(STEPS, half)
        if sharded:
            found["fsdp2 distance"] = distance(sharded, reference)
            found["fsdp2 keys"] = sorted(sharded) == sorted(reference)
    found["losses"] = losses


def decide(
    cache: TuningCache, executor: FakeExecutor, gemm: Gemm = GEMM, tune: str = "first_use"
) -> Decision:
    return decision_for(
        gemm,
        executor,
        sdgp.SDGPConfig(prune="magnitude", tune=tune),
        method="magnitude",
        transpose=False,
        capturing=False,
        cache=cache,
        timer=fixed(a0=40.0),
    )


def failing_tuner(found: dict[str, Any], folder: Path) -> None:
    """Rank 0 dies while it tunes; rank 1 waits for its turn, tunes, and both go on."""
    cache, failed = TuningCache(folder / "failing"), False
    if dist.get_rank() == 0:
        try:
            decide(cache, FailingExecutor())
        except RuntimeError:
            failed = True
    else:
        dist.barrier()
        found["after a failure"] = decide(cache, FakeExecutor("good")).use
    dist.barrier()
    if dist.get_rank() == 0:
        found["rank 0 failed"] = failed
        found["rank 0 reads"] = decide(TuningCache(folder / "failing"), FailingExecutor("good")).use


def stuck_tuner(found: dict[str, Any], folder: Path) -> None:
    """Rank 0 keeps the turn until rank 1 is through: were rank 1 to wait for it, neither ends."""
    cache, executor = TuningCache(folder / "stuck", timeout_s=0.2), FakeExecutor("good")
    if dist.get_rank() == 0:
        with cache.turn(executor, GEMM.device) as held:
            found["rank 0 holds the turn"] = held
            dist.barrier()
            dist.barrier()
    else:
        dist.barrier()
        decision = decide(cache, executor)
        found["while stuck"] = [decision.use, decision.transient, decision.reason]
        dist.barrier()


def one_rank_decides(found: dict[str, Any], folder: Path) -> None:
    """Both ranks meet the same products at the same time, as data parallel ones do."""
    cache, executor = TuningCache(folder / "auto"), FakeExecutor("good")
    widths = range(16, 80, 8)
    dist.barrier()
    uses = [decide(cache, executor, replace(GEMM, n=n), "auto").use for n in widths]
    searched: list[Any] = [None, None]
    dist.all_gather_object(searched, (executor.calls["candidates"], uses))
    found["searches and uses"] = searched


def block() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).double()


def gradients(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(4)
    model.zero_grad()
    model(torch.randn(8, 16).double()).square().sum().backward()
    grads = (p.grad for p in model.parameters())
    return [getattr(g, "full_tensor", lambda g=g: g)() for g in grads]


def error_of(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def order(found: dict[str, Any]) -> None:
    """Convert before and after wrapping and sharding."""
    plain, first = block(), block()
    sdgp.convert_(first, sdgp.SDGPConfig(prune="magnitude"))
    expected = gradients(first)
    found["pruning matters"] = not torch.equal(gradients(plain)[0], expected[0])

    late = DistributedDataParallel(block())
    found["ddp names"] = sdgp.convert_(late, sdgp.SDGPConfig(prune="magnitude")).converted
    found["ddp late"] = all(map(torch.equal, gradients(late), expected))
    found["ddp revert"] = sdgp.revert_(late)
    found["ddp reverted"] = all(map(torch.equal, gradients(late), gradients(plain)))

    mesh = init_device_mesh("cpu", (2,))
    container = fully_shard(block(), mesh=mesh)
    found["fsdp names"] = sdgp.convert_(container, sdgp.SDGPConfig(prune="magnitude")).converted
    found["fsdp late"] = all(map(torch.allclose, gradients(container), expected))
    found["fsdp revert"] = sdgp.revert_(container)

    single = block()
    fully_shard(single[0], mesh=mesh)
    found["sharded layer"] = sdgp.convert_(single, sdgp.SDGPConfig(prune="magnitude")).skipped

    early = copy.deepcopy(first)
    fully_shard(early[2], mesh=mesh)
    found["sharded after"] = all(map(torch.allclose, gradients(early), expected))
    found["revert sharded"] = error_of(sdgp.revert_, early)
    found["unchanged"] = all(isinstance(early[i], sdgp.nn.SDGPLinear) for i in (0, 2))


def main() -> None:
    target = Path(sys.argv[1])
    load("tiny_gpt")  # and with it the folder of the examples
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    found: dict[str, Any] = {}
    scripts()
    examples(found)
    failing_tuner(found, target.parent)
    stuck_tuner(found, target.parent)
    one_rank_decides(found, target.parent)
    order(found)
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        target.write_text(json.dumps({**gathered[1], **gathered[0]}))
    dist.barrier()


if __name__ == "__main__":
    main()
    # Everything is written. torch's gloo threads sometimes abort the process while it winds down
    # ("terminate called without an active exception"), so it does not wind down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
