"""What each preset is predicted to gain in time to the same loss: python docs/preset_gain.py

dense time / SDGP time of a step, by the planner, divided by R, by training. The products of a step
are those of the planner; which of them a preset prunes is chosen here. No GPU is asked.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdgp_cusparselt.cards.gpus import GPUS
from sdgp_cusparselt.layers.presets import role_of
from sdgp_cusparselt.planner.gemms import Gemm, Trace, trace_step
from sdgp_cusparselt.planner.models import PRESETS, load
from sdgp_cusparselt.planner.roofline import forecast
from sdgp_cusparselt.training.equal_loss import steps_ratios

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
#: The longest runs: R grows with them.
TRAINED = ("presets-2000", *(f"dense-{n}" for n in (1600, 1800)))
#: Preset, or what else is compared -> label of the trained method whose R it has.
WAYS = {
    "all": "mvue 2:4",
    "readers": "readers: mvue 2:4",
    "balanced": "balanced: mvue 2:4",
}
MODELS = ("llama-3-8b", "gpt2-medium", "vit-l-16")


def pruned(trace: Trace, way: str) -> Trace:
    """Return a step whose products are pruned in one way, those of grad_weight among them."""
    layers = {gemm.fqn for gemm in trace.gemms if gemm.role == "grad_input" and gemm.prunable}

    def taken(gemm: Gemm) -> bool:
        if gemm.fqn not in layers or gemm.kind != "linear":
            return False
        role = role_of(gemm.fqn)
        if gemm.role == "grad_input":
            return way == "all" or (way in ("readers", "balanced") and role == "reader")
        return gemm.role == "grad_weight" and way == "balanced" and role is not None

    gemms = tuple(dataclasses.replace(gemm, prunable=taken(gemm)) for gemm in trace.gemms)
    return dataclasses.replace(trace, gemms=gemms)


def document(models: Sequence[str]) -> dict[str, Any]:
    """Return R of each way, and model -> GPU -> way -> (speedup of a step, divided by R)."""
    trained = [json.loads((RESULTS / f"code-lm-{name}.json").read_text()) for name in TRAINED]
    ratios = {found.label: found.mean for found in steps_ratios(trained)}
    needed = {way: ratios[label] for way, label in WAYS.items()}
    gains: dict[str, Any] = {}
    for name in models:
        problem = load(name)
        trace = trace_step(problem.model, problem.inputs)
        gains[name] = {}
        for gpu in GPUS.values():
            speedups = {
                way: forecast(pruned(trace, way), gpu, gpu.published).speedup for way in WAYS
            }
            gains[name][gpu.name] = {way: (s, s / needed[way]) for way, s in speedups.items()}
    return {"R": needed, "gains": gains}


def main() -> None:
    """Write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=PRESETS)
    parser.add_argument("--json", type=Path, default=RESULTS / "preset-gain.json")
    args = parser.parse_args()
    content = json.dumps(document(args.models), indent=1)
    args.json.write_text(f"{content}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
