"""torch.compile: convert first, then compile; one graph without breaks.

python examples/compiled.py --steps 100
"""

import torch
from tiny_gpt import BATCH, CLIP, Text, arguments, build_model, build_optimizer
from torch.utils.data import DataLoader

import sdgp_cusparselt as sdgp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(steps: int, backend: str = "inductor") -> tuple[torch.nn.Module, list[float]]:
    """Return the trained model and the loss of every step."""
    model = build_model().to(DEVICE)
    sdgp.convert_(model, sdgp.SDGPConfig(prune="mvue"))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = build_optimizer(model)
    batches = iter(DataLoader(Text(), batch_size=BATCH))
    losses = []
    for _ in range(steps):
        batch = {name: tensor.to(DEVICE) for name, tensor in next(batches).items()}
        loss = compiled(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


if __name__ == "__main__":
    options = arguments(__doc__, backend=["inductor", "aot_eager", "eager"])
    _, losses = train(options.steps, options.backend)
    print(f"final loss {losses[-1]:.4f}")
