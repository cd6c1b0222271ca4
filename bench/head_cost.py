"""What a head's cross-entropy costs in memory and FLOPs: counted on meta tensors, no GPU needed.

python -m bench.head_cost

Memory is the peak of what is alive of all that forward and backward allocate, operands excluded and
gradients included. Liger and torch's chunked function allocate inside kernels of a CUDA build, so
theirs is added up from their published sources.
"""

import argparse
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sdgp_cusparselt import functional
from sdgp_cusparselt.planner.report import table

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Tokens and vocabulary of the table: Llama 3's.
TOKENS, VOCABULARY = 8192, 128256
WIDTHS = (1024, 2048, 4096)


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that are alive.

    Attributes:
        peak: most bytes at a time, those of ``known`` excluded.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.now = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._known = [x.untyped_storage() for x in known]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._see(x.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        found = self._alive.get(id(storage))
        if (found is not None and found() is storage) or any(storage is k for k in self._known):
            return
        size, key = storage.nbytes(), id(storage)

        def free(_: object) -> None:
            self.now -= size

        self._alive[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Cost:
    """What one loss costs.

    Attributes:
        peak: bytes, gradients included.
        products: of the head's size; the forward of plain torch is one.
    """

    peak: int
    products: float


def counted(loss: Loss, width: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
    """Run forward and backward of a loss on meta tensors.

    Args:
        loss: of (input [TOKENS, width], weight [VOCABULARY, width], target [TOKENS]).
        width: in_features of the head.
        dtype: of the operands.
    """
    like: dict[str, Any] = {"dtype": dtype, "device": "meta", "requires_grad": True}
    input, weight = torch.empty(TOKENS, width, **like), torch.empty(VOCABULARY, width, **like)
    target = torch.empty(TOKENS, dtype=torch.long, device="meta")
    memory, flops = Peak(input, weight, target), FlopCounterMode(display=False)
    with memory, flops:
        loss(input, weight, target).backward()  # type: ignore[no-untyped-call]
    return Cost(memory.peak, flops.get_total_flops() / (2 * TOKENS * VOCABULARY * width))


def gradients(width: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes of grad_input and grad_weight, which every way must hold at last."""
    return (TOKENS + VOCABULARY) * width * dtype.itemsize


def plain(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return what a model computes that knows nothing of this."""
    return F.cross_entropy(F.linear(input, weight), target)


def plain_float32(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return the same with float32 logits, as transformers and autocast compute them."""
    return F.cross_entropy(F.linear(input, weight).float(), target)


def ours(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return sdgp.functional.linear_cross_entropy."""
    return functional.linear_cross_entropy(input, weight, target)


def liger(width: int) -> Cost:
    """Return what Liger-Kernel @00eba634 allocates: ops/fused_linear_cross_entropy.py, bf16.

    Gradients in the dtype of the operands, and logits of as many tokens as take input's memory.
    """
    rows = _rows_of_one_input(width)
    return Cost(gradients(width) + 2 * rows * VOCABULARY, 3)


def torch_chunked(width: int) -> Cost:
    """Return what torch 2.13's LinearCrossEntropyOptions() allocates on CUDA, policy "compact".

    As Liger, for half as many tokens; their logits in float32, and a float32 copy of their input.
    """
    rows = max(1, _rows_of_one_input(width) // 2)
    return Cost(gradients(width) + 4 * rows * (VOCABULARY + width), 3)


def _rows_of_one_input(width: int) -> int:
    share = -(-TOKENS // -(-VOCABULARY // width))
    return 1 << (share - 1).bit_length()


def report() -> str:
    """Return the table of the documentation as Markdown."""
    ways: list[tuple[str, Callable[[int], Cost]]] = [
        ("plain torch", lambda width: counted(plain, width)),
        ("plain torch, float32 logits", lambda width: counted(plain_float32, width)),
        ("Liger (gradients summed in bf16)", liger),
        ("torch's chunked (summed in bf16)", torch_chunked),
        ("this package (summed in float32)", lambda width: counted(ours, width)),
    ]
    rows: list[list[object]] = [
        ["the gradients alone", *(f"{gradients(w) / 2**20:,.0f}" for w in WIDTHS), ""]
    ]
    for name, cost in ways:
        found = [cost(width) for width in WIDTHS]
        sizes = [f"{c.peak / 2**20:,.0f}" for c in found]
        rows.append([name, *sizes, f"{found[0].products:.0f}"])
    header = ["MiB at their peak, bf16", *(f"in_features {w}" for w in WIDTHS), "products"]
    return table(header, rows)


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    print(report())


if __name__ == "__main__":
    main()
