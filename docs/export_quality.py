"""Measure what exported weights cost: python docs/export_quality.py

A small GPT is trained on the bytes of Python's standard library with 2:4 weights, their masks by
magnitude and refreshed at every step, and then exported in every dtype. Bits per byte on held-out
files, and perplexity of a byte, go to docs/results/export-quality.json.
"""

import argparse
import copy
import json
import math
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.training.tasks import get_task

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "export-quality.json"
CONFIG = sdgp.SDGPConfig(prune="none", forward="sparse_weight", backend="dense")
DTYPES = ("same", "fp16", "int8", "fp8")
VALIDATION, BATCH = 256, 8


def trained(steps: int, seed: int, split: Any) -> nn.Module:
    """Return the model of code-lm after some steps with 2:4 weights."""
    torch.manual_seed(seed)
    model = get_task("code-lm").build_model()
    sdgp.convert_(model, CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(len(split.inputs), (BATCH,), generator=generator)
        loss(model, split.inputs[some], split.targets[some]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a byte in nats."""
    logits = model(inputs.long())
    return F.cross_entropy(logits.float().flatten(0, 1), targets.long().flatten())


@torch.no_grad()
def nats(model: nn.Module, split: Any) -> float:
    """Return the mean loss on held-out files, in bfloat16 autocast."""
    found = []
    for start in range(0, VALIDATION, 32):
        part = slice(start, start + 32)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(float(loss(model, split.inputs[part], split.targets[part])))
    return statistics.mean(found)


def measured(steps: int, seed: int) -> dict[str, float]:
    """Return dtype -> nats of a byte, and "masked" for the layers before the export."""
    data = get_task("code-lm").load()
    model = trained(steps, seed, data.train)
    found = {"masked": nats(model, data.validation)}
    for dtype in DTYPES:
        twin = copy.deepcopy(model)
        sdgp.export_(twin, dtype=dtype)
        found[dtype] = nats(twin, data.validation)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    runs = [measured(args.steps, seed) for seed in range(args.seeds)]
    names = {"masked": "2:4, dense products in bf16 autocast", "same": "exported bf16"}
    rows = []
    for dtype in runs[0]:
        values = [run[dtype] for run in runs]
        mean = statistics.mean(values)
        rows.append(
            {
                "weights": names.get(dtype, f"exported {dtype}"),
                "bits_per_byte": mean / math.log(2),
                "perplexity": math.exp(mean),
                "of_each_seed": values,
            }
        )
        print(f"{rows[-1]['weights']:40} {mean / math.log(2):.4f} bits  ppl {math.exp(mean):.4f}")
    document = {
        "command": f"python docs/export_quality.py --steps {args.steps} --seeds {args.seeds}",
        "steps": args.steps,
        "environment": {
            "sdgp_cusparselt": sdgp.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": platform.machine(),
        },
        "rows": rows,
    }
    args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
