"""What the tests of schedules share: a config, its formulas written out, and one layer."""

import math

import torch
from torch import Tensor, nn

import sdgp_cusparselt as sdgp

TOTAL = 40


def scheduled(
    prune: str = "magnitude", n: int = 2, m: int = 4, **kwargs: object
) -> sdgp.SDGPConfig:
    schedule = sdgp.Schedule(total_steps=TOTAL, **kwargs)
    return sdgp.SDGPConfig(prune=prune, n=n, m=m, backend="dense", schedule=schedule)


def oracle_stage(step: int, kwargs: dict, n: int, m: int) -> tuple[bool, int, int, float]:
    """Return (pruned, n, m, beta) by the definitions of Kao et al., from frame borders."""
    warmup, tail, settle = (kwargs.get(name, 0) for name in ("warmup", "tail", "settle"))
    if step < warmup or (tail and step >= TOTAL - tail):
        return False, n, m, 0.0
    ramps = {
        "stepwise": [(m - 1, m)] + [(m // 2**i, m) for i in range(1, 6) if m // 2**i >= n],
        "geometric": [(8 * n, 8 * m), (4 * n, 4 * m), (2 * n, 2 * m), (n, m)],
        "densify": [(n, 8 * m), (n, 4 * m), (n, 2 * m), (n, m)],
        "none": [(n, m)],
    }
    frames = ramps[kwargs.get("ramp", "none")]
    length, now = TOTAL - tail - settle - warmup, step - warmup
    # The last frame whose beginning, i / len(frames) of the way, has been reached.
    starts = [math.ceil(i * length / len(frames)) for i in range(len(frames))]
    pattern = next(frames[i] for i in reversed(range(len(frames))) if now >= starts[i])
    decay, rate = kwargs.get("decay"), kwargs.get("decay_rate")
    beta = 0.0
    if decay and now < length:
        beta = math.exp(-rate * now) if decay == "exponential" else 1 - (rate or 1 / length) * now
    return True, *pattern, max(0.0, beta)


def layer(config: sdgp.SDGPConfig) -> nn.Linear:
    torch.manual_seed(1)
    module = nn.Linear(8, 32)
    sdgp.convert_(module, config)
    return module


def grad_input(module: nn.Module, grad_output: Tensor, size: tuple[int, ...] = (6, 8)) -> Tensor:
    torch.manual_seed(2)
    input = torch.randn(size, requires_grad=True)
    module(input).backward(grad_output)
    assert input.grad is not None
    return input.grad
