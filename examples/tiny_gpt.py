"""What the language-model examples share: a GPT-2 with random weights, and some text.

The text is the source of Python's own argparse module, byte by byte: nothing is downloaded.
"""

import argparse
import inspect

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

LENGTH, BATCH, LEARNING_RATE, CLIP = 64, 8, 3e-3, 1.0


class Text(Dataset):
    """Windows of bytes, with themselves as labels, as causal language models want them."""

    def __init__(self, length: int = LENGTH) -> None:
        source = inspect.getsource(argparse).encode("ascii", "replace")
        usable = len(source) // length * length
        self.windows = torch.tensor(list(source[:usable])).view(-1, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # 7 has no factor in common with the number of windows: neighbours land in other batches.
        window = self.windows[7 * index % len(self)]
        labels = window.clone()
        labels[0] = -100  # nothing predicts it; a Trainer would count it among the tokens
        return {"input_ids": window, "labels": labels}


def build_model(seed: int = 0) -> nn.Module:
    """Return a two-layer GPT-2 over bytes; every linear layer of its blocks can be converted."""
    torch.manual_seed(seed)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "vocab_size": 128}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": None, "eos_token_id": None, "use_cache": False}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **tokens))
    model.loss_type = "ForCausalLM"  # guessing it logs a warning, which breaks compiled graphs
    return model


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)


def arguments(description: str, **choices: list[str]) -> argparse.Namespace:
    """Read --steps and one option for each keyword, its first choice being the default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=100)
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    return parser.parse_args()
