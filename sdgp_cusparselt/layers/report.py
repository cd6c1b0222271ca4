"""What convert_ and fuse_ did, grouped so that a model of any depth fits a screen."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from sdgp_cusparselt.config.choices import SDGPConfig

#: What a report may fill, title and last line included: a terminal's default size.
SCREEN_LINES, SCREEN_COLUMNS = 24, 80
PLAIN, APART = "plain: ", "apart: "
_COLUMNS = ("layer", "kind", "backward")


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose names differ in numbers only, and that share kind and backward.

    Attributes:
        pattern: their names, ``*`` for the numbers: ``model.layers.*.mlp.up_proj``.
        kind: class name of the plain layer.
        backward: "pruned" with the method where layers differ, or "plain: <reason>".
        names: fully qualified names, in model order.
    """

    pattern: str
    kind: str
    backward: str
    names: list[str]

    @property
    def title(self) -> str:
        """The one name, or the pattern and how many layers it stands for."""
        if len(self.names) == 1:
            return self.names[0] or "(root)"
        return f"{self.pattern} x {len(self.names)}"


class LayerReport:
    """What reports share: a table of layers, by name or by pattern.

    Attributes:
        kinds: layer -> class name of the plain layer, in model order.
        skipped: name -> reason, for every layer that stayed as it was.
    """

    kinds: dict[str, str]
    skipped: dict[str, str]

    def title(self) -> str:
        """Return what was done, in a few words."""
        raise NotImplementedError

    def _backward(self, name: str) -> str:
        """Return what happens to a layer."""
        raise NotImplementedError

    def _every(self) -> tuple[str, list[str]]:
        """Return a headline for the names of all that changed, and these names."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Return one line."""
        return f"<{type(self).__name__} {self.title()}>"

    def __str__(self) -> str:
        """Return at most 24 lines of 80 columns: by layer where that fits, else by pattern."""
        whole = self.details()
        if whole.count("\n") < SCREEN_LINES:
            return whole
        groups = self.groups()
        for shown in range(min(len(groups), SCREEN_LINES), -1, -1):
            left = sum(len(group.names) for group in groups[shown:])
            more = f"and {left} more layers; " if left else ""
            text = f"{self._text(groups[:shown])}\n{more}every layer: print(report.details())"
            if text.count("\n") < SCREEN_LINES:
                break
        return text

    def groups(self) -> list[LayerGroup]:
        """Return the layers by pattern, in model order."""
        return grouped(self.kinds, self._about)

    def details(self) -> str:
        """Return every layer by its name."""
        return self._text([LayerGroup(name, *self._about(name), [name]) for name in self.kinds])

    def _about(self, name: str) -> tuple[str, str]:
        return self.kinds[name], self._backward(name)

    def _text(self, groups: Sequence[LayerGroup]) -> str:
        """Return a headline, and the groups below what happens in their backward."""
        lines = textwrap.wrap(self.title(), SCREEN_COLUMNS)
        width = max((len(group.title) for group in groups), default=0)
        sections = dict.fromkeys(group.backward for group in groups)
        for backward in sorted(sections, key=lambda text: text.startswith((PLAIN, APART))):
            lines += textwrap.wrap(backward, SCREEN_COLUMNS)
            lines += [
                f"  {group.title:{width}}  {group.kind}"
                for group in groups
                if group.backward == backward
            ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the table by pattern for a notebook; every layer folded away below it."""
        summary, names = self._every()
        every = escape(", ".join(names))
        head = "".join(f"<th style='text-align:left'>{column}</th>" for column in _COLUMNS)
        rows = "".join(
            "<tr>"
            + "".join(
                f"<td style='text-align:left'>{escape(cell)}</td>"
                for cell in (group.title, group.kind, group.backward)
            )
            + "</tr>"
            for group in self.groups()
        )
        return (
            f"<p>{escape(self.title())}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            f"<details><summary>{summary}</summary>{every}</details>"
        )


@dataclass(repr=False)
class ConversionReport(LayerReport):
    """What ``convert_`` did; printing it gives at most a screen.

    Attributes:
        config: the configuration that the converted layers share; None if patterns gave several.
        converted: fully qualified names of the converted layers, in model order.
        skipped: name -> reason, for every layer with a product that stayed plain.
        configs: converted layer -> its configuration.
        kinds: converted or skipped layer -> class name of the plain layer, in model order.
    """

    config: SDGPConfig | None
    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    configs: dict[str, SDGPConfig] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def title(self) -> str:
        """Return what was done, in a few words."""
        what = "by name" if self.config is None else self.config.describe()
        return f"SDGP {what}: {len(self.converted)} converted, {len(self.skipped)} plain"

    def _backward(self, name: str) -> str:
        if name in self.skipped:
            return f"{PLAIN}{self.skipped[name]}"
        return "pruned" if self.config is not None else self.configs[name].describe()

    def _every(self) -> tuple[str, list[str]]:
        return f"{len(self.converted)} converted layers", self.converted


@dataclass(repr=False)
class FusionReport(LayerReport):
    """What ``fuse_`` did; printing it gives at most a screen.

    Attributes:
        fused: layer whose gradient is packed as it is made -> the activation that makes it.
        skipped: name -> reason, for every other converted layer.
        modules: names of the modules that run fused, in model order.
        kinds: converted layer -> class name of the plain layer, in model order.
    """

    fused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)

    def title(self) -> str:
        """Return what was done, in a few words."""
        return f"SDGP fused: {len(self.fused)} layers, {len(self.skipped)} apart"

    def _backward(self, name: str) -> str:
        if name in self.skipped:
            return f"{APART}{self.skipped[name]}"
        return f"fused with {self.fused[name]}"

    def _every(self) -> tuple[str, list[str]]:
        return f"{len(self.fused)} fused layers", list(self.fused)


def grouped(
    names: Iterable[str], about: Callable[[str], tuple[str, str]] = lambda name: ("", "")
) -> list[LayerGroup]:
    """Gather names that differ in numbers only.

    Args:
        names: fully qualified names.
        about: name -> (kind, backward); layers of a group share them.

    Returns:
        The groups, in the order of their first names.
    """
    groups: dict[tuple[str, str, str], LayerGroup] = {}
    for name in names:
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        key = (pattern, *about(name))
        groups.setdefault(key, LayerGroup(*key, [])).names.append(name)
    return list(groups.values())
