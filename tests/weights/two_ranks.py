"""Run by torchrun in two processes: recipes under DDP and FSDP2.

Writes what rank 0 found to the JSON file in argv[1]; test_distributed.py judges it.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.weights import FST, SRSTE, OneShot, SLoPe, WeightRecipe, sparsify_

STEPS, BATCH, LEARNING_RATE = 6, 8, 0.05
SCHEDULE = sdgp.Schedule(total_steps=STEPS)
RECIPES: dict[str, WeightRecipe] = {
    "one-shot": OneShot(schedule=sdgp.Schedule(warmup=3)),
    "sr-ste": SRSTE(decay=0.05),
    "slope": SLoPe(rank=2, adapter_share=0.5, schedule=SCHEDULE),
    "fst": FST(decay=0.05, refresh_every=2, mvue=False, schedule=SCHEDULE),
}


def built(recipe: WeightRecipe) -> nn.Module:
    torch.manual_seed(0)
    # Of 20 rows each rank holds ten: a shard cuts through blocks of four.
    model = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16)).double()
    sparsify_(model, recipe, config=sdgp.SDGPConfig(prune="none", backend="dense"))
    return model


def train(model: nn.Module, wrapped: nn.Module, part: slice) -> None:
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=LEARNING_RATE, momentum=0.9)
    sdgp.step_with(optimizer, wrapped)
    for step in range(STEPS):
        torch.manual_seed(step)
        x, target = torch.randn(2, BATCH, 16).double()
        optimizer.zero_grad()
        (wrapped(x[part]) - target[part]).square().mean().backward()
        optimizer.step()


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in other)


def compare(recipe: WeightRecipe) -> dict[str, Any]:
    """Train on half batches here and on whole batches alone."""
    rank = dist.get_rank()
    part = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    alone = built(recipe)
    train(alone, alone, slice(None))
    reference = alone.state_dict()
    ddp = built(recipe)
    train(ddp, DistributedDataParallel(ddp), part)
    sharded = built(recipe)
    fully_shard(sharded)
    train(sharded, sharded, part)
    whole = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(sharded, options=whole)
    fresh = built(recipe)
    set_model_state_dict(fresh, copy.deepcopy(state))
    return {
        "ddp": distance(ddp.state_dict(), reference),
        "fsdp2": distance(state, reference),
        "keys": sorted(state) == sorted(reference),
        "step": sdgp.schedule_state(fresh)["step"],
        "loaded": distance(fresh.state_dict(), reference),
        "zeros": float((~reference["0.weight_mask"]).double().mean()),
    }


def main() -> None:
    dist.init_process_group("gloo")
    found = {name: compare(recipe) for name, recipe in RECIPES.items()}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
