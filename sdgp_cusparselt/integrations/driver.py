"""Driver: what every trainer needs done, in the order in which trainers allow it."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sdgp_cusparselt.layers.convert import Configs, convert_, revert_, unwrapped
from sdgp_cusparselt.layers.fuse import fuse_
from sdgp_cusparselt.layers.modules import SDGPModule
from sdgp_cusparselt.layers.report import ConversionReport, FusionReport
from sdgp_cusparselt.layers.stepping import load_schedule_state, schedule_state, step, step_with


class Driver:
    """Converts a model, counts its optimizer's steps, keeps the count and reports.

    Args:
        config: as ``convert_`` takes it; None drives a model that is converted already, and
            converts one that is not with the defaults.
        fuse: whether ``fuse_`` follows.
        options: further keywords of ``convert_``.

    Attributes:
        report: of the conversion; None where the model came converted.
        fusion: of ``fuse_``; None where it was not asked for.
    """

    def __init__(
        self, config: Configs | None = None, *, fuse: bool = False, **options: Any
    ) -> None:
        self.report: ConversionReport | None = None
        self.fusion: FusionReport | None = None
        self._config, self._fuse, self._options = config, fuse, options
        self._model: nn.Module | None = None
        self._handle: RemovableHandle | None = None
        self._step: int | None = None

    def convert(self, model: nn.Module) -> None:
        """Convert and fuse the model unless that is done; see ``convert_`` and ``fuse_``."""
        if self._model is None:
            if self._config is not None or not is_converted(model):
                self.report = convert_(model, self._config, **self._options)
            if self._fuse:
                self._fuse_(model)
        self._model = model

    def _fuse_(self, model: nn.Module) -> None:
        try:
            self.fusion = fuse_(model)
        except ValueError:
            if self.report is not None:  # leave the model as it came
                revert_(model)
            raise

    def start(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        """Count the steps of the optimizer that trains a converted layer.

        Where none takes hooks, as DeepSpeed's, ``stepped`` counts.

        Raises:
            ValueError: ``step_with`` drives the model already.
        """
        self.convert(model)
        if self._step is not None:
            load_schedule_state(model, {"step": self._step})
            self._step = None
        trained = {id(p) for layer in _layers(model) for p in layer.parameters()}
        for optimizer in optimizers:
            groups = getattr(optimizer, "param_groups", ())
            held = {id(p) for group in groups for p in group["params"]}
            if held & trained and _takes_hooks(optimizer):
                self._handle = step_with(optimizer, model)
                return

    def stepped(self) -> None:
        """Count a step, if no optimizer's hook does."""
        if self._handle is None and self._model is not None:
            step(self._model)

    def stop(self) -> None:
        """Count no more; the model may be trained again, by whatever."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def state_dict(self) -> dict[str, int]:
        """Return the steps counted; 0 before there is a model."""
        if self._model is None or not is_converted(self._model):
            return {"step": 0}
        return dict(schedule_state(self._model))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a count, at once or as soon as there is a model."""
        if self._model is None:
            self._step = int(state["step"])
        else:
            load_schedule_state(self._model, state)

    def metrics(self) -> dict[str, float]:
        """Return ``metrics`` of the model; nothing before there is one."""
        return {} if self._model is None else metrics(self._model)


def is_converted(model: nn.Module) -> bool:
    """Whether any layer of the model is converted."""
    return bool(_layers(model))


def metrics(model: nn.Module) -> dict[str, float]:
    """Return numbers for a tracker, since the start of training.

    sdgp/step, sdgp/pruning_layers (share of the converted layers that prune now), sdgp/sparse_calls
    (share of all products that ran on sparse tensor cores), sdgp/fallbacks (their number), and
    sdgp/gradient_error (relative L2, mean over layers) where ``telemetry_every`` samples it.

    Args:
        model: any module with converted layers, wrapped or not.
    """
    layers = _layers(model)
    records = [layer.sdgp_record for layer in layers]
    calls = [item for record in records for item in list(record.calls.items())]
    total = sum(count for _, count in calls)
    sparse = sum(count for (_, way), count in calls if way == "sparse")
    sampled = [record.samples.gradient_error("grad_input") for record in records]
    errors = [error["relative_l2"] for error in sampled if error]
    found = {
        "sdgp/step": float(layers[0].sdgp_step),
        "sdgp/pruning_layers": sum(x.sdgp_config.prunes for x in layers) / len(layers),
        "sdgp/sparse_calls": sparse / max(total, 1),
        "sdgp/fallbacks": float(sum(sum(record.fallbacks.values()) for record in records)),
    }
    if errors:
        found["sdgp/gradient_error"] = sum(errors) / len(errors)
    return found


def _layers(model: nn.Module) -> list[SDGPModule]:
    return [mod for mod in unwrapped(model).modules() if isinstance(mod, SDGPModule)]


def _takes_hooks(optimizer: Any) -> bool:
    while not isinstance(optimizer, Optimizer):
        if not hasattr(optimizer, "optimizer"):
            return False
        optimizer = optimizer.optimizer
    return type(optimizer).__module__.partition(".")[0] != "deepspeed"
