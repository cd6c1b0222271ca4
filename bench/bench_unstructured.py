"""Unstructured sparsity as the reference: CSR SpMM at 50 to 95 %, beside the dense product.

    PYTHONPATH=.:bindings python -m pytest bench/bench_unstructured.py -k cpu

Pietron and Zurek ask when unstructured sparsity pays on a GPU; this shows where each wins. The
largest values of the whole matrix are kept. ``csr_gemm`` is the product alone, ``csr_grad_input``
the conversion to CSR with it; finding the threshold is given for free.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.contender import Contender, Work, measure, parameters
from bench.operands import operands
from bench.shapes import Case, Selection, linear_cases
from bench.verify import product

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
#: CSR products are slow and their conversion takes memory; these layers stand for the others.
LAYERS = (("llama-3-8b", "attn.q"), ("gpt2-medium", "mlp.down"))
INDEX_BYTES = 4


def _masked(x: Tensor, sparsity: float) -> Tensor:
    """Keep the largest values of all of x; the threshold is of a sample, as a sort is slow."""
    sample = x.flatten()[:: max(1, x.numel() >> 20)].abs().float()
    return torch.where(x.abs() >= sample.quantile(sparsity), x, torch.zeros_like(x))


def _short_indices(csr: Tensor) -> Tensor:
    """Return the same matrix with 32-bit indices, half the traffic."""
    indices = (csr.crow_indices().int(), csr.col_indices().int())
    return torch.sparse_csr_tensor(*indices, csr.values(), csr.shape)


def _prepare(sparsity: float, conversion: bool) -> Callable[[Case], Work]:
    def prepare(case: Case) -> Work:
        data = operands(case)
        masked, weight = _masked(data.grad_output, sparsity), data.weight
        csr = _short_indices(masked.to_sparse_csr())
        kept = csr.values().numel()
        expected = product(masked, weight, "the dense product of what was kept")
        m, n, k = case.sizes("grad_input")
        size = case.dtype.itemsize
        return Work(
            (lambda: masked.to_sparse_csr() @ weight) if conversion else (lambda: csr @ weight),
            expected.check,
            data.dense("grad_input"),
            "torch.mm",
            flops=2 * m * n * k,
            nbytes=(size + INDEX_BYTES) * kept + size * (k * n + m * n),
            info={"sparsity": 1 - kept / masked.numel()},
        )

    return prepare


def _contenders(case: Case) -> list[Contender]:
    return [
        Contender(
            "csr_grad_input" if conversion else "csr_gemm",
            f"CSR {sparsity:.0%}",
            _prepare(sparsity, conversion),
            lambda c: c.sizes("grad_input"),
            rival=True,
        )
        for conversion in (False, True)
        for sparsity in SPARSITIES
    ]


def pairs(selection: Selection) -> list[object]:
    gpu, cpu = [], []
    for case in linear_cases(selection):
        if case.device_type == "cpu":
            cpu.append(replace(case, dtype=torch.float32))  # a CPU multiplies no 16-bit CSR
        elif case.with_rivals and (case.model, case.layer) in LAYERS[not selection.full :]:
            gpu.append(case)
    return parameters([*gpu, *cpu[:1]], _contenders)


def test_unstructured(request: pytest.FixtureRequest, case: Case, contender: Contender) -> None:
    """Time one CSR product after its result is checked."""
    measure(request, case, contender)
