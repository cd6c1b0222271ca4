"""The rules of cuSPARSELt and of this backend that a product may break, each as a sentence."""

import torch

from sdgp_cusparselt.backends.base import ConvGeometry, Problem
from sdgp_cusparselt.backends.plans import DATA_TYPES, DENSE_MULTIPLE, STRUCTURED_MULTIPLE
from sdgp_cusparselt.config.patterns import HARDWARE_PATTERNS

#: The library counts the elements of a matrix in 32 bits.
MAX_ELEMENTS = 2**31 - 1


def pattern_reasons(problem: Problem) -> list[str]:
    """Return what is wrong with the dtype and the N:M pattern."""
    config, reasons = problem.config, []
    if problem.dtype == torch.float32:
        reasons.append("float32 runs 1:2 on sparse tensor cores, not 2:4; use bfloat16 autocast")
    elif problem.dtype not in DATA_TYPES:
        reasons.append(f"{problem.dtype} is neither bfloat16 nor float16")
    if (config.n, config.m) not in HARDWARE_PATTERNS:
        reasons.append(f"{config.n}:{config.m} does not fit the 2:4 format; it is emulated")
    if config.decays and problem.product == "grad_input":
        reasons.append("mask decay (0 < beta < 1) leaves no zeros to skip; it is emulated")
    return reasons


def shape_reasons(problem: Problem) -> list[str]:
    """Return what is wrong with the sizes, and with the geometry of a convolution."""
    m, n, k, reasons = problem.m, problem.n, problem.k, []
    if problem.product == "grad_input":
        rules = (("K (outputs)", k, STRUCTURED_MULTIPLE), ("N (inputs)", n, DENSE_MULTIPLE))
    else:
        rules = (("M (outputs)", m, STRUCTURED_MULTIPLE), ("N (inputs)", n, DENSE_MULTIPLE))
        if k < STRUCTURED_MULTIPLE:
            reasons.append(f"K (tokens) is {k}, fewer than {STRUCTURED_MULTIPLE}")
    for name, value, multiple in rules:
        if value % multiple:
            reasons.append(f"{name} is {value}, no multiple of {multiple}")
    if 0 in (m, n, k):
        reasons.append("the product is empty")
    if max(m * k, k * n, m * n) > MAX_ELEMENTS:
        reasons.append(f"a matrix has more than {MAX_ELEMENTS} elements")
    return reasons + (_conv_reasons(problem, problem.conv) if problem.conv else [])


def _conv_reasons(problem: Problem, conv: ConvGeometry) -> list[str]:
    reasons = []
    if conv.groups != 1:
        reasons.append(f"the convolution has {conv.groups} groups")
    if not problem.channels_last:
        reasons.append(
            "grad_output is not channels_last; use model.to(memory_format=torch.channels_last)"
        )
    if problem.product == "grad_weight" and (
        problem.kernel_size != (1, 1) or conv.padding != (0, 0)
    ):
        reasons.append("only an unpadded 1x1 convolution has grad_weight as one product")
    return reasons
