"""Method: dense, or a prune function with its n:m, as written on the command line."""

import re
from dataclasses import dataclass
from typing import cast

from sdgp_cusparselt.config import BackendName, SDGPConfig
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.patterns import METHODS, PruneMethod

DENSE = "dense"

_PATTERN = re.compile(r"(?P<prune>[a-z_]+)(@(?P<n>\d+):(?P<m>\d+))?")

#: The rows of the SDGP paper's CIFAR-10 table, in its order.
TABLE1 = (
    DENSE,
    "random@2:4",
    "magnitude@2:4",
    "rescaled_magnitude@1:4",
    "rescaled_magnitude@2:4",
    "rescaled_magnitude@1:8",
    "rescaled_magnitude@2:8",
    "rescaled_magnitude@4:8",
    "rescaled_magnitude@2:16",
    "rescaled_magnitude@4:16",
    "rescaled_magnitude@8:16",
    "rescaled_magnitude@4:32",
    "rescaled_magnitude@8:32",
    "rescaled_magnitude@16:32",
)
SWEEPS = {"table1": TABLE1}


@dataclass(frozen=True, order=True)
class Method:
    """What happens to the data gradient: nothing (``dense``), or a prune function at n:m.

    Args:
        prune: ``dense`` (the model is not converted) or a prune method of ``SDGPConfig``.
        n: values kept in a group.
        m: group size.
    """

    prune: str
    n: int = 2
    m: int = 4

    @property
    def is_dense(self) -> bool:
        """Whether the model stays as it is."""
        return self.prune == DENSE

    @property
    def label(self) -> str:
        """Name in tables and plots, such as ``magnitude 2:4``."""
        return self.prune if self.is_dense else f"{self.prune} {self.n}:{self.m}"

    @property
    def spelling(self) -> str:
        """Name on the command line, such as ``magnitude@2:4``."""
        return self.prune if self.is_dense else f"{self.prune}@{self.n}:{self.m}"

    @property
    def slug(self) -> str:
        """Name in file names, such as ``magnitude-2of4``."""
        return self.prune if self.is_dense else f"{self.prune}-{self.n}of{self.m}"

    def config(self, backend: BackendName = "auto") -> SDGPConfig | None:
        """Return the conversion's config, or None for dense.

        Args:
            backend: of ``SDGPConfig``.

        Raises:
            ValueError: n and m do not go together or with this prune method.
        """
        if self.is_dense:
            return None
        # A shape that runs faster dense must prune all the same: the accuracy is the question here.
        prune = cast(PruneMethod, self.prune)
        return SDGPConfig(prune=prune, n=self.n, m=self.m, backend=backend, on_slower="prune")


def parse_method(text: str) -> Method:
    """Read ``dense``, ``magnitude`` (then 2:4) or ``magnitude@n:m``.

    Args:
        text: one entry of ``--methods``.

    Returns:
        The method, its n and m checked by ``SDGPConfig``.

    Raises:
        ValueError: the spelling, the prune method, or n and m are wrong.
    """
    match = _PATTERN.fullmatch(text.strip())
    known = (DENSE, *METHODS)
    if match is None or match["prune"] not in known or (match["prune"] == DENSE and match["n"]):
        rule = f"dense, or one of {', '.join(METHODS)}, optionally with @n:m"
        fix = "Write for example magnitude or rescaled_magnitude@4:8."
        raise value_error("parse_method", "text", rule, repr(text), fix)
    if match["n"] is None:
        method = Method(match["prune"])
    else:
        method = Method(match["prune"], int(match["n"]), int(match["m"]))
    method.config()
    return method


def parse_methods(text: str) -> tuple[Method, ...]:
    """Read a comma-separated list of methods, each named once.

    Raises:
        ValueError: the list is empty, names a method twice, or an entry is wrong.
    """
    methods = tuple(parse_method(entry) for entry in text.split(",") if entry.strip())
    if not methods or len(set(methods)) != len(methods):
        rule = "a list of different methods"
        fix = "Write for example dense,magnitude,random."
        raise value_error("parse_methods", "text", rule, repr(text), fix)
    return methods
