"""Accelerate: convert, then prepare.

python examples/accelerate_loop.py --steps 100
accelerate launch examples/accelerate_loop.py --steps 100
"""

import torch
from accelerate import Accelerator
from tiny_gpt import BATCH, CLIP, Text, arguments, build_model, build_optimizer
from torch.utils.data import DataLoader

import sdgp_cusparselt as sdgp


def train(steps: int, accumulate: int = 1) -> tuple[torch.nn.Module, list[float]]:
    """Return the trained model and the loss of every micro batch."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulate)
    model = build_model()
    sdgp.convert_(model, sdgp.SDGPConfig(prune="mvue"))
    optimizer = build_optimizer(model)
    loader = DataLoader(Text(), batch_size=BATCH // accumulate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, batches = [], iter(loader)
    for _ in range(steps * accumulate):
        with accelerator.accumulate(model):
            loss = model(**next(batches)).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return accelerator.unwrap_model(model), losses


if __name__ == "__main__":
    options = arguments(__doc__, accumulate=["1", "2", "4"])
    _, losses = train(options.steps, int(options.accumulate))
    print(f"final loss {losses[-1]:.4f}")
