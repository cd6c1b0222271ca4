"""Method: dense, or what prunes the gradients of a layer, as written on the command line."""

import re
from dataclasses import dataclass, replace
from typing import cast

from sdgp_cusparselt.config.choices import BackendName, SDGPConfig
from sdgp_cusparselt.config.patterns import METHODS, PruneMethod
from sdgp_cusparselt.config.schedule import Schedule
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.layers.presets import Preset
from sdgp_cusparselt.training.weight_methods import STRUCTURELESS, WEIGHT_METHODS
from sdgp_cusparselt.weights import WeightRecipe

DENSE = "dense"
NONE = "none"

_PATTERN = re.compile(
    r"((?P<preset>readers|balanced):)?(?P<prune>[a-z_]+)(@(?P<n>\d+):(?P<m>\d+))?(\+heavy=(?P<heavy>[01]?(\.\d+)?))?"
    r"(\+warmup=(?P<warmup>0?\.\d+))?(\+tail=(?P<tail>0?\.\d+))?(\+grad_weight=(?P<grad_weight>[a-z_]+))?"
)
#: Steps with which shares of them are checked before a training's length is known.
_MANY = 1000
#: Before the name of a row of ``WEIGHT_METHODS``.
WEIGHTS = "weights="

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
#: Biased methods beside unbiased ones, for one product at a time: grad_input, then grad_weight.
_COMPARED = ("magnitude", "rescaled_magnitude", "mvue", "random")
GRADIENT_BIAS = (
    DENSE,
    *(f"{prune}@2:4" for prune in _COMPARED),
    *(f"none@2:4+grad_weight={prune}" for prune in _COMPARED),
)
#: Which layers of a transformer to prune, and for which product.
PRESETS = (
    DENSE,
    "mvue@2:4",
    "readers:mvue@2:4",
    "readers:magnitude@2:4",
    "none@2:4+grad_weight=mvue",
    "balanced:mvue@2:4",
)
SWEEPS = {
    "table1": TABLE1,
    "gradient-bias": GRADIENT_BIAS,
    "presets": PRESETS,
    "weights": (
        DENSE,
        *(f"{WEIGHTS}{name}" for name in WEIGHT_METHODS if name not in STRUCTURELESS),
    ),
    "unstructured": (DENSE, *(f"{WEIGHTS}{name}" for name in ("mishra", *STRUCTURELESS))),
}


@dataclass(frozen=True)
class Method:
    """What happens to the gradients: nothing (``dense``), or prune functions at n:m.

    grad_input = prune(grad_output) @ weight
    grad_weight = grad_output.T @ input, or prune(grad_output along tokens).T @ input

    Args:
        prune: ``dense`` (the model is not converted) or a prune method of ``SDGPConfig``, which
            ``none`` is too.
        n: values kept in a group.
        m: group size.
        grad_weight: prune method of the second product; None leaves it dense.
        preset: which layers of a transformer; see ``convert_``.
        heavy_tokens: of ``SDGPConfig``.
        warmup: share of the steps that is dense at the start.
        tail: likewise at the end.
        weights: name in ``WEIGHT_METHODS``; gradients are then dense but for what it prunes.
    """

    prune: str
    n: int = 2
    m: int = 4
    grad_weight: str | None = None
    preset: Preset = "all"
    heavy_tokens: float = 0.0
    warmup: float = 0.0
    tail: float = 0.0
    weights: str = ""

    @property
    def is_dense(self) -> bool:
        """Whether the model stays as it is."""
        return self.prune == DENSE

    @property
    def label(self) -> str:
        """Name in tables and plots, such as ``magnitude 2:4`` or ``grad_weight: mvue 2:4``."""
        if self.is_dense:
            return DENSE
        if self.weights:
            return WEIGHT_METHODS[self.weights].label
        pattern = f"{self.n}:{self.m}"
        parts = [f"{self.prune} {pattern}"] if self.prune != NONE or not self.grad_weight else []
        parts += [f"heaviest {self.heavy_tokens:.3g} exact"] if self.heavy_tokens else []
        parts += [f"first {self.warmup:.3g} dense"] if self.warmup else []
        parts += [f"last {self.tail:.3g} dense"] if self.tail else []
        parts += [f"grad_weight: {self.grad_weight} {pattern}"] if self.grad_weight else []
        which = "" if self.preset == "all" else f"{self.preset}: "
        return which + ", ".join(parts)

    @property
    def spelling(self) -> str:
        """Name on the command line, such as ``magnitude@2:4`` or ``none@2:4+grad_weight=mvue``."""
        if self.is_dense:
            return DENSE
        if self.weights:
            return f"{WEIGHTS}{self.weights}"
        suffix = f"+heavy={self.heavy_tokens:g}" if self.heavy_tokens else ""
        suffix += f"+warmup={self.warmup:g}" if self.warmup else ""
        suffix += f"+tail={self.tail:g}" if self.tail else ""
        suffix += f"+grad_weight={self.grad_weight}" if self.grad_weight else ""
        which = "" if self.preset == "all" else f"{self.preset}:"
        return f"{which}{self.prune}@{self.n}:{self.m}{suffix}"

    @property
    def slug(self) -> str:
        """Name in file names, such as ``magnitude-2of4``."""
        spelling = self.spelling.replace(f"{self.preset}:", f"{self.preset}-")
        return spelling.replace("@", "-").replace(":", "of").replace("=", "-")

    @property
    def prunes_grad_input(self) -> bool:
        """Whether the data gradient differs from the dense one."""
        return not self.is_dense and self.prune != NONE and self.n < self.m

    @property
    def pruned_share(self) -> float:
        """Share of the steps that prune."""
        return 1.0 - self.warmup - self.tail

    @property
    def passes(self) -> int:
        """How often the task's recipe is gone through."""
        return WEIGHT_METHODS[self.weights].passes if self.weights else 1

    def weight_recipe(self, steps: int) -> WeightRecipe | None:
        """Return what the weights follow, or None where they are dense.

        Args:
            steps: of the task's recipe.
        """
        return WEIGHT_METHODS[self.weights].build(steps) if self.weights else None

    def config(
        self, backend: BackendName = "auto", total_steps: int | None = None
    ) -> SDGPConfig | None:
        """Return the conversion's config, or None for dense.

        Args:
            backend: of ``SDGPConfig``. A forced cusparselt raises where it cannot run.
            total_steps: of the training; None where no schedule is asked for.

        Raises:
            ValueError: n and m do not go together or with this prune method, or nothing lies
                between warm-up and tail.
        """
        if self.is_dense:
            return None
        # A shape that runs faster dense must prune all the same: the accuracy is the question here.
        prune = cast(PruneMethod, self.prune)
        config = SDGPConfig(
            prune=prune,
            n=self.n,
            m=self.m,
            heavy_tokens=self.heavy_tokens,
            backend=backend,
            on_unsupported="raise" if backend == "cusparselt" else "emulate",
            on_slower="emulate",
        )
        if (self.warmup or self.tail) and total_steps is not None:
            schedule = Schedule(total_steps=total_steps, warmup=self.warmup, tail=self.tail)
            config = config.replace(schedule=schedule)
        if self.grad_weight is None:
            return config
        grad_weight_prune = cast(PruneMethod, self.grad_weight)
        return replace(config, grad_weight="sparse", grad_weight_prune=grad_weight_prune)


def parse_method(text: str) -> Method:
    """Read ``dense``, ``magnitude`` (then 2:4), ``magnitude@n:m``, ``...+grad_weight=mvue``.

    A preset may stand before it: ``readers:mvue``; behind it heavy tokens, ``mvue+heavy=0.06``, and
    shares of the steps that are dense, ``mvue+warmup=0.2+tail=0.1``.

    Args:
        text: one entry of ``--methods``.

    Returns:
        The method, its parts checked by ``SDGPConfig``.

    Raises:
        ValueError: the spelling, the prune method, or n and m are wrong.
    """
    word = text.strip()
    if word.removeprefix(WEIGHTS) in WEIGHT_METHODS and word.startswith(WEIGHTS):
        return Method(NONE, weights=word.removeprefix(WEIGHTS))
    match = _PATTERN.fullmatch(word)
    if match is None or not _is_known(match):
        rule = (
            f"dense, or one of {', '.join(METHODS)}, optionally with readers: or balanced: before "
            "it, and @n:m, +heavy=SHARE, +warmup=SHARE, +tail=SHARE and +grad_weight=METHOD behind "
            "it, or weights= and one of "
            f"{', '.join(WEIGHT_METHODS)}"
        )
        fix = "Write for example magnitude, rescaled_magnitude@4:8 or none+grad_weight=mvue."
        raise value_error("parse_method", "text", rule, repr(text), fix)
    n, m = (int(match["n"]), int(match["m"])) if match["n"] else (2, 4)
    preset = cast(Preset, match["preset"] or "all")
    heavy, warmup, tail = (float(match[part] or 0) for part in ("heavy", "warmup", "tail"))
    method = Method(match["prune"], n, m, match["grad_weight"], preset, heavy, warmup, tail)
    method.config(total_steps=_MANY)
    return method


def _is_known(match: re.Match[str]) -> bool:
    if match["prune"] == DENSE:
        return not match["n"] and not any(
            match[part] for part in ("grad_weight", "preset", "heavy", "warmup", "tail")
        )
    return match["prune"] in METHODS and match["grad_weight"] in (None, *METHODS)


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
