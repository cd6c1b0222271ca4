"""gradient_quality: what pruning costs the gradients of the parameters, predicted before training.

rho = variance that pruning adds to the weight gradients / variance of the batch's sampling
R   = 1 + rho: steps that the same loss takes, over those of dense training

A stochastic gradient of variance S that becomes S + V needs, where noise limits the progress, about
(S + V) / S times as many steps. A bias does not average out and is reported beside it: where it is
not small, R says too little.

With G the mean gradient, S / |G|^2 is how many batches the critical batch is: of larger ones noise
no longer limits the progress, that of pruning neither. A batch b times as large has both variances
divided by b, and needs (|G|^2 + (S + V) / b) / (|G|^2 + S / b) times as many steps.
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.layers.convert import convert_
from sdgp_cusparselt.layers.presets import Preset

#: (model, batch) -> loss, a scalar.
LossFn = Callable[[nn.Module, Any], Tensor]
Converter = Callable[[nn.Module], object]
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class GradientQuality:
    """What one way of pruning does to the gradients of all weights.

    Attributes:
        name: of the variant.
        rho: variance that pruning adds, over the variance of the batches.
        bias: length of the mean error over the length of the mean gradient; 0 for mvue up to noise.
        layers: weight's name -> (rho, bias), of that weight alone.
        flop_share: share of the linear layers' grad_input and grad_weight that is pruned.
        critical_batches: variance of the batches over the squared length of the mean gradient: how
            many batches the critical batch is. Inf where noise hides the mean gradient.
    """

    name: str
    rho: float
    bias: float
    layers: dict[str, tuple[float, float]]
    flop_share: float
    critical_batches: float = math.inf

    @property
    def steps_ratio(self) -> float:
        """R = 1 + rho: predicted steps to the same loss, over those of dense training."""
        return 1 + self.rho

    def steps_ratio_at(self, batches: float) -> float:
        """Return R with larger batches: R = 1 + rho / (1 + batches / critical_batches).

        Args:
            batches: how many of those that were measured make one.

        Raises:
            ValueError: batches is not above 0.

        Source:
            McCandlish et al. (arXiv 1812.06162), the noise scale S / |G|^2.
        """
        if not batches > 0:
            fix = "4 is four times the batch that was measured."
            raise value_error("steps_ratio_at", "batches", "> 0", batches, fix)
        if self.critical_batches == 0:
            return 1.0
        return 1 + self.rho / (1 + batches / self.critical_batches)

    @property
    def signal(self) -> float:
        """Length of the mean gradient over the pruning's noise, its standard deviation.

        Below sqrt(3) training in FP4 was seen to stall (Chmiel et al., arXiv 2505.19115).
        """
        noise = self.rho * self.critical_batches
        return noise**-0.5 if noise > 0 else math.inf


class _Moments:
    """Sums over batches from which mean and variance of a vector follow."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), 0.0

    def add(self, x: Tensor) -> None:
        x = x.double()
        self.count, self.total = self.count + 1, self.total + x
        self.squares += float(x.square().sum())

    @property
    def variance(self) -> float:
        """Return E |x - E x|^2, unbiased."""
        between = self.squares - float(self.total.square().sum()) / self.count
        return max(0.0, between) / (self.count - 1)

    @property
    def squared_mean(self) -> float:
        """Return |E x|^2, unbiased, which noise may bring below 0: then 0."""
        square = float((self.total / self.count).square().sum())
        return max(0.0, square - self.variance / self.count)


def gradient_quality(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    variants: Mapping[str, Converter],
) -> list[GradientQuality]:
    """Measure bias and added variance of the weight gradients under several ways of pruning.

    rho = Var(p - g) / Var(g), summed over weights; p and g the pruned and dense gradient of a batch

    Args:
        model: not converted; at the checkpoint of interest. Left as it is.
        batches: at least 2, each as ``loss_fn`` takes it; as large as in training, because the
            variance of a batch's sampling is what pruning is compared with.
        loss_fn: (model, batch) -> scalar loss.
        variants: name -> function that converts a copy of the model; see ``preset_variants`` and
            ``group_variants``.

    Returns:
        One entry a variant, in their order. An estimate: it scatters with the number of batches.

    Raises:
        ValueError: there are fewer than 2 batches.

    Source:
        Checked against trained models in docs/numerics.md.
    """
    plain = copy.deepcopy(model)  # a forward in training moves the statistics of batch norms
    copies = {name: copy.deepcopy(model) for name in variants}
    shares = {name: _flop_share(twin, variants[name](twin)) for name, twin in copies.items()}
    names = [name for name, p in model.named_parameters() if p.dim() > 1 and p.requires_grad]
    dense = {name: _Moments() for name in names}
    errors = {variant: {name: _Moments() for name in names} for variant in variants}
    count = 0
    for batch in batches:
        count += 1
        exact = _gradients(plain, batch, loss_fn, names)
        for name in names:
            dense[name].add(exact[name])
        for variant, twin in copies.items():
            found = _gradients(twin, batch, loss_fn, names)
            for name in names:
                errors[variant][name].add(found[name] - exact[name])
    if count < 2:
        fix = "A variance needs two; 32 or more are better."
        raise value_error("gradient_quality", "batches", "at least 2 batches", count, fix)
    return [_summary(v, dense, errors[v], shares[v]) for v in variants]


def preset_variants(
    config: SDGPConfig, presets: Sequence[Preset] = ("all", "readers", "balanced")
) -> dict[str, Converter]:
    """Return one variant a preset of ``convert_``."""
    return {preset: partial(convert_, config=config, preset=preset) for preset in presets}


def group_variants(model: nn.Module, config: SDGPConfig) -> dict[str, Converter]:
    """Return one variant a group of layers: those whose names differ in numbers only.

    Args:
        model: not converted.
        config: how to prune.
    """
    report = convert_(copy.deepcopy(model), config, preset="all")
    groups: dict[str, set[str]] = {}
    for name in report.converted:
        groups.setdefault(group_of(name), set()).add(name)
    return {
        group: partial(convert_, config=config, filter_fn=partial(_is_one_of, frozenset(names)))
        for group, names in groups.items()
    }


def _is_one_of(names: frozenset[str], module: nn.Module, name: str) -> bool:
    return name in names


def group_of(name: str) -> str:
    """Return a layer's name with numbers replaced: ``blocks.3.up`` -> ``blocks.*.up``."""
    return _NUMBER.sub("*", name)


def recommend(groups: Sequence[GradientQuality], budget: float) -> list[GradientQuality]:
    """Return the groups to prune so that R stays within a budget, cheapest FLOPs first.

    Variances of independent draws add up, so does rho: groups are taken in the order of rho per
    FLOP while 1 + sum rho <= budget.

    Args:
        groups: measured one at a time; see ``group_variants``.
        budget: the largest R to accept, such as 1.03.

    Raises:
        ValueError: budget is below 1.
    """
    if not budget >= 1:
        fix = "1.03 accepts three per cent more steps."
        raise value_error("recommend", "budget", ">= 1", budget, fix)
    chosen: list[GradientQuality] = []
    spent = 0.0
    for group in sorted(groups, key=lambda q: q.rho / max(q.flop_share, 1e-12)):
        if 1 + spent + group.rho <= budget:
            chosen.append(group)
            spent += group.rho
    return chosen


def _gradients(
    model: nn.Module, batch: Any, loss_fn: LossFn, names: Sequence[str]
) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    with torch.enable_grad():
        loss = loss_fn(model, batch)
        found = torch.autograd.grad(loss, [parameters[n] for n in names], materialize_grads=True)
    return dict(zip(names, found, strict=True))


def _summary(
    name: str, dense: dict[str, _Moments], errors: dict[str, _Moments], share: float
) -> GradientQuality:
    layers = {
        weight: (
            _ratio(errors[weight].variance, dense[weight].variance),
            _ratio(errors[weight].squared_mean, dense[weight].squared_mean) ** 0.5,
        )
        for weight in dense
    }
    sampling = sum(moments.variance for moments in dense.values())
    energy = sum(moments.squared_mean for moments in dense.values())
    rho = _ratio(sum(moments.variance for moments in errors.values()), sampling)
    bias = _ratio(sum(moments.squared_mean for moments in errors.values()), energy) ** 0.5
    critical = sampling / energy if energy > 0 else math.inf
    return GradientQuality(name, rho, bias, layers, share, critical)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _flop_share(model: nn.Module, report: Any) -> float:
    """Return the pruned share of grad_input and grad_weight, by the sizes of matrices."""
    sizes = {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.dim() == 2
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
    }
    pruned = sum(
        sizes[f"{name}.weight"] * (int(own.prunes) + int(own.grad_weight == "sparse"))
        for name, own in report.configs.items()
        if f"{name}.weight" in sizes
    )
    return pruned / (2 * sum(sizes.values())) if sizes else 0.0


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])
