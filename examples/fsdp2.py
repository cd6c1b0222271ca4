"""FSDP2 (fully_shard): convert, then shard each block and the model.

torchrun --nproc-per-node 2 examples/fsdp2.py --steps 100
"""

import torch
import torch.distributed as dist
from tiny_gpt import BATCH, CLIP, Text, arguments, build_model, build_optimizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import sdgp_cusparselt as sdgp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(steps: int, batch: int = BATCH) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return the whole trained state dict (on rank 0) and the mean loss of every step."""
    model = build_model().to(DEVICE)
    sdgp.convert_(model, sdgp.SDGPConfig(prune="mvue"))
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model)  # after sharding: the parameters are other objects now
    sampler = DistributedSampler(Text(), shuffle=False)
    batches = iter(DataLoader(Text(), batch_size=batch, sampler=sampler))
    losses = []
    for _ in range(steps):
        inputs = {name: tensor.to(DEVICE) for name, tensor in next(batches).items()}
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options), losses


def main() -> None:
    options = arguments(__doc__)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    if DEVICE == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    _, losses = train(options.steps)
    if dist.get_rank() == 0:
        print(f"final loss {losses[-1]:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
