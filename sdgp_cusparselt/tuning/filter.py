"""What cannot win is not searched for: the roofline of the card at hand, with room for its errors.

A product that is left out here is never measured, and one that is searched for in vain costs two
seconds once. So only what is far behind by the prediction is left out.
"""

from sdgp_cusparselt.backends.gemm import Gemm
from sdgp_cusparselt.cards.efficiency import gemm_size
from sdgp_cusparselt.cards.gpus import gpu_of
from sdgp_cusparselt.cards.times import dense_us, pack_us, sparse_us
from sdgp_cusparselt.tuning.decision import LINEAR, MATMUL

#: How much slower than plain the sparse path must be predicted, packing included. A prediction
#: that is this far off at a shape has the two published speeds and the bandwidth wrong by half of
#: what sparse tensor cores gain.
HOPELESS = 1.25


def cannot_win(gemm: Gemm, card: str, rival: str) -> str:
    """Return why the sparse path has no chance, or "" where it has or nothing is known.

    Args:
        gemm: [M, N] = [M, K] @ [K, N].
        card: name of the GPU; nothing is said about one whose speeds are not published.
        rival: name of what the sparse path has to beat.
    """
    if rival.split()[0] not in (MATMUL.name, LINEAR.name):
        return "a k x k convolution: adding columns up moves more than sparse tensor cores save"
    gpu = gpu_of(card)
    if gpu is None or gpu.published.guessed:
        return ""
    m, n, k = gemm.m, gemm.n, gemm.k
    flops, size, elements = 2 * m * n * k, gemm_size(m, n, k), (m * k, k * n, m * n)
    plain = dense_us(gpu, gpu.published, flops, size, elements)
    product = sparse_us(gpu, gpu.published, flops, size, elements)
    path = product + (0.0 if gemm.packed_ahead else pack_us(gpu, gpu.published, m * k))
    if path < HOPELESS * plain and product < plain:
        return ""
    return (
        f"it cannot win on {gpu.name}: {path:.0f} us are predicted "
        f"{'with the weight packed ahead' if gemm.packed_ahead else 'with pruning and packing'}, "
        f"{plain:.0f} us for the plain product"
    )
