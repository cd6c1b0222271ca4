"""The rules of cuSPARSELt and of this package that a product may break, each as a sentence."""

import torch

from sdgp_cusparselt.backends.base import ConvGeometry, Problem
from sdgp_cusparselt.backends.plans import (
    DATA_TYPES,
    DENSE_MULTIPLE,
    RESULT_TYPES,
    STRUCTURED_MULTIPLE,
)
from sdgp_cusparselt.config.patterns import HARDWARE_PATTERNS

#: The library counts the elements of a matrix in 32 bits.
MAX_ELEMENTS = 2**31 - 1


def pattern_reasons(problem: Problem) -> list[str]:
    """Return why no sparse tensor core runs what the user chose; it is emulated then."""
    config, reasons = problem.config, []
    if problem.structured == "weight":
        if (config.weight_n, config.weight_m) not in HARDWARE_PATTERNS:
            reasons.append(f"a {config.weight_n}:{config.weight_m} weight is no 2:4 operand")
        if 0 < config.weight_beta < 1:
            reasons.append("mask decay (0 < weight_beta < 1) leaves no zeros to skip")
        return reasons
    if (config.n, config.m) not in HARDWARE_PATTERNS:
        reasons.append(f"{config.n}:{config.m} does not fit the 2:4 format")
    if config.decays and problem.product == "grad_input":
        reasons.append("mask decay (0 < beta < 1) leaves no zeros to skip")
    return reasons


def size_reasons(problem: Problem) -> list[str]:
    """Return what is wrong with dtype, sizes and the geometry of a convolution."""
    m, n, k, reasons = problem.m, problem.n, problem.k, []
    multiple = STRUCTURED_MULTIPLE
    if problem.dtype == torch.float32:
        reasons.append("float32 runs 1:2 on sparse tensor cores, not 2:4; use bfloat16 autocast")
    elif problem.dtype in RESULT_TYPES and problem.structured == "weight":
        multiple *= 2
    elif problem.dtype not in DATA_TYPES:
        reasons.append(f"{problem.dtype} is neither bfloat16 nor float16")
    if problem.structured == "weight":
        names = ("outputs", "inputs") if problem.product == "output" else ("inputs", "outputs")
        rules = tuple(
            (f"{letter} ({name})", value, multiple)
            for letter, name, value in zip("MK", names, (m, k), strict=True)
        )
    elif problem.product == "grad_input":
        rules = ("K (outputs)", k, STRUCTURED_MULTIPLE), ("N (inputs)", n, DENSE_MULTIPLE)
    else:
        rules = ("M (outputs)", m, STRUCTURED_MULTIPLE), ("N (inputs)", n, DENSE_MULTIPLE)
        if 0 < k < STRUCTURED_MULTIPLE:
            reasons.append(f"K (tokens) is {k}, fewer than {STRUCTURED_MULTIPLE}")
    for name, value, multiple in rules:
        if value % multiple:
            reasons.append(f"{name} is {value}, no multiple of {multiple}")
    if 0 in (m, n, k):
        reasons.append("the product is empty")
    if max(m * k, k * n, m * n) > MAX_ELEMENTS:
        reasons.append(f"a matrix has more than {MAX_ELEMENTS} elements")
    return reasons + (_conv_reasons(problem, problem.conv) if problem.conv else [])


def memory_reasons(problem: Problem) -> list[str]:
    """Return what is wrong with how the operands lie in memory."""
    if problem.conv is not None and not problem.channels_last:
        fix = "use model.to(memory_format=torch.channels_last)"
        operand = "input" if problem.product == "output" else "grad_output"
        return [f"{operand} is not channels_last; {fix}"]
    # Only grad_weight's tokens may end between two rows of the operand: those are cut off.
    if problem.dense_order is None or (problem.product, problem.dense_order) == (
        "grad_weight",
        "col",
    ):
        return ["the dense operand would have to be copied: it is strided or not aligned"]
    return []


def _conv_reasons(problem: Problem, conv: ConvGeometry) -> list[str]:
    reasons = []
    if conv.groups != 1:
        reasons.append(f"the convolution has {conv.groups} groups")
    if problem.structured == "weight" and conv.stride != (1, 1):
        reasons.append("a strided convolution would copy the pixels that it reads")
    if problem.kernel_size != (1, 1) or conv.padding != (0, 0):
        # Columns that overlap are written, read and added up: 110 bytes for each input element.
        reasons.append("only an unpadded 1x1 convolution is one product with nothing to add up")
    return reasons
