"""What was proven on this machine: in memory, and on disk where that can be written."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from sdgp_cusparselt import cache
from sdgp_cusparselt.errors import SDGPCacheWarning
from sdgp_cusparselt.packing.layout import MetadataLayout

# A proof holds for one way of packing and of proving: a change of either raises this.
PROOF_VERSION = 2
_FOLDER = "layouts"


@dataclass(frozen=True)
class Certificate:
    """The outcome for one plan.

    Attributes:
        layout: the order to pack in, or None: compress with the library.
        reason: how it was proven, or what differed.
        probes: matrices compressed to learn the order; 0 where it was known.
    """

    layout: MetadataLayout | None
    reason: str
    probes: int = 0

    @property
    def proven(self) -> bool:
        """Whether our packer may be used."""
        return self.layout is not None

    @property
    def packer(self) -> Literal["ours", "library"]:
        """Who packs: a product with the library's own Compress is another contender."""
        return "ours" if self.proven else "library"


class Proofs:
    """The certificates of one machine and dtype, by plan.

    A refusal is one plan's own and leaves every other proof as it is. A folder that cannot be
    read or written costs the next process its proofs, and is said once.

    Args:
        identity: what an order may depend on besides the plan: library, GPU, versions.
        dtype: element type of the operands.
        folder: where they are kept; the cache folder if None.
    """

    def __init__(
        self, identity: Mapping[str, object], dtype: torch.dtype, folder: Path | None = None
    ) -> None:
        self.identity = {name: str(value) for name, value in identity.items()}
        self.dtype = str(dtype).removeprefix("torch.")
        key = {**self.identity, "dtype": self.dtype, "proof": str(PROOF_VERSION)}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.path = (folder or cache.cache_dir() / _FOLDER) / f"{digest[:32]}.json"
        self._plans: dict[str, dict[str, str]] = {}
        self._told = False
        try:
            self._plans = _plans(cache.load(self.path) or {})
        except OSError as error:
            self._tell(error)

    def find(self, plan: str) -> Certificate | None:
        """Return what is known of a plan, or None."""
        known = self._plans.get(plan)
        if known is None:
            return None
        if "refused" in known:
            return Certificate(None, known["refused"])
        return Certificate(_layout(known["layout"]), "proven before")

    def layouts(self) -> list[MetadataLayout]:
        """Return every proven order, the one that most plans have first."""
        found = Counter(entry["layout"] for entry in self._plans.values() if "layout" in entry)
        layouts = (_layout(text) for text, _ in found.most_common())
        return [layout for layout in layouts if layout is not None]

    def add(self, plan: str, certificate: Certificate) -> None:
        """Keep what was found out about a plan."""
        layout = certificate.layout
        entry = {"refused": certificate.reason} if layout is None else {"layout": layout.to_json()}
        self._plans[plan] = entry
        try:
            self._plans |= _plans(cache.update(self.path, lambda old: self._merged(old, plan)))
        except OSError as error:
            self._tell(error)

    def _merged(self, old: dict[str, Any], plan: str) -> dict[str, Any]:
        plans = {**_plans(old), plan: self._plans[plan]}
        return {"identity": self.identity, "dtype": self.dtype, "plans": plans}

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                f"{self.path} cannot be used ({error}): what is proven is kept for this process "
                "only. Set SDGP_CACHE_DIR to a folder that can be written to.",
                SDGPCacheWarning,
                stacklevel=3,
            )


def learned_layouts(folder: Path | None = None) -> list[dict[str, Any]]:
    """Return every proof on disk, for ``sdgp info``: identity, dtype, and plans by name."""
    where = folder or cache.cache_dir() / _FOLDER
    found = (cache.load(path) for path in sorted(where.glob("*.json")))
    return [content for content in found if content is not None and _plans(content)]


def _plans(content: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the entries of a file that can be used; another version's are not there."""
    plans = content.get("plans")
    if not isinstance(plans, dict):
        return {}
    return {name: entry for name, entry in plans.items() if _usable(entry)}


def _usable(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    if isinstance(entry.get("refused"), str):
        return True
    layout = entry.get("layout")
    return isinstance(layout, str) and _layout(layout) is not None


@lru_cache(maxsize=256)
def _layout(text: str) -> MetadataLayout | None:
    """Return the layout in a text; the same text comes with most plans."""
    try:
        return MetadataLayout.from_json(text)
    except (KeyError, TypeError, ValueError):
        return None
