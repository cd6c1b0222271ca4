"""Does a backend compute what float64 says? One product of one layer at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdgp_cusparselt.backends.base import Backend, ConvGeometry, Problem, Product
from sdgp_cusparselt.backends.dense import (
    dense_conv2d_grad_input,
    dense_conv2d_grad_parameters,
    pruned_gradient,
)
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.equivalence import compare, product_bound

#: Deterministic pruning, so that there is one right result.
CONFIG = SDGPConfig(prune="magnitude", grad_weight="sparse", grad_weight_prune="magnitude")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    """What one backend did with one case.

    Attributes:
        backend, case, product, dtype, device: what was run, in words.
        status: ok, MISMATCH or "not run".
        detail: which element is worst, or why it was not run.
    """

    backend: str
    case: str
    product: str
    dtype: str
    device: str
    status: str
    detail: str = ""


@dataclass(frozen=True)
class _Layer:
    """Operands of a case on the CPU, and the problem that they make."""

    problem: Problem
    grad_output: Tensor
    weight: Tensor
    input: Tensor


def check(
    backend: Backend, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Outcome:
    """Return how one backend's product compares with float64 on the CPU.

    Args:
        backend: what computes.
        case: which product, of which layer.
        dtype: of the operands.
        device: where the backend's operands are.
        seed: of the data.

    Returns:
        Outcome: "not run" with the reasons where the backend does not support the case.
    """
    line = (backend.name, case.name, case.product, str(dtype).removeprefix("torch."), str(device))
    layer = _layer(case, dtype, device, torch.Generator().manual_seed(seed))
    reasons = backend.not_supported_reasons(layer.problem)
    if reasons:
        return Outcome(*line, "not run", "; ".join(reasons))
    result = _computed(backend, layer, device).cpu().double()
    pruned = pruned_gradient(layer.problem, layer.grad_output).double()
    weight, input = layer.weight.double(), layer.input.double()
    exact = _exact(layer.problem, pruned, weight, input)
    size = _exact(layer.problem, pruned.abs(), weight.abs(), input.abs())
    # A k x k convolution rounds every tap and then their sum; tokens past a multiple of 16 are a
    # second product. Both are at most two roundings of |a| @ |b|.
    plain = not case.kernel and case.product == "grad_input"
    reduced = layer.problem.k * (case.kernel**2 or 1)
    bound = product_bound(size, exact, reduced, dtype, roundings=1 if plain else 2)
    found = compare(result.to(dtype), exact, bound)
    return Outcome(*line, "MISMATCH" if found else "ok", found.describe() if found else "")


def _layer(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> _Layer:
    conv, output, weight, input = None, *_linear_shapes(case)
    if case.kernel:
        pad = case.kernel // 2
        conv = ConvGeometry((case.stride, case.stride), (pad, pad), (1, 1), 1)
        output, weight, input = _conv_shapes(case, pad)
    operands = [torch.randn(s, generator=generator).to(dtype) for s in (output, weight, input)]
    if conv is not None:
        operands = [t.to(memory_format=torch.channels_last) for t in operands]
    rows = operands[0].numel() // case.outputs
    columns = operands[1][0].numel()
    sizes = (rows, columns, case.outputs)
    if case.product == "grad_weight":
        sizes = (case.outputs, columns, rows)
    kernel = (case.kernel or 1, case.kernel or 1)
    problem = Problem(case.product, *sizes, dtype, device, CONFIG, conv, kernel)
    return _Layer(problem, *operands)


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


def _computed(backend: Backend, layer: _Layer, device: torch.device) -> Tensor:
    grad_output, weight, input = (
        t.to(device) for t in (layer.grad_output, layer.weight, layer.input)
    )
    problem, conv = layer.problem, layer.problem.conv
    if conv is None and problem.product == "grad_input":
        return backend.linear_grad_input(grad_output, weight, CONFIG)
    if conv is None:
        return backend.linear_grad_weight(grad_output, input, CONFIG)
    if problem.product == "grad_input":
        return backend.conv2d_grad_input(grad_output, weight, input, conv, CONFIG)
    return backend.conv2d_grad_weight(grad_output, input, weight, conv, CONFIG)


def _exact(problem: Problem, grad_output: Tensor, weight: Tensor, input: Tensor) -> Tensor:
    """Return the product in float64 from a gradient that is pruned already."""
    conv = problem.conv
    if conv is None and problem.product == "grad_input":
        return grad_output @ weight
    if conv is None:
        return grad_output.t() @ input
    if problem.product == "grad_input":
        return dense_conv2d_grad_input(grad_output, weight, input, conv)
    grads = dense_conv2d_grad_parameters(grad_output, input, weight, conv, (True, False))
    assert grads[0] is not None  # it was asked for
    return grads[0]
