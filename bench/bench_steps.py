"""Whole training steps of one block: forward, backward, fused AdamW; dense beside converted.

    PYTHONPATH=.:bindings python -m pytest bench/bench_steps.py -k cpu

Blocks are transformers' own, made from a configuration with one layer and read embeddings as
inputs, so that vocabularies do not count. In the quick run they run uncompiled; ``--full`` compares
compiled with compiled.
"""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from bench import rivals
from bench.bench_layers import CONFIGS, backends_used, measured_on
from bench.contender import Contender, Work, measure, parameters
from bench.operands import UnavailableError
from bench.shapes import Selection
from bench.timing import Run
from bench.verify import Check, WrongResultError
from sdgp_cusparselt.recording import records

pytestmark = pytest.mark.filterwarnings("default::sdgp_cusparselt.errors.SDGPFallbackWarning")


@dataclass(frozen=True)
class Block:
    """One block of a model with its batch.

    Attributes:
        model, layer: where the block comes from.
        batch, sequence, width: of its input [batch, sequence, width].
        config: transformers' configuration as (name, value) pairs; an MLP if empty.
        hidden: width inside an MLP.
        quick: part of the quick run.
        device_type, dtype: as in ``bench.shapes.Case``.
    """

    model: str
    layer: str
    batch: int
    sequence: int
    width: int
    config: tuple[tuple[str, Any], ...] = field(default=(), repr=False)
    hidden: int = 0
    quick: bool = False
    device_type: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    @property
    def label(self) -> str:
        """Name for tests and tables."""
        return f"{self.model}-{self.layer}-{self.batch}x{self.sequence}"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.device_type, 0 if self.device_type == "cuda" else None)


def _gpt2(width: int, heads: int, positions: int) -> tuple[tuple[str, Any], ...]:
    sizes = {"n_embd": width, "n_head": heads, "n_positions": positions, "n_layer": 1}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return tuple({"model_type": "gpt2", "vocab_size": 16, **sizes, **dropout}.items())


_LLAMA = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
_VIT_L = {
    "model_type": "vit",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
}
BLOCKS = (
    Block("llama-3-8b", "block", 2, 4096, 4096, tuple(_LLAMA.items())),
    Block("gpt2-medium", "block", 8, 1024, 1024, _gpt2(1024, 16, 1024), quick=True),
    Block("gpt-1.3b", "block", 8, 2048, 2048, _gpt2(2048, 16, 2048)),
    Block("vit-l-16", "block", 64, 256, 1024, tuple(_VIT_L.items())),
    # As wide as Llama-3-8B's, whose products the quick run has tuned by then.
    Block("mlp", "4096-14336-4096", 8, 1024, 4096, hidden=14336, quick=True),
)
_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
CPU_BLOCKS = (
    Block("tiny-gpt2", "block", 2, 32, 64, _gpt2(64, 4, 32), device_type="cpu"),
    Block(
        "tiny-llama",
        "block",
        2,
        32,
        64,
        tuple((_LLAMA | _SMALL | {"num_key_value_heads": 2}).items()),
        device_type="cpu",
    ),
    Block("tiny-vit", "block", 2, 32, 64, tuple((_VIT_L | _SMALL).items()), device_type="cpu"),
    Block("tiny-mlp", "64-256-64", 2, 32, 64, hidden=256, device_type="cpu"),
)


class _OneBlock(nn.Module):
    """The one layer of a transformers model, fed with embeddings."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        try:
            transformers = importlib.import_module("transformers")
        except ImportError as error:
            raise UnavailableError("transformers is not installed") from error
        values = dict(block.config)
        model_type = values.pop("model_type")
        config = transformers.AutoConfig.for_model(model_type, **values)
        model = transformers.AutoModel.from_config(config)
        self.images = model_type == "vit"
        # A vision model has no way in for embeddings: its one layer is the block.
        layers = [m for m in model.modules() if type(m).__name__ == "ViTLayer"]
        self.body = layers[0] if self.images else model

    def forward(self, x: Tensor) -> Tensor:
        if self.images:
            hidden = self.body(x)
            return hidden if isinstance(hidden, Tensor) else hidden[0]
        return self.body(inputs_embeds=x, use_cache=False).last_hidden_state


def _model(block: Block) -> nn.Module:
    if block.config:
        model: nn.Module = _OneBlock(block)
    else:
        width, hidden = block.width, block.hidden
        model = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    return model.to(device=block.device, dtype=block.dtype).train()


class Step:
    """One training step of a model: call it, and it returns the loss."""

    def __init__(self, model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.model, self.forward, self.x = model, forward, x
        used = [p for p in model.parameters() if p.requires_grad]
        # So small a rate leaves the weights where they are: every step is the same work.
        self.optimizer = torch.optim.AdamW(used, lr=1e-12, fused=True)

    def __call__(self) -> Tensor:
        loss = self.forward(self.x).float().pow(2).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.x.grad = None
        return loss.detach()


def _prepare(name: str, compiled: bool) -> Callable[[Block], Work]:
    def prepare(block: Block) -> Work:
        if compiled and block.device_type == "cpu":
            raise UnavailableError("compiled code is timed on a GPU only")
        dense = _model(block)
        pruned = copy.deepcopy(dense)
        report = sdgp.convert_(pruned, CONFIGS[name], lambda *_: True)
        x = torch.randn(block.batch, block.sequence, block.width, device=block.device)
        x = x.to(block.dtype).requires_grad_(True)
        forwards = rivals.compiled(pruned, dense) if compiled else (pruned, dense)
        run, reference = Step(pruned, forwards[0], x), Step(dense, forwards[1], x)
        return Work(
            run,
            lambda loss: _check(loss, reference(), pruned),
            reference,
            "the dense step, compiled" if compiled else "the dense step",
            info={
                **measured_on(block.device_type),
                "compiled": compiled,
                "converted": len(report.converted),
                "parameters": sum(p.numel() for p in pruned.parameters()),
            },
            after=lambda: _afterwards(block, pruned, run, reference, compiled),
        )

    return prepare


def _check(loss: Tensor, expected: Tensor, model: nn.Module) -> Check:
    """The forward pass is the same, so the loss is, up to one rounding of what it averages.

    The gradients are checked layer by layer in ``bench_layers.py``.
    """
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise WrongResultError("wrong: a parameter is not finite after a step")
    error, value = abs(float(loss) - float(expected)), abs(float(expected))
    dtype = next(model.parameters()).dtype
    bound = 2 * torch.finfo(dtype).eps * value
    if not error <= bound:
        raise WrongResultError(f"wrong: the loss is {float(loss)}, not {float(expected)}")
    return Check(error, error / bound, "the dense step's loss")


def _afterwards(
    block: Block, model: nn.Module, run: Run, reference: Run, compiled: bool
) -> dict[str, Any]:
    """Return which backends ran, and on a GPU the memory of both steps."""
    record = records.COMPILED if compiled else records.LayerRecord("all layers")
    for layer in () if compiled else model.modules():
        if isinstance(layer, sdgp.nn.SDGPModule):
            record.calls.update(layer.sdgp_record.calls)
            record.fallbacks.update(layer.sdgp_record.fallbacks)
    found: dict[str, Any] = {"backends": backends_used(record)}
    if block.device_type == "cuda":
        found["step_peak_mib"] = _peak_mib(run)
        found["reference_step_peak_mib"] = _peak_mib(reference)
    return found


def _peak_mib(step: Run) -> float:
    """Return what a step allocates at its peak beyond parameters and optimizer state."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _sizes(block: Block) -> tuple[int, int, int]:
    """A step has many products: tokens and width stand for them."""
    return block.batch * block.sequence, block.width, block.width


def _contenders(compiled: bool, block: Block) -> list[Contender]:
    suffix = ", compiled" if compiled and block.device_type == "cuda" else ""
    return [
        Contender("step", f"{name}{suffix}", _prepare(name, bool(suffix)), _sizes)
        for name in CONFIGS
    ]


def pairs(selection: Selection) -> list[object]:
    blocks = [block for block in BLOCKS if selection.keeps(block.model, block.quick)]
    return parameters([*blocks, *CPU_BLOCKS], partial(_contenders, selection.full))


def test_step(request: pytest.FixtureRequest, case: Block, contender: Contender) -> None:
    """Time a training step of a converted block beside the dense one."""
    measure(request, case, contender)
