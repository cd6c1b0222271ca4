"""Read what layers recorded: counts and times, gradient errors over a run."""

from sdgp_cusparselt.telemetry.counts import Telemetry, telemetry

__all__ = ["Telemetry", "telemetry"]
