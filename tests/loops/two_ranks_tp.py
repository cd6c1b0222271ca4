"""Run by torchrun in two processes: tensor-parallel layers, before and after conversion.

Writes what the ranks found to the JSON file in argv[1]; test_tensor_parallel.py judges it.
"""

import copy
import datetime
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import sdgp_cusparselt as sdgp

#: name -> configuration; the methods that draw nothing give the numbers of one process.
CONFIGS = {
    "none": sdgp.SDGPConfig(prune="none"),
    "magnitude": sdgp.SDGPConfig(prune="magnitude"),
    "rescaled": sdgp.SDGPConfig(prune="rescaled_magnitude"),
    "both": sdgp.SDGPConfig(prune="magnitude", grad_weight="sparse", grad_weight_prune="magnitude"),
}


def mlp(width: int = 32) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Linear(16, width), nn.GELU(), nn.Linear(width, 16), nn.LayerNorm(16)]
    return nn.Sequential(*layers).double()


def parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def batch() -> Tensor:
    return torch.randn(6, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(model: nn.Module) -> list[Tensor]:
    """Return the gradients of the input and of every parameter, as one process would see them."""
    model.zero_grad()
    x = batch().requires_grad_()
    model(x).square().sum().backward()
    return [x.grad, *(whole(p.grad) for p in model.parameters())]


def agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether they agree to float64's rounding of sums of at most 64 terms of size 100."""
    return all(
        torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(found, expected, strict=True)
    )


def methods(found: dict[str, Any], mesh: DeviceMesh) -> None:
    """Every method that draws nothing, converted before and after sharding."""
    for name, config in CONFIGS.items():
        plain = mlp()
        sdgp.convert_(plain, config)
        expected = gradients(plain)
        before = mlp()
        sdgp.convert_(before, config)
        after = parallel(mlp(), mesh)
        found[f"{name} names"] = sdgp.convert_(after, config).converted
        found[f"{name} before"] = agree(gradients(parallel(before, mesh)), expected)
        found[f"{name} after"] = agree(gradients(after), expected)
        found[f"{name} matters"] = not agree(gradients(mlp()), expected)
        found[f"{name} revert"] = sdgp.revert_(after) == ["0", "2"] and agree(
            gradients(after), gradients(mlp())
        )


def sequence_parallel(found: dict[str, Any], mesh: DeviceMesh) -> None:
    """Tokens sharded outside the block, as Llama's recipe has it: torch redistributes them."""
    plain = mlp()
    sdgp.convert_(plain, CONFIGS["both"])
    expected = gradients(plain)
    model = parallelize_module(
        mlp(),
        mesh,
        {
            "0": ColwiseParallel(input_layouts=Replicate()),
            "2": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
            "3": SequenceParallel(sequence_dim=0),
        },
    )
    sdgp.convert_(model, CONFIGS["both"])
    model.append(Whole())
    found["sequence parallel"] = agree(gradients(model), expected)


class Whole(nn.Module):
    """Gathers a DTensor."""

    def forward(self, x: Tensor) -> Tensor:
        return whole(x)


def replicated(found: dict[str, Any], mesh: DeviceMesh) -> None:
    """A weight on every rank and half of a batch on each: every half is pruned by itself."""
    layer, halves = mlp()[0], [half.requires_grad_() for half in batch().chunk(2)]
    sdgp.convert_(layer, CONFIGS["both"])
    for half in halves:
        layer(half).square().sum().backward()
    model = distribute_module(mlp()[0], mesh)
    sdgp.convert_(model, CONFIGS["both"])
    x = distribute_tensor(batch(), mesh, [Shard(0)]).requires_grad_()
    model(x).square().sum().backward()
    given = [x.grad, model.weight.grad, model.bias.grad]
    expected = [torch.cat([half.grad for half in halves]), layer.weight.grad, layer.bias.grad]
    found["replicated"] = agree([whole(g) for g in given], expected)


def uneven(found: dict[str, Any], mesh: DeviceMesh) -> None:
    """Groups would cross the border of two shards of six outputs, so one layer stays plain."""
    one, before, after = mlp(12), mlp(12), parallel(mlp(12), mesh)
    sdgp.convert_(one, {"0": None, "2": CONFIGS["magnitude"]})
    for model in (before, after):
        sdgp.convert_(model, CONFIGS["magnitude"])
    expected = gradients(one)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", sdgp.SDGPFallbackWarning)
        found["uneven before"] = agree(gradients(parallel(before, mesh)), expected)
        found["uneven after"] = agree(gradients(after), expected)
    found["uneven warning"] = [str(w.message) for w in caught if "runs plain" in str(w.message)]
    found["uneven reasons"] = [reason for _, reason in after[0].sdgp_record.fallbacks]


def drawn(layer: nn.Linear, weight: Tensor, style: ParallelStyle, mesh: DeviceMesh) -> Tensor:
    """Return the input gradient of a layer from a gradient of ones, pruned by mvue."""
    with torch.no_grad():
        layer.weight.copy_(weight)
    sdgp.convert_(layer, sdgp.SDGPConfig(prune="mvue", grad_weight="sparse"))
    parallelize_module(layer, mesh, style)
    x = torch.zeros(64, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    return x.grad


def draws(found: dict[str, Any], mesh: DeviceMesh) -> None:
    """What mvue keeps of a group of ones is 2; equal seeds, and different ones."""
    rank, eye = dist.get_rank(), torch.eye(8)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    # Both ranks hold the same ones before the same weight: their sum has 2s only if they differ.
    total = drawn(nn.Linear(8, 16, bias=False), torch.cat([eye, eye]), ColwiseParallel(), mesh)
    found["shards differ"] = bool((total == 2).any()) and bool((total == 4).any())
    torch.manual_seed(rank)
    columns = drawn(
        nn.Linear(16, 8, bias=False),
        torch.cat([eye, eye], 1),
        RowwiseParallel(input_layouts=Replicate()),
        mesh,
    )
    found["replicas agree"] = torch.equal(columns[:, :8], columns[:, 8:])
    kept = columns[:, :8].reshape(-1, 4).count_nonzero(1)
    found["draws"] = sorted(set(kept.tolist())) == [2] and len(columns.unique(dim=0)) > 1
    torch.manual_seed(0)
    found["generator kept"] = bool(torch.equal(state, torch.get_rng_state()))


def with_fsdp(found: dict[str, Any]) -> None:
    """FSDP2 around tensor parallel, on meshes of which one dimension is each of the two."""
    plain = mlp()
    sdgp.convert_(plain, CONFIGS["both"])
    expected = gradients(plain)
    for sizes in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))
        for order in ("before", "after"):
            model = parallel(mlp(), mesh["tensor"])
            if order == "before":
                sdgp.convert_(model, CONFIGS["both"])
            fully_shard(model, mesh=mesh["data"])
            if order == "after":
                sdgp.convert_(model, CONFIGS["both"])
            found[f"fsdp {sizes[0]} tensor {sizes[1]} {order}"] = agree(gradients(model), expected)


def precision(found: dict[str, Any], mesh: DeviceMesh) -> None:
    """bf16 autocast, and a copy of a sharded model."""
    model, x = parallel(mlp().float(), mesh), batch().float().requires_grad_()
    sdgp.convert_(model, CONFIGS["magnitude"])
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = twin(x)
    y.float().square().sum().backward()
    grads = [x.grad, *(p.grad for p in twin.parameters())]
    found["autocast"] = all(g is not None and bool(whole(g).isfinite().all()) for g in grads)


def main() -> None:
    target = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    found: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (2,))
    methods(found, mesh)
    sequence_parallel(found, mesh)
    replicated(found, mesh)
    uneven(found, mesh)
    draws(found, mesh)
    with_fsdp(found)
    precision(found, mesh)
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        target.write_text(json.dumps(gathered))
    dist.barrier()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
