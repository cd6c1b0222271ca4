"""A schedule with dense warm-up and tail, an N:M ramp, and a checkpoint that resumes it.

python examples/schedule.py --steps 100 --ramp geometric
"""

import io

import torch
from tiny_gpt import BATCH, CLIP, Text, arguments, build_model, build_optimizer
from torch.utils.data import DataLoader

import sdgp_cusparselt as sdgp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(steps: int, ramp: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = build_model().to(DEVICE)
    # Of each block only the MLP ramps; attention stays at 2:4 after the same warm-up.
    quiet = {"total_steps": steps, "warmup": 0.1, "tail": 0.2}
    plain = sdgp.SDGPConfig(schedule=sdgp.Schedule(**quiet))
    ramped = sdgp.SDGPConfig(schedule=sdgp.Schedule(**quiet, settle=0.2, ramp=ramp))
    sdgp.convert_(model, {"*.mlp.*": ramped, "*.attn.*": plain})
    optimizer = build_optimizer(model)
    sdgp.step_with(optimizer, model)
    return model, optimizer


def train(steps: int, ramp: str = "geometric", stop: int = 0) -> list[float]:
    """Return the loss of every step; with ``stop``, save, build and load everything after it."""
    model, optimizer = build(steps, ramp)
    losses = []
    for number, batch in zip(range(steps), DataLoader(Text(), batch_size=BATCH), strict=False):
        if number and number == stop:
            file = io.BytesIO()
            states = (model.state_dict(), optimizer.state_dict(), sdgp.schedule_state(model))
            torch.save((*states, torch.get_rng_state(), torch.cuda.get_rng_state_all()), file)
            file.seek(0)
            model, optimizer = build(steps, ramp)
            weights, moments, schedule, generator, generators = torch.load(file)
            model.load_state_dict(weights)
            optimizer.load_state_dict(moments)
            sdgp.load_schedule_state(model, schedule)
            # The method draws: its generators go on where they were.
            torch.set_rng_state(generator)
            torch.cuda.set_rng_state_all(generators)
        loss = model(**{name: tensor.to(DEVICE) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    options = arguments(__doc__, ramp=["geometric", "stepwise", "densify", "none"])
    losses = train(options.steps, options.ramp, stop=options.steps // 2)
    print(f"final loss {losses[-1]:.4f}")
