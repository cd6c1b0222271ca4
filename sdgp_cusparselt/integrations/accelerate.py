"""Accelerate: ``model, optimizer, loader = prepare(accelerator, model, optimizer, loader)``."""

from typing import Any

from torch import nn

from sdgp_cusparselt.integrations.driver import Driver, metrics
from sdgp_cusparselt.layers.convert import Configs


def prepare(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    *others: Any,
    config: Configs | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """Convert, let Accelerate prepare, follow the optimizer, and keep the step in its checkpoints.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        model: the model; converted unless it is.
        optimizer: that trains it.
        others: loaders and schedulers, as ``accelerator.prepare`` takes them.
        config: as ``convert_`` takes it; None for the defaults, or for a converted model.
        options: further keywords of ``convert_``, and fuse=True for ``fuse_`` after it.

    Returns:
        What ``accelerator.prepare(model, optimizer, *others)`` returns.

    Raises:
        ValueError: ``step_with`` drives the model already; see ``convert_`` for more.
    """
    driver = Driver(config, **options)
    driver.convert(model)
    prepared: tuple[Any, ...] = accelerator.prepare(model, optimizer, *others)
    driver.start(prepared[0], [prepared[1]])
    # save_state and load_state keep the objects that are registered, in this order.
    accelerator.register_for_checkpointing(driver)
    return prepared


def log(accelerator: Any, model: nn.Module, step: int | None = None) -> None:
    """Send the numbers of ``driver.metrics`` to the trackers that ``init_trackers`` started.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        model: the converted model, prepared or not.
        step: x axis of the trackers.
    """
    accelerator.log(metrics(model), step=step)
