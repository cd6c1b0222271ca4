"""GradientDiagnostics: what pruning does to each layer's gradient over a training run."""

from sdgp_cusparselt.telemetry.diagnostics import MEASURES, GradientDiagnostics, GradientRow

__all__ = ["MEASURES", "GradientDiagnostics", "GradientRow"]
