"""Loads examples/*.py as modules, as ``python examples/x.py`` finds its neighbours."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import sdgp_cusparselt as sdgp

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENS = 8 * 64
#: transformers takes the mean loss over the tokens in float32, whatever the model computes in.
LOSS_TOLERANCE = TOKENS * 2**-24


def load(name: str) -> ModuleType:
    """Return the example ``name`` as a module."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


@contextlib.contextmanager
def pruned_by(method: str) -> Iterator[None]:
    """Have the examples prune by another method than their own.

    One that draws is different on two ranks, in two half batches, and after a library has used the
    generator for itself; where bits are compared, the method must not draw.
    """
    config = sdgp.SDGPConfig
    with patch.object(sdgp, "SDGPConfig", lambda **given: config(**given | {"prune": method})):
        yield
