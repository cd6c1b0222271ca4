"""Arguments of every operator that the package registers, by name: see ``torch.library.opcheck``.

A second word tells samples of one operator apart.
"""

from typing import Any

import torch

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.packing.layout import PLAIN
from sdgp_cusparselt.products import head_operators, operators, produced, stored_operators
from sdgp_cusparselt.products import weight_operators as weights
from sdgp_cusparselt.recording.records import LayerRecord
from sdgp_cusparselt.weights import nm_mask

CONFIG = sdgp.SDGPConfig(prune="magnitude")
SPARSE = CONFIG.replace(grad_weight="sparse", grad_weight_prune="magnitude")
WEIGHT = sdgp.SDGPConfig(prune="none", forward="sparse_weight", grad_input="weight")
GEOMETRY = operators.flat_geometry(ConvGeometry((2, 2), (1, 1), (1, 1), 1))
LAST = torch.channels_last
RECORD = LayerRecord()
# Registered by importing them.
MODULES = (head_operators, operators, produced, stored_operators, weights)

Samples = dict[str, tuple[Any, ...]]


def samples() -> Samples:
    """Return name -> arguments, fresh tensors each time."""
    return gradient_samples() | weight_samples() | stored_samples() | fused_samples()


def gradient_samples() -> Samples:
    input = torch.randn(2, 8, 6, 6).to(memory_format=LAST)
    weight, grad_output = torch.randn(16, 8, 3, 3), torch.randn(2, 16, 3, 3)
    where, sparse = (CONFIG.text, RECORD.token), (SPARSE.text, RECORD.token)
    dense = torch.randn(30, 64).bfloat16()
    return {
        "prune": (torch.randn(6, 8), "magnitude", 2, 4, -1),
        "prune none": (torch.randn(6, 8), "none", 2, 4, -1),
        "pack": (torch.randn(32, 64).bfloat16(), "magnitude", False, PLAIN.to_json()),
        "pack transposed": (torch.randn(40, 64).bfloat16(), "magnitude", True, PLAIN.to_json()),
        "matmul": (
            sdgp.packing.pack(dense, layout=PLAIN).buffer,
            torch.randn(64, 24).bfloat16(),
            30,
            PLAIN.to_json(),
        ),
        "linear_grad_input": (torch.randn(2, 3, 8), torch.randn(8, 12), *where),
        "linear_grad_weight": (torch.randn(6, 8), torch.randn(6, 12), True, *sparse),
        "linear_grads": (torch.randn(2, 3, 8), torch.randn(8, 12), torch.randn(6, 12), *sparse),
        "conv2d_grad_input": (grad_output, weight, input, GEOMETRY, *where),
        "conv2d_grad_weight": (
            grad_output, input, weight.to(memory_format=LAST), GEOMETRY, *sparse
        ),
    }  # fmt: skip


def weight_samples() -> Samples:
    """A pruned weight's, with a mask and without one, which is found by magnitude."""
    where = WEIGHT.text, RECORD.token
    weight, kernel = torch.randn(8, 12), torch.randn(16, 8, 3, 3)
    mask, bias = nm_mask(weight, 2, 4), torch.randn(8)
    input, grad_output = torch.randn(2, 8, 6, 6).to(memory_format=LAST), torch.randn(2, 16, 3, 3)
    linear = torch.randn(2, 3, 12), weight
    return {
        "linear_output": (*linear, bias, None, False, *where),
        "linear_output masked": (*linear, None, mask, True, *where),
        "linear_weight_grad_input": (torch.randn(2, 3, 8), weight, None, None, False, *where),
        "linear_weight_grad_input masked": (
            torch.randn(2, 3, 8), weight, mask, None, True, *where
        ),
        "conv2d_output": (input, kernel, torch.randn(16), None, GEOMETRY, False, *where),
        "conv2d_weight_grad_input": (
            grad_output, kernel, None, None, input, GEOMETRY, False, *where
        ),
        "pruned_weight": (weight, None, weight.bfloat16(), False, WEIGHT.text),
        "pruned_weight masked": (weight, mask, weight, True, WEIGHT.text),
    }  # fmt: skip


def stored_samples() -> Samples:
    """Of a weight that exists packed alone, in 16 bits and in 8 with a scale a row."""
    config, layout = WEIGHT.text, PLAIN.to_json()
    sizes = 32, 64
    wide = sdgp.packing.pack(torch.randn(sizes).bfloat16(), layout=PLAIN).buffer
    eight = torch.randint(-127, 128, sizes, dtype=torch.int8)
    narrow = sdgp.packing.pack(eight, layout=PLAIN).buffer
    input, scale = torch.randn(2, 3, 64).bfloat16(), torch.rand(32)
    bias = torch.randn(32).bfloat16()
    of_wide, of_narrow = (*sizes, torch.bfloat16, layout), (*sizes, torch.int8, layout)
    return {
        "packed_linear": (input, wide, None, bias, *of_wide, config, RECORD.token),
        "packed_linear int8": (input, narrow, scale, None, *of_narrow, config, RECORD.token),
        "packed_weight": (wide, None, *of_wide, input),
        "packed_weight int8": (narrow, scale, *of_narrow, input),
    }


def fused_samples() -> Samples:
    """Of an activation with the layers before it, and of a head with its loss."""
    input, head = torch.randn(9, 8), torch.randn(70, 8)
    bias, target, lse = torch.randn(70), torch.randint(70, (9,)), torch.zeros(9)
    objective = 0.1, 0.01, -100, 64
    wants = True, True, False, torch.float32
    upstream, pre, up = (torch.randn(6, 16) for _ in range(3))
    layers = [torch.randn(16, 12), torch.randn(16, 12)], [torch.randn(6, 12)] * 2
    return {
        "head_losses": (input, head, bias, target, *objective),
        "head_gradients": (
            input, head, bias, target, lse, lse, *objective, *wants, CONFIG.text, RECORD.token
        ),
        "activated_linear_grads": (
            "gelu", upstream, pre, None, None, 1.0, layers[0][:1], layers[1][:1], [True] * 3,
            [True], SPARSE.text, [RECORD.token],
        ),
        "activated_linear_grads gated": (
            "silu", upstream, pre, up, None, 1.0, *layers, [True] * 6, [True] * 2, SPARSE.text,
            [RECORD.token] * 2,
        ),
    }  # fmt: skip
