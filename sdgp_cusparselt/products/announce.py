"""Who hears that a product does not run sparse: one warning a reason, counts for the rest."""

import re
import warnings

from sdgp_cusparselt.backends.base import Product, Way
from sdgp_cusparselt.errors import SDGPFallbackWarning

_EVERY_LAYER = (
    "every layer is emulated, pruned and multiplied densely, because {reason}. The numbers are "
    'those of the sparse way, the speed is not; SDGPConfig(on_unsupported="raise") forbids it.'
)
_FIRST_LAYER = (
    "{name}: {product} runs {way} because {reason}. Other layers that meet this are counted in "
    'sdgp.telemetry(model), not announced; SDGPConfig(on_unsupported="raise") forbids it.'
)
_WAYS: dict[Way, str] = {
    "sparse": "sparse",
    "plain": "plain, as without this package,",
    "emulated": "emulated, pruned and multiplied densely,",
}
_announced: set[str] = set()


def announce(name: str, product: Product, way: Way, reason: str) -> None:
    """Warn of a reason, once in a process; two that differ in numbers are one.

    Args:
        name: of the layer that meets it first.
        product: which of its products.
        way: how it runs instead.
        reason: why not sparse.
    """
    text = _FIRST_LAYER.format(name=name, product=product, way=_WAYS[way], reason=reason)
    _warn_once(reason, text)


def announce_machine(reason: str) -> None:
    """Warn that this machine has no sparse tensor cores, once for all layers."""
    _warn_once(reason, _EVERY_LAYER.format(reason=reason))


def forget() -> None:
    """Let every reason be announced again."""
    _announced.clear()


def _warn_once(reason: str, text: str) -> None:
    kind = re.sub(r"\d+", "#", reason)
    if kind not in _announced:
        _announced.add(kind)
        warnings.warn(text, SDGPFallbackWarning, stacklevel=2)
