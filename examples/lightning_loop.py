"""Lightning: convert inside configure_model, or before the Trainer gets the module, as here.

python examples/lightning_loop.py --steps 100
"""

import lightning
import torch
from tiny_gpt import BATCH, CLIP, Text, arguments, build_model, build_optimizer
from torch import Tensor
from torch.utils.data import DataLoader

import sdgp_cusparselt as sdgp


class Language(lightning.LightningModule):
    """A language model that keeps the loss of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model()
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model)


def train(steps: int) -> tuple[torch.nn.Module, list[float]]:
    """Return the trained model and the loss of every step."""
    module = Language()
    sdgp.convert_(module.model, sdgp.SDGPConfig(prune="mvue"))
    module.train()
    trainer = lightning.Trainer(
        max_steps=steps,
        gradient_clip_val=CLIP,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Text(), batch_size=BATCH))
    return module.model, module.losses


if __name__ == "__main__":
    _, losses = train(arguments(__doc__).steps)
    print(f"final loss {losses[-1]:.4f}")
