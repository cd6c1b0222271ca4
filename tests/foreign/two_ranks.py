"""What two processes find: DDP, FSDP2 and tensor parallelism on converted layers. By torchrun.

Rank 0 writes the tally of both ranks to argv[1]; test_ranks.py judges it.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import sdgp_cusparselt as sdgp
from tests.foreign.comparing import MAGNITUDE, NONE, close
from tests.foreign.tally import Tally

MVUE = sdgp.SDGPConfig(prune="mvue", backend="dense")


class Block(nn.Module):
    """Up and down: a column-wise layer and a row-wise one."""

    def __init__(self, width: int = 16, inner: int = 32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


def batch() -> Tensor:
    torch.manual_seed(4)
    return torch.randn(8, 16, dtype=torch.float64, requires_grad=True)


def found(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Return grad_input and the whole gradient of every parameter."""
    x = batch()
    model.zero_grad()
    (model(x).square().sum()).backward()
    grads = {"input": x.grad}
    for name, parameter in zip(names, model.parameters(), strict=True):
        grad = parameter.grad
        grads[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return grads


def tensor_parallel(model: Block, mesh: DeviceMesh) -> nn.Module:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    return model


def wraps(mesh: DeviceMesh) -> dict[str, Callable[[Block], nn.Module]]:
    def sharded(model: Block) -> nn.Module:
        return fully_shard(model, mesh=mesh)

    def both(model: Block) -> nn.Module:
        grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
        return fully_shard(tensor_parallel(model, grid["tensor"]), mesh=grid["data"])

    return {
        "ddp": DistributedDataParallel,
        "fsdp2": sharded,
        "tp": lambda model: tensor_parallel(model, mesh),
        "tp+fsdp2": both,
    }


def judge(tally: Tally, mesh: DeviceMesh) -> None:
    """Same batch on both ranks, so every way must find what one process finds."""
    names = [name for name, _ in Block().named_parameters()]
    for config in (NONE, MAGNITUDE):
        alone = Block()
        sdgp.convert_(alone, config, preset="all")
        expected = found(alone, names)
        for way, wrap in wraps(mesh).items():

            def before(wrap=wrap, config=config, expected=expected) -> None:
                model = Block()
                sdgp.convert_(model, config, preset="all")
                close(found(wrap(model), names), expected)

            def after(wrap=wrap, config=config, expected=expected) -> None:
                model = wrap(Block())
                sdgp.convert_(model, config, preset="all")
                close(found(model, names), expected)

            for order in (before, after):
                tally.check(f"ranks {way} {config.prune} {order.__name__}", order)
    draws(tally, mesh)


def draws(tally: Tally, mesh: DeviceMesh) -> None:
    """A method that draws: ranks that hold replicas of a gradient draw the same numbers for it."""

    def agree() -> None:
        model = Block()
        sdgp.convert_(model, MVUE, preset="all")
        tensor_parallel(model, mesh)
        torch.manual_seed(10 + dist.get_rank())  # as data-parallel programs seed their ranks
        mine = found(model, [name for name, _ in Block().named_parameters()])["input"]
        theirs = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(theirs, mine)
        close(theirs[0], theirs[1])

    tally.check("ranks tp mvue replicas agree", agree)


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    tally = Tally()
    judge(tally, mesh)
    everyone: list[Tally] = [Tally()] * 2
    dist.all_gather_object(everyone, tally)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps([vars(one) for one in everyone]))
    dist.barrier()
    # Groups of submeshes keep threads that now and then abort the interpreter on its way out.
    os._exit(0)


if __name__ == "__main__":
    main()
