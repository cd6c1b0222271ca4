"""Hugging Face Trainer: convert the model before the Trainer gets it.

python examples/hf_trainer.py --steps 100
"""

import tempfile

import torch
from tiny_gpt import BATCH, CLIP, LEARNING_RATE, Text, arguments, build_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import sdgp_cusparselt as sdgp


class Losses(TrainerCallback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self.values.append(float(logs["loss"]))


def train(steps: int) -> tuple[torch.nn.Module, list[float]]:
    """Return the trained model and the loss of every step."""
    model = build_model()
    sdgp.convert_(model, sdgp.SDGPConfig(prune="mvue"))
    losses = Losses()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            max_grad_norm=CLIP,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(model, settings, train_dataset=Text(), callbacks=[losses]).train()
    return model, losses.values


if __name__ == "__main__":
    _, losses = train(arguments(__doc__).steps)
    print(f"final loss {losses[-1]:.4f}")
