"""Fused MLPs: convert, then fuse; the activation's backward and the pruning are one kernel.

python examples/fused_mlp.py --steps 100
"""

import torch
from tiny_gpt import BATCH, CLIP, Text, arguments, build_model, build_optimizer
from torch.utils.data import DataLoader

import sdgp_cusparselt as sdgp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(steps: int, fuse: bool = True) -> tuple[torch.nn.Module, list[float]]:
    """Return the trained model and the loss of every step."""
    model = build_model().to(DEVICE)
    sdgp.convert_(model, sdgp.SDGPConfig(prune="mvue"))
    if fuse:
        print(sdgp.fuse_(model))
    optimizer = build_optimizer(model)
    batches = iter(DataLoader(Text(), batch_size=BATCH))
    losses = []
    for _ in range(steps):
        batch = {name: tensor.to(DEVICE) for name, tensor in next(batches).items()}
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


if __name__ == "__main__":
    options = arguments(__doc__, fuse=["on", "off"])
    _, losses = train(options.steps, options.fuse == "on")
    print(f"final loss {losses[-1]:.4f}")
