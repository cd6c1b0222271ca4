"""Lightning: ``Trainer(callbacks=[SDGPCallback(config)])``, of lightning or pytorch_lightning."""

from typing import Any

try:
    import lightning as host
except ImportError:  # the same code under its older name
    import pytorch_lightning as host  # type: ignore[no-redef]

from sdgp_cusparselt.integrations.driver import Driver
from sdgp_cusparselt.layers.convert import Configs


class SDGPCallback(host.Callback):
    """Converts the LightningModule, drives its schedule, keeps the step, and logs.

    Modules whose layers are made in ``configure_model`` convert themselves there.

    Args:
        config: as ``convert_`` takes it; None for the defaults, or for a converted model.
        options: further keywords of ``convert_``, and fuse=True for ``fuse_`` after it.
    """

    def __init__(self, config: Configs | None = None, **options: Any) -> None:
        self.driver = Driver(config, **options)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Convert, before checkpoints are loaded and anything wraps the model."""
        if stage == "fit":
            self.driver.convert(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Follow the optimizer that trains converted layers."""
        self.driver.start(pl_module, trainer.optimizers)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log as often as the Trainer does."""
        if trainer.global_step and trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics(self.driver.metrics(), step=trainer.global_step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the optimizer, also after an error."""
        self.driver.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint keeps beside the weights."""
        return dict(self.driver.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint stood."""
        self.driver.load_state_dict(state_dict)
