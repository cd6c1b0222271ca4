"""A plain training loop: bf16 or fp16 with a loss scaler, gradient accumulation, clipping.

python examples/plain_pytorch.py --steps 100 --precision bf16
"""

import torch
from tiny_gpt import BATCH, CLIP, Text, arguments, build_model, build_optimizer
from torch.utils.data import DataLoader

import sdgp_cusparselt as sdgp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    steps: int, precision: str = "fp32", accumulate: int = 1
) -> tuple[torch.nn.Module, list[float]]:
    """Return the trained model and the loss of every step."""
    model = build_model().to(DEVICE)
    sdgp.convert_(model, sdgp.SDGPConfig(prune="mvue"))
    optimizer = build_optimizer(model)
    # fp16 gradients overflow; pruning keeps every Inf and NaN, so the scaler sees and skips them.
    scaler = torch.amp.GradScaler(DEVICE, enabled=precision == "fp16")
    autocast = torch.autocast(DEVICE, DTYPES[precision], enabled=precision != "fp32")
    batches = iter(DataLoader(Text(), batch_size=BATCH // accumulate))
    losses = []
    for _ in range(steps):
        total = 0.0
        for _ in range(accumulate):
            batch = {name: tensor.to(DEVICE) for name, tensor in next(batches).items()}
            with autocast:
                loss = model(**batch).loss / accumulate
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(total)
    return model, losses


if __name__ == "__main__":
    options = arguments(__doc__, precision=list(DTYPES), accumulate=["1", "2", "4"])
    _, losses = train(options.steps, options.precision, int(options.accumulate))
    print(f"final loss {losses[-1]:.4f}")
