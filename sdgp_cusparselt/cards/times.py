"""Predicted microseconds of one product and of its packing: the roofline, from published numbers.

t = max(flops / (peak * efficiency(size)), bytes / (bandwidth * efficiency))
"""

from sdgp_cusparselt.cards.efficiency import Efficiency
from sdgp_cusparselt.cards.gpus import GPU

BYTES = 2  # bf16 and fp16
#: Values (one of two bytes) and metadata (a nibble for four elements) of a 2:4 operand.
PACKED_BYTES = 1.125


def dense_us(
    gpu: GPU, efficiency: Efficiency, flops: float, size: float, elements: tuple[int, int, int]
) -> float:
    """Predict a dense product.

    Args:
        gpu: peak and bandwidth.
        efficiency: fractions of them that kernels reach.
        flops: multiply-adds counted as two.
        size: edge of the cube with as many multiply-adds.
        elements: of the left operand, the right operand and the result.

    Returns:
        Microseconds.
    """
    arithmetic = flops / (gpu.tflops * 1e6 * efficiency.dense.at(size))
    return max(arithmetic, stream_us(gpu, efficiency, BYTES * sum(elements)))


def sparse_us(
    gpu: GPU, efficiency: Efficiency, flops: float, size: float, elements: tuple[int, int, int]
) -> float:
    """Predict the product of a packed left operand; see ``dense_us``."""
    left, right, result = elements
    arithmetic = flops / (gpu.sparse_tflops * 1e6 * efficiency.sparse.at(size))
    moved = PACKED_BYTES * left + BYTES * (right + result)
    return max(arithmetic, stream_us(gpu, efficiency, moved))


def pack_us(gpu: GPU, efficiency: Efficiency, elements: int) -> float:
    """Predict pruning and packing ``elements`` elements: read once, written packed."""
    return stream_us(gpu, efficiency, (BYTES + PACKED_BYTES) * elements) + efficiency.launch_us


def stream_us(gpu: GPU, efficiency: Efficiency, nbytes: float) -> float:
    """Predict moving ``nbytes`` at the bandwidth that streaming kernels reach."""
    return nbytes / (gpu.bandwidth * 1e3 * efficiency.bandwidth)


def fused_pack_us(gpu: GPU, efficiency: Efficiency, elements: int, *, both: bool) -> float:
    """Predict what packing adds to the kernel that makes the gradient, an activation's backward.

    That reads 4 bytes an element and writes 2 whether it packs or not. Packing one way it writes
    1.125 more: 7.125 instead of 9.125 with a pass of its own. Packing both ways, for two sparse
    products, it need not write the gradient itself: 6.25 instead of 10.25.

    Args:
        gpu: bandwidth.
        efficiency: fraction of it that kernels reach.
        elements: of the gradient.
        both: along features and along tokens.
    """
    added = 2 * PACKED_BYTES - BYTES if both else PACKED_BYTES
    return stream_us(gpu, efficiency, added * elements)


def both_packs_us(gpu: GPU, efficiency: Efficiency, elements: int) -> float:
    """Predict packing along features and along tokens from one read."""
    nbytes = (BYTES + 2 * PACKED_BYTES) * elements
    return stream_us(gpu, efficiency, nbytes) + efficiency.launch_us
