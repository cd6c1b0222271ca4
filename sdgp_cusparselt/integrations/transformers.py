"""Hugging Face Trainer: ``Trainer(..., callbacks=[SDGPCallback(config)])``."""

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from sdgp_cusparselt.integrations.driver import Driver
from sdgp_cusparselt.layers.convert import Configs


class SDGPCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Converts the Trainer's model, drives its schedule, and logs.

    The step is in every checkpoint twice: with the model's weights, and in trainer_state.json for
    models whose checkpoints hold adapters alone. Numbers of ``driver.metrics`` are added to what
    the Trainer logs; ``log_first`` lets its trackers see them.

    Args:
        config: as ``convert_`` takes it; None for the defaults, or for a converted model.
        options: further keywords of ``convert_``, and fuse=True for ``fuse_`` after it.
    """

    def __init__(self, config: Configs | None = None, **options: Any) -> None:
        self.driver = Driver(config, **options)

    def state(self) -> dict[str, Any]:
        """Return what trainer_state.json keeps."""
        return {"args": {}, "attributes": {"saved": self.driver.state_dict()}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Convert, before checkpoints are loaded and anything wraps the model."""
        self.driver.convert(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on where the checkpoint stood; follow the optimizer."""
        self.driver.convert(kwargs["model"])
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and isinstance(saved, dict):
            self.driver.load_state_dict(saved["attributes"]["saved"])
        self.driver.start(kwargs["model"], [kwargs["optimizer"]])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step where the optimizer takes no hooks."""
        self.driver.stepped()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the numbers to what is logged during training."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            found = self.driver.metrics()
            logs.update(found)
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the optimizer."""
        self.driver.stop()


def log_first(trainer: Any) -> None:
    """Move SDGPCallback before the Trainer's trackers, which log what callbacks before them add.

    Args:
        trainer: a Trainer that was made with an SDGPCallback.
    """
    callbacks = trainer.callback_handler.callbacks
    callbacks.sort(key=lambda callback: not isinstance(callback, SDGPCallback))
