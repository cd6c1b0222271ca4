"""Run by torchrun in two processes: fused models under DDP, FSDP2 and tensor parallelism.

Writes what the ranks found to the JSON file in argv[1]; test_fused_ranks.py judges it.
"""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import sdgp_cusparselt as sdgp

MAGNITUDE = sdgp.SDGPConfig(prune="magnitude")


class Gated(nn.Module):
    """Llama's MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def model() -> nn.Sequential:
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    whole = nn.Sequential(plain, Gated()).double()
    sdgp.convert_(whole, MAGNITUDE)
    return whole


def fused() -> nn.Sequential:
    whole = model()
    sdgp.fuse_(whole)
    return whole


def step(whole: nn.Module) -> tuple[list[Tensor], int]:
    """Return the gradients of a step on the same data on all ranks, and the fused nodes in it."""
    torch.manual_seed(4)
    whole.zero_grad()
    output = whole(torch.randn(8, 16, dtype=torch.float64, requires_grad=True))
    nodes, todo = set[Any](), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [parent for parent, _ in node.next_functions]
    output.square().sum().backward()
    grads = (p.grad for p in whole.parameters())
    whole_grads = [getattr(g, "full_tensor", lambda g=g: g)() for g in grads]
    return whole_grads, sum("Activated" in type(node).__name__ for node in nodes)


def alike(whole: nn.Module, expected: list[Tensor], count: int) -> bool:
    """Whether gradients are the expected ones, from so many fused nodes."""
    grads, nodes = step(whole)
    return nodes == count and all(
        torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(grads, expected, strict=True)
    )


def data_parallel(found: dict[str, Any], expected: list[Tensor]) -> None:
    found["ddp, fused before"] = alike(DistributedDataParallel(fused()), expected, 2)
    wrapped = DistributedDataParallel(model())
    found["ddp, names"] = sorted(sdgp.fuse_(wrapped).fused)
    found["ddp, fused after"] = alike(wrapped, expected, 2)
    sdgp.revert_(wrapped)
    found["ddp, reverted"] = step(wrapped)[1] == 0


def sharded(whole: nn.Sequential) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (2,))
    for block in whole:
        fully_shard(block, mesh=mesh)
    fully_shard(whole, mesh=mesh)
    return whole


def fully_sharded(found: dict[str, Any], expected: list[Tensor]) -> None:
    found["fsdp2, fused before"] = alike(sharded(fused()), expected, 2)
    late = sharded(model())
    sdgp.fuse_(late)
    found["fsdp2, fused after"] = alike(late, expected, 2)
    sdgp.revert_(late)
    found["fsdp2, reverted"] = step(late)[1] == 0
    single = fused()
    fully_shard(single[0][0], mesh=init_device_mesh("cpu", (2,)))
    found["fsdp2, a layer by itself"] = alike(single, expected, 1)


def split_over(mesh: DeviceMesh, whole: nn.Sequential) -> nn.Sequential:
    """Split the layers of both parts; torch 2.8 also looks at the top for what a path ends with."""
    plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(whole[0], mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    parallelize_module(whole[1], mesh, plan)
    return whole


def tensor_parallel(found: dict[str, Any], expected: list[Tensor]) -> None:
    mesh = init_device_mesh("cpu", (2,))
    found["tp, fused before"] = alike(split_over(mesh, fused()), expected, 0)
    late = split_over(mesh, model())
    try:
        sdgp.fuse_(late)
    except ValueError as error:
        found["tp, fused after"] = str(error)


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    expected, _ = step(model())
    found: dict[str, Any] = {}
    for part in (data_parallel, fully_sharded, tensor_parallel):
        part(found, expected)
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(gathered))
    dist.barrier()


if __name__ == "__main__":
    main()
