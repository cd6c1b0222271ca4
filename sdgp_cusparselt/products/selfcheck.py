"""Does a way compute what float64 says? One product of one layer at a time."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt.backends.base import ConvGeometry, Product, Way
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.equivalence import compare, product_bound
from sdgp_cusparselt.products import routes
from sdgp_cusparselt.products.operands import (
    Conv2dGradInput,
    Conv2dGradWeight,
    GradientOperands,
    LinearGradInput,
    LinearGradWeight,
)
from sdgp_cusparselt.products.sparse import sparse_product

#: Deterministic pruning, so that there is one right result.
CONFIG = SDGPConfig(prune="magnitude", grad_weight="sparse", grad_weight_prune="magnitude")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMPUTE: dict[Way, Callable[[GradientOperands], Tensor]] = {
    "sparse": lambda operands: sparse_product(routes.LIBRARY, operands, CONFIG),
    "plain": lambda operands: operands.plain(),
    "emulated": lambda operands: operands.emulated(CONFIG),
}
WAYS: tuple[Way, ...] = ("sparse", "emulated")


@dataclass(frozen=True)
class Case:
    """One product of one layer.

    Attributes:
        product: grad_input or grad_weight.
        inputs: channels that the layer reads.
        outputs: channels that it writes.
        tokens: rows of grad_output; of a convolution the batch.
        kernel: edge of the kernel, 0 for a linear layer.
        stride: of the convolution.
    """

    product: Product
    inputs: int
    outputs: int
    tokens: int
    kernel: int = 0
    stride: int = 1

    @property
    def name(self) -> str:
        """What the table calls it."""
        sizes = f"{self.inputs} -> {self.outputs}"
        if not self.kernel:
            return f"linear {sizes}, {self.tokens} tokens"
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"conv {self.kernel}x{self.kernel}{stride} {sizes}, batch {self.tokens}"


LINEAR = ((64, 96, 64), (64, 96, 257), (256, 512, 300), (512, 256, 1023))
CONVS = ((64, 32, 3, 1, 1), (32, 64, 2, 1, 2), (32, 64, 2, 3, 1), (64, 48, 3, 3, 2))
_PRODUCTS: tuple[Product, ...] = ("grad_input", "grad_weight")
CASES = tuple(Case(p, *sizes) for p in _PRODUCTS for sizes in LINEAR)
CASES += tuple(Case(p, *sizes) for p in _PRODUCTS for sizes in CONVS)
_EDGE = 9


@dataclass(frozen=True)
class Outcome:
    """What one way did with one case.

    Attributes:
        way, case, product, dtype, device: what was run, in words.
        status: ok, MISMATCH or "not run".
        detail: which element is worst, or why it was not run.
    """

    way: str
    case: str
    product: str
    dtype: str
    device: str
    status: str
    detail: str = ""


def check(way: Way, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Outcome:
    """Return how a product computed in one way compares with float64 on the CPU.

    Args:
        way: sparse, plain or emulated.
        case: which product, of which layer.
        dtype: of the operands.
        device: where the operands are that it gets.
        seed: of the data.

    Returns:
        Outcome: "not run" with the reasons where the case cannot run sparse.
    """
    line = (way, case.name, case.product, str(dtype).removeprefix("torch."), str(device))
    here = _operands(case, dtype, torch.Generator().manual_seed(seed))
    there = _map(here, lambda x: x.to(device))
    problem = there.problem(CONFIG)
    if way == "sparse" and (reasons := routes.LIBRARY.not_supported_reasons(problem)):
        return Outcome(*line, "not run", "; ".join(reasons))
    result = COMPUTE[way](there).cpu().double()
    gradient = here.grad_output if way == "plain" else here.pruned(CONFIG)
    wide = _map(replace(here, grad_output=gradient), lambda x: x.double())
    exact, size = wide.plain(), _map(wide, lambda x: x.abs()).plain()
    # A k x k convolution rounds every tap and then their sum; tokens past a multiple of 16 are a
    # second product. Both are at most two roundings of |a| @ |b|.
    plain = not case.kernel and case.product == "grad_input"
    reduced = problem.k * (case.kernel**2 or 1)
    bound = product_bound(size, exact, reduced, dtype, roundings=1 if plain else 2)
    found = compare(result.to(dtype), exact, bound)
    return Outcome(*line, "MISMATCH" if found else "ok", found.describe() if found else "")


def _map(operands: GradientOperands, change: Callable[[Tensor], Tensor]) -> GradientOperands:
    """Return the same product of tensors that ``change`` made."""
    changed: dict[str, Any] = {f.name: getattr(operands, f.name) for f in fields(operands)}
    for name, given in changed.items():
        changed[name] = change(given) if isinstance(given, Tensor) else given
    return type(operands)(**changed)


def _operands(case: Case, dtype: torch.dtype, generator: torch.Generator) -> GradientOperands:
    pad = case.kernel // 2
    shapes = _conv_shapes(case, pad) if case.kernel else _linear_shapes(case)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    if not case.kernel:
        output, weight, input = made
        if case.product == "grad_input":
            return LinearGradInput(output, weight)
        return LinearGradWeight(output, input)
    output, weight, input = (x.to(memory_format=torch.channels_last) for x in made)
    conv = ConvGeometry((case.stride, case.stride), (pad, pad), (1, 1), 1)
    if case.product == "grad_input":
        return Conv2dGradInput(output, weight, input, conv)
    return Conv2dGradWeight(output, input, weight, conv)


def _linear_shapes(case: Case) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    output, input = (case.tokens, case.outputs), (case.tokens, case.inputs)
    return output, (case.outputs, case.inputs), input


def _conv_shapes(case: Case, pad: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    edge = (_EDGE + 2 * pad - case.kernel) // case.stride + 1
    return (
        (case.tokens, case.outputs, edge, edge),
        (case.outputs, case.inputs, case.kernel, case.kernel),
        (case.tokens, case.inputs, _EDGE, _EDGE),
    )
