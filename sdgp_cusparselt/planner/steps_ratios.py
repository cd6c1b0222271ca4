"""R of the presets, as measured: steps to the same loss over those of dense training.

mvue 2:4 on the task code-lm, a GPT of two layers over bytes: the table "steps to the same loss" of
docs/numerics.md. R grows with the length of a run, so the longest is taken. A model of yours has an
R of its own, which ``sdgp quality`` predicts.
"""

from dataclasses import dataclass

from sdgp_cusparselt.layers.presets import Preset


@dataclass(frozen=True)
class MeasuredRatio:
    """R of one preset.

    Attributes:
        label: of the method in the result files.
        mean: over the seeds.
        std: sample standard deviation over them.
        seeds: how many.
        steps: that were trained.
    """

    label: str
    mean: float
    std: float
    seeds: int = 3
    steps: int = 2000

    @property
    def source(self) -> str:
        """Where it was measured."""
        return f"code-lm, {self.steps:,} steps, {self.seeds} seeds"


MEASURED: dict[Preset, MeasuredRatio] = {
    "all": MeasuredRatio("mvue 2:4", 1.217, 0.037),
    "readers": MeasuredRatio("readers: mvue 2:4", 1.046, 0.018),
    "balanced": MeasuredRatio("balanced: mvue 2:4", 1.113, 0.051),
}
