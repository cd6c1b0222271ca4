"""Distributed data parallel: convert, then wrap.

torchrun --nproc-per-node 2 examples/ddp.py --steps 100
Several machines: torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \
  --rdzv-endpoint HOST:29500 examples/ddp.py
"""

import torch
import torch.distributed as dist
from tiny_gpt import BATCH, CLIP, Text, arguments, build_model, build_optimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import sdgp_cusparselt as sdgp

CUDA = torch.cuda.is_available()


def train(steps: int, batch: int = BATCH) -> tuple[torch.nn.Module, list[float]]:
    """Return the trained model and the mean loss over the ranks of every step."""
    device = torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")
    model = build_model().to(device)
    # One rank of each kind of GPU tries a shape when it first occurs; the others wait for its
    # result, and not longer than 15 s.
    sdgp.convert_(model, sdgp.SDGPConfig(prune="mvue"))
    wrapped = DistributedDataParallel(model, device_ids=[device] if CUDA else None)
    optimizer = build_optimizer(model)
    sampler = DistributedSampler(Text(), shuffle=False)
    batches = iter(DataLoader(Text(), batch_size=batch, sampler=sampler))
    losses = []
    for _ in range(steps):
        inputs = {name: tensor.to(device) for name, tensor in next(batches).items()}
        loss = wrapped(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
    return model, losses


def main() -> None:
    options = arguments(__doc__)
    dist.init_process_group("nccl" if CUDA else "gloo")
    if CUDA:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    _, losses = train(options.steps)
    if dist.get_rank() == 0:
        print(f"final loss {losses[-1]:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
