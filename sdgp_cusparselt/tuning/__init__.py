"""Search with proof: time only what computes right, race it against dense, remember the winner."""

from sdgp_cusparselt.tuning.decision import LINEAR, MATMUL, Decision, Rival
from sdgp_cusparselt.tuning.policy import decision_for
from sdgp_cusparselt.tuning.recorder import ShapeLog, note, record_shapes
from sdgp_cusparselt.tuning.search import tune
from sdgp_cusparselt.tuning.store import TuningCache, default_cache

__all__ = [
    "LINEAR",
    "MATMUL",
    "Decision",
    "Rival",
    "ShapeLog",
    "TuningCache",
    "decision_for",
    "default_cache",
    "note",
    "record_shapes",
    "tune",
]
