"""Which gradients to prune, and how, judged before training: python docs/gradient_quality.py

Every way of making grad_input cheaper is judged by rho, the variance that it adds to the weight
gradients over the variance of a batch, at several steps of a dense training run: presets, heavy
tokens kept exact, sampling of whole tokens, control variates, and what did not help. Ways that the
package does not offer stand here as a few lines of plain torch. docs/results gets the numbers.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.layers.convert import convert_
from sdgp_cusparselt.layers.presets import role_of
from sdgp_cusparselt.packing.sampling import mvue_two
from sdgp_cusparselt.telemetry.quality import Converter, preset_variants
from sdgp_cusparselt.training.methods import parse_method
from sdgp_cusparselt.training.quality_run import as_rows, dense_trainer, measure
from sdgp_cusparselt.training.run import RunSpec
from sdgp_cusparselt.training.sweep import environment
from sdgp_cusparselt.training.tasks import CONTEXT, get_task

ROOT = Path(__file__).parents[1]
TASK, STEPS, MEASURED_AT, SEED = "code-lm", 1000, (200, 500, 800), 20
NUM_BATCHES = 48
RANK = 16
#: [tokens, features] -> an approximation of it, drawn anew by each call.
Approximation = Callable[[Tensor], Tensor]


def mvue(grad: Tensor) -> Tensor:
    """Return the package's unbiased 2:4."""
    return sdgp.prune(grad, method="mvue")


def heavy_tokens(share: float) -> Approximation:
    """Return mvue with the share of tokens of largest norm kept as they are."""

    def approximate(grad: Tensor) -> Tensor:
        count = max(1, round(share * len(grad)))
        heavy = grad.norm(dim=1).topk(count).indices
        return mvue(grad).index_copy(0, heavy, grad[heavy])

    return approximate


def sampled_tokens(share: float) -> Approximation:
    """Return whole tokens drawn with a probability that follows their norm, unbiased (VCAS)."""

    def approximate(grad: Tensor) -> Tensor:
        probability = _probabilities(grad.norm(dim=1), share * len(grad))
        kept = torch.rand_like(probability) < probability
        return torch.where(kept[:, None], grad / probability.clamp_min(1e-30)[:, None], 0.0)

    return approximate


def _probabilities(size: Tensor, total: float) -> Tensor:
    """Return p = min(1, c * size) with sum p = total."""
    certain = torch.zeros_like(size, dtype=torch.bool)
    for _ in range(20):
        rest = size.masked_fill(certain, 0).sum().clamp_min(1e-30)
        p = ((total - certain.sum()) * size / rest).masked_fill(certain, 1.0)
        if not bool((p > 1).any()):
            break
        certain |= p >= 1
    return p.clamp(max=1.0)


def sampled_and_pruned(share: float) -> Approximation:
    """Return sampled tokens, pruned 2:4 on top: a product of share / 2 of the FLOPs."""
    sample = sampled_tokens(share)
    return lambda grad: mvue(sample(grad))


def low_rank(grad: Tensor) -> Tensor:
    """Return mvue of what a rank-16 projection leaves, plus the projection: a control variate."""
    basis = torch.linalg.svd(grad, full_matrices=False).Vh[:RANK]
    exact = grad @ basis.t() @ basis
    return exact + mvue(grad - exact)


def centred(grad: Tensor) -> Tensor:
    """Return the mean token exactly, and mvue of the rest."""
    mean = grad.mean(dim=0, keepdim=True)
    return mean + mvue(grad - mean)


def rotated(grad: Tensor) -> Tensor:
    """Return mvue in a basis turned by random signs and a Hadamard matrix, turned back."""
    size = grad.shape[1]
    width = size & -size  # the largest power of two that divides it
    signs = torch.randint(0, 2, (size,)).float() * 2 - 1
    turn = _hadamard(width)
    turned = (grad * signs).view(len(grad), -1, width) @ turn
    back = mvue(turned.reshape(grad.shape)).view(len(grad), -1, width) @ turn
    return back.reshape(grad.shape) * signs


def _hadamard(width: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / width**0.5


def permuted(grad: Tensor) -> Tensor:
    """Return mvue over groups of channels that mix large and small ones."""
    order = grad.square().sum(dim=0).argsort().view(4, -1).t().reshape(-1)
    return torch.empty_like(grad).index_copy_(1, order, mvue(grad[:, order]))


def stratified(grad: Tensor) -> Tensor:
    """Return mvue whose draws of a column's groups are spread evenly over the tokens."""
    groups = grad.view(len(grad), -1, 4)
    place = torch.rand(groups.shape[:2]).argsort(dim=0)
    bits = ((place + torch.rand(groups.shape[:2])) * (2**16 / len(grad))).int().clamp_(max=0xFFFF)
    sizes = tuple(groups[..., i].abs().contiguous() for i in range(4))
    chosen, worth, _ = mvue_two(sizes, bits)
    kept = torch.zeros_like(groups)
    pair = chosen.nibbles().long()[..., None]
    for index in (pair & 3, pair >> 2):
        member = groups.gather(-1, index)
        kept.scatter_(-1, index, torch.maximum(member.abs(), worth[..., None]).copysign(member))
    return kept.view(grad.shape)


def with_feedback(grad: Tensor) -> Tensor:
    """Return magnitude whose error each token hands on to the next of its window."""
    windows = grad.view(-1, CONTEXT, grad.shape[1])
    kept, error = torch.empty_like(windows), torch.zeros_like(windows[:, 0])
    for token in range(CONTEXT):
        wanted = windows[:, token] + error
        kept[:, token] = sdgp.prune(wanted)
        error = wanted - kept[:, token]
    return kept.view(grad.shape)


class _Approximate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Any, approximate: Any) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.approximate = approximate
        return nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        flat = grads[0].flatten(0, -2)
        grad_input = (ctx.approximate(flat) @ weight).view(input.shape)
        return grad_input, flat.t() @ input.flatten(0, -2), flat.sum(0), None


def approximating(approximate: Approximation, model: nn.Module, *, readers: bool = False) -> Any:
    """Convert a copy of a model for its report, then give its layers another approximation."""
    report = convert_(
        model, sdgp.SDGPConfig(backend="dense"), preset="readers" if readers else "all"
    )
    sdgp.revert_(model)
    for name in report.converted:
        layer = model.get_submodule(name)
        layer.forward = partial(_forward, layer, approximate)  # type: ignore[method-assign]
    return report


def _forward(layer: nn.Linear, approximate: Approximation, input: Tensor) -> Tensor:
    output: Tensor = _Approximate.apply(input, layer.weight, layer.bias, approximate)
    return output


def with_heads(model: nn.Module) -> Any:
    """Convert every layer, and the head."""
    return convert_(model, sdgp.SDGPConfig(prune="mvue", backend="dense"), include_heads=True)


def without(last: str, model: nn.Module) -> Any:
    """Convert every layer of a block but one."""
    config = sdgp.SDGPConfig(prune="mvue", backend="dense")
    return convert_(
        model, config, lambda _, name: role_of(name) is not None and not name.endswith(last)
    )


def variants() -> dict[str, Converter]:
    """Return everything that is judged: name -> what converts a copy of the model."""
    config = sdgp.SDGPConfig(prune="mvue", backend="dense")
    weight_only = config.replace(prune="none", grad_weight="sparse")
    found: dict[str, Converter] = {
        "mvue": preset_variants(config)["all"],
        "magnitude": preset_variants(config.replace(prune="magnitude"))["all"],
        "readers: mvue": preset_variants(config)["readers"],
        "readers: magnitude": preset_variants(config.replace(prune="magnitude"))["readers"],
        "grad_weight: mvue": preset_variants(weight_only)["all"],
        "balanced: mvue": preset_variants(config)["balanced"],
        "mvue, all but the attention output": partial(without, "proj"),
        "mvue, head too": with_heads,
    }
    for share in (0.02, 0.06, 0.12, 0.25):
        name = f"mvue, heaviest {share:.0%} of tokens exact"
        found[name] = partial(approximating, heavy_tokens(share))
    found["readers: mvue, heaviest 6% exact"] = partial(
        approximating, heavy_tokens(0.06), readers=True
    )
    rest: dict[str, Approximation] = {
        "half of the tokens, sampled": sampled_tokens(0.5),
        "half of the tokens, and mvue": sampled_and_pruned(0.5),
        f"mvue beside rank {RANK}": low_rank,
        "mvue, channels permuted": permuted,
        "mvue, mean token apart": centred,
        "mvue, turned by Hadamard": rotated,
        "mvue, draws stratified over tokens": stratified,
        "magnitude, error fed on to the next token": with_feedback,
    }
    return found | {name: partial(approximating, way) for name, way in rest.items()}


def document(
    num_batches: int, measured_at: Sequence[int], only: Sequence[str] = ()
) -> dict[str, Any]:
    """Train densely, stop at each step, and measure every variant, or some, there."""
    wanted = variants()
    wanted = {name: wanted[name] for name in only or wanted}
    task = get_task(TASK)
    dataset, recipe = task.load(), task.recipe.replace(steps=STEPS)
    spec = RunSpec(TASK, parse_method("dense"), SEED, recipe, backend="dense")
    points = {}
    with Progress() as bars:
        for at in measured_at:
            steps = bars.add_task(f"dense to {at}", total=at)
            trainer = dense_trainer(task, dataset, recipe, at, SEED, partial(bars.advance, steps))
            torch.manual_seed(SEED)
            batches = bars.add_task(f"batches at {at}", total=num_batches)
            found = measure(trainer, wanted, num_batches, partial(bars.advance, batches))
            points[str(at)] = as_rows(found)
    return {
        "task": TASK,
        "steps": STEPS,
        "num_batches": num_batches,
        "environment": environment(spec),
        "measured_at": points,
    }


def main() -> None:
    """Write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, default=NUM_BATCHES)
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results/gradient-quality.json")
    parser.add_argument("--at", type=int, nargs="+", default=MEASURED_AT, metavar="STEP")
    parser.add_argument("--only", nargs="+", default=(), choices=variants(), metavar="WAY")
    args = parser.parse_args()
    content = document(args.batches, args.at, args.only)
    args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for at, rows in content["measured_at"].items():
        print(f"step {at}")
        for row in rows:
            print(f"  {row['name']:40} R {row['steps_ratio']:.3f}  bias {row['bias']:.3f}")


if __name__ == "__main__":
    main()
