"""GradientDiagnostics: what pruning does to each layer's gradient over a training run."""

import csv
import importlib
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from sdgp_cusparselt.cache import write_atomically
from sdgp_cusparselt.config.patterns import checked_int
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.extras import MissingPackageError, require
from sdgp_cusparselt.layers.convert import converted_layers
from sdgp_cusparselt.layers.modules import SDGPModule
from sdgp_cusparselt.recording.spans import KEPT
from sdgp_cusparselt.telemetry.colours import COLOURS

#: What is measured, in the order of the columns; every one is 0 or 1 for an unpruned gradient.
MEASURES = ("relative_l2", "cosine", "kept_l1", "bias", "variance")
_AXES = {
    "relative_l2": "|p - g| / |g|",
    "cosine": "cosine of p and g",
    "kept_l1": "share of |g|$_1$ that is kept",
    "bias": "bias |E p - g| / |g|",
    "variance": "variance E|p - E p|² / |g|²",
}


@dataclass(frozen=True)
class GradientRow:
    """One layer and product at one collection: medians over the samples since the one before.

    Attributes:
        step: as given to ``collect``.
        layer: fully qualified name.
        product: grad_input or grad_weight.
        pruning: how the layer pruned at the end of the interval.
        relative_l2: |p - g| / |g|, of one draw p of the pruned gradient and the dense one, g.
        cosine: of p and g.
        kept_l1: share of |g|_1 at places where p is not zero.
        bias: |E p - g| / |g|; equals relative_l2 for a method that does not draw.
        variance: E |p - E p|^2 / |g|^2; 0 for a method that does not draw.
        samples: finite samples.
        not_finite: samples left out for an Inf or NaN, as a loss scaler provokes them.
    """

    step: int
    layer: str
    product: str
    pruning: str
    relative_l2: float
    cosine: float
    kept_l1: float
    bias: float
    variance: float
    samples: int
    not_finite: int


class GradientDiagnostics:
    """Collects gradient errors of every layer during training and writes them down.

    relative_l2^2 = bias^2 + variance, on average over the draws of a method

    Args:
        model: with converted layers whose ``SDGPConfig.telemetry_every`` is not 0: it says at
            which calls of a layer samples are taken.
        draws: how often random and mvue are drawn a sample, for bias and variance; at least 2.

    Attributes:
        rows: everything collected so far.

    Raises:
        TypeError: model is no module, or draws no int.
        ValueError: no layer is converted, none samples, or draws is below 2.
    """

    def __init__(self, model: nn.Module, *, draws: int = 8) -> None:
        layers = converted_layers("GradientDiagnostics", model)
        if checked_int("GradientDiagnostics", "draws", draws) < 2:
            fix = "A variance takes two."
            raise value_error("GradientDiagnostics", "draws", ">= 2", draws, fix)
        self._layers = [pair for pair in layers if pair[1].sdgp_config.telemetry_every]
        if not self._layers:
            fix = "Convert with SDGPConfig(telemetry_every=10)."
            got = "one in which every telemetry_every is 0"
            raise value_error("GradientDiagnostics", "model", "sampled", got, fix)
        for _, layer in self._layers:
            layer.sdgp_record.samples.draws = draws
        self.rows: list[GradientRow] = []
        self._taken = {
            (name, product): count
            for name, layer in self._layers
            for product, count in layer.sdgp_record.samples.taken.items()
        }

    def collect(self, step: int) -> list[GradientRow]:
        """Return one row for each layer and product sampled since the last call; waits for them.

        Args:
            step: number that the rows carry, such as the optimizer step.

        Raises:
            TypeError: step is no int.
        """
        checked_int("GradientDiagnostics.collect", "step", step)
        found = [
            row
            for name, layer in self._layers
            for product in ("grad_input", "grad_weight")
            if (row := self._row(step, name, layer, product)) is not None
        ]
        self.rows += found
        return found

    def write_csv(self, path: str | Path) -> None:
        """Write all rows, one a line below a header, in place of what is there."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [column.name for column in fields(GradientRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        write_atomically(Path(path), lambda file: file.write(text.getvalue().encode()))

    def write_tensorboard(self, log_dir: str | Path) -> None:
        """Write all rows as scalars ``sdgp/<measure>/<layer>/<product>``.

        Args:
            log_dir: folder for the event file.

        Raises:
            MissingPackageError: tensorboard is not installed.
        """
        writer = _summary_writer(Path(log_dir))
        self.add_scalars(writer)
        writer.close()

    def add_scalars(self, writer: Any) -> None:
        """Hand all rows to a ``SummaryWriter`` that is there already, or what looks like one.

        Args:
            writer: has ``add_scalar(tag, value, global_step)``.
        """
        for row in self.rows:
            for measure in MEASURES:
                tag = f"sdgp/{measure}/{row.layer or '(root)'}/{row.product}"
                writer.add_scalar(tag, getattr(row, measure), row.step)

    def plot(self, path: str | Path, *, measures: Sequence[str] = MEASURES[1:]) -> None:
        """Draw each measure over the steps, one line for each layer and product, as a PNG.

        Args:
            path: file to write.
            measures: which ones, in the order of the panels.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ValueError: nothing was collected, or a measure is unknown.
        """
        if not self.rows:
            fix = "Call collect after some steps."
            raise value_error("GradientDiagnostics.plot", "rows", "collected", "none", fix)
        for measure in measures:
            if measure not in MEASURES:
                rule = f"among {', '.join(MEASURES)}"
                name, fix = "GradientDiagnostics.plot", "Pick some of these."
                raise value_error(name, "measures", rule, repr(measure), fix)
        _draw(self.rows, measures, Path(path))

    def _row(self, step: int, name: str, layer: SDGPModule, product: str) -> GradientRow | None:
        samples = layer.sdgp_record.samples
        taken = samples.taken[product]
        fresh = min(taken - self._taken.get((name, product), 0), KEPT)
        self._taken[name, product] = taken
        measured = samples.gradient_moments(product, fresh) if fresh else None
        if measured is None:
            return None
        numbers = {measure: measured[measure] for measure in MEASURES}
        counts = int(measured["samples"]), int(measured["not_finite"])
        return GradientRow(
            step, name, product, layer.sdgp_config.describe(), **numbers,
            samples=counts[0], not_finite=counts[1],
        )  # fmt: skip


def _summary_writer(folder: Path) -> Any:
    try:
        importlib.import_module("tensorboard")
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "write_tensorboard needs the package tensorboard, which is not installed. "
            "Run: pip install tensorboard (write_csv needs nothing)",
            name=error.name,
        ) from error
    return importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))


def _draw(rows: Sequence[GradientRow], measures: Sequence[str], path: Path) -> None:
    figures = require("matplotlib.figure", package="matplotlib", purpose="plot")
    canvas = require("matplotlib.backends.backend_agg", package="matplotlib", purpose="plot")
    lines = dict.fromkeys((row.layer, row.product) for row in rows)
    columns = min(len(measures), 2)
    high = math.ceil(len(measures) / columns)
    size = (5.2 * columns, 3.1 * high + 0.35 + 0.2 * math.ceil(len(lines) / 2))
    figure = figures.Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(high, columns, squeeze=False).flatten()
    for panel in panels[len(measures) :]:
        panel.set_visible(False)
    for panel, measure in zip(panels, measures, strict=False):
        for index, line in enumerate(lines):
            own = [row for row in rows if (row.layer, row.product) == line]
            steps = [row.step for row in own]
            dashes = ("-", "--", ":", "-.")[index // len(COLOURS) % 4]
            style = {"color": COLOURS[index % len(COLOURS)], "linestyle": dashes, "marker": "."}
            label = " ".join((line[0] or "(root)", *line[1:]))
            panel.plot(steps, [getattr(r, measure) for r in own], label=label, lw=1.3, **style)
        panel.set_ylabel(_AXES[measure])
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  fontsize=7)  # fmt: skip
    figure.suptitle("Pruned gradient p against the dense one, g", fontsize=11)
    canvas.FigureCanvasAgg(figure)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, lambda file: file.write(image.getvalue()))
