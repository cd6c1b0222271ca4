"""Token counts of one bucket share a decision: ever new lengths are not tuned at every step.

Buckets end at 64, 96, 128, 192, 256, ...: powers of two and one and a half times them. Whoever
trains with a fixed batch of a usual size meets the top of a bucket, which is what was measured.
Anything else in it has at least two thirds of the top's tokens. Over such a range the ratio of
sparse to plain hardly moves: tokens cancel out of the inequality of docs/when-is-it-faster.md.
"""

from dataclasses import replace

from sdgp_cusparselt.backends.gemm import Gemm
from sdgp_cusparselt.backends.reasons import MAX_ELEMENTS

#: Below this a product costs its launches, whatever its size.
SMALLEST = 64


def bucket(tokens: int) -> int:
    """Return the top of the bucket that ``tokens`` fall into; 0 for none."""
    if tokens <= SMALLEST:
        return SMALLEST if tokens else 0
    power = 1 << (tokens - 1).bit_length()
    between = power // 4 * 3
    return between if tokens <= between else power


def bucket_of(gemm: Gemm, transpose: bool) -> Gemm:
    """Return the product that is measured in place of ``gemm``.

    Args:
        gemm: [M, N] = [M, K] @ [K, N].
        transpose: the packed operand is a transpose, as for grad_weight: tokens are K, else M. Of
            a weight that is packed ahead they are N.

    Returns:
        ``gemm`` with the top of its bucket as its tokens; itself where a matrix of that size would
        have more elements than the library counts.
    """
    if gemm.packed_ahead:
        top = replace(gemm, n=bucket(gemm.n))
    else:
        top = replace(gemm, k=bucket(gemm.k)) if transpose else replace(gemm, m=bucket(gemm.m))
    fits = max(top.m * top.k, top.k * top.n, top.m * top.n) <= MAX_ELEMENTS
    return top if fits else gemm
