"""Published peaks and efficiencies of the GPUs that the planner knows, each with its source."""

import re
from dataclasses import dataclass

from sdgp_cusparselt.cards.efficiency import Curve, Efficiency

SLIDESPARSE = (
    "SlideSparse, arXiv 2603.05232; bf16 latency_SQUARE.csv at github.com/bcacdwk/vllmbench"
    "@92a8ca495 (cuBLASLt against cuSPARSELt 0.8.1, both exhaustively tuned, CUDA 12.9)"
)


@dataclass(frozen=True)
class GPU:
    """Data-sheet numbers of one GPU, and the efficiencies that were published for it.

    Args:
        name: what ``--gpu`` takes.
        tflops: dense bf16/fp16 tensor-core peak with fp32 accumulation, TFLOP/s. The 2:4 peak is
            twice that on each of these GPUs.
        bandwidth: memory bandwidth, GB/s.
        source: where the two numbers stand.
        published: fraction of the peak that dense and sparse GEMMs reached, by problem size.
    """

    name: str
    tflops: float
    bandwidth: float
    source: str
    published: Efficiency

    @property
    def sparse_tflops(self) -> float:
        """Peak of the 2:4 instruction in dense-equivalent TFLOP/s."""
        return 2 * self.tflops


def _squares(peak: float, dense_us: dict[int, float], sparse_us: dict[int, float]) -> Efficiency:
    """Turn latencies of n x n x n GEMMs into fractions of ``peak`` (TFLOP/s) and of twice it."""
    return Efficiency(
        dense=Curve.from_times([(n, n, n, us) for n, us in dense_us.items()], peak),
        sparse=Curve.from_times([(n, n, n, us) for n, us in sparse_us.items()], 2 * peak),
        source=SLIDESPARSE,
    )


# Latencies in microseconds as published. The card's own peak turns them into fractions: the H100
# there is the PCIe card, whose fractions then stand for the SXM card too.
_A100 = _squares(
    312,
    {512: 7.578, 1024: 19.108, 2048: 82.104, 4096: 586.342, 8192: 4758.282, 16384: 38038.734},
    {512: 8.438, 1024: 15.995, 2048: 69.632, 4096: 342.364, 8192: 3133.215, 16384: 31247.482},
)
_H100_PCIE = _squares(
    756,
    {512: 4.712, 1024: 7.801, 2048: 35.049, 4096: 289.463, 8192: 2592.415, 16384: 22274.043},
    {512: 7.880, 1024: 10.424, 2048: 36.077, 4096: 188.748, 8192: 1625.921, 16384: 15311.246},
)
_RTX4090 = _squares(
    165.2,
    {512: 11.837, 1024: 19.19, 2048: 105.779, 4096: 823.972, 8192: 6903.624, 16384: 57258.148},
    {512: 10.383, 1024: 13.105, 2048: 61.542, 4096: 447.058, 8192: 3433.861, 16384: 29111.461},
)
_B200 = _squares(
    2250,
    {512: 5.555, 1024: 6.086, 2048: 16.506, 4096: 90.918, 8192: 669.121, 16384: 5970.898},
    {512: 6.225, 1024: 7.350, 2048: 12.913, 4096: 56.618, 8192: 408.160, 16384: 3703.827},
)

GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", 312, 2039, "NVIDIA A100 80GB SXM data sheet", _A100),
        GPU(
            "H100",
            989.4,
            3350,
            "NVIDIA H100 SXM data sheet",
            _H100_PCIE.borrowed("fractions of an H100 PCIe, applied to the SXM peak"),
        ),
        GPU(
            "H200",
            989.4,
            4800,
            "NVIDIA H200 SXM data sheet",
            _H100_PCIE.borrowed("fractions of an H100 PCIe, the same architecture"),
        ),
        GPU(
            "L40S",
            362.05,
            864,
            "NVIDIA L40S data sheet",
            _A100.borrowed(
                "fractions of an A100: a guess, nothing is published for this card", guessed=True
            ),
        ),
        GPU(
            "RTX4090",
            165.2,
            1008,
            "NVIDIA Ada GPU architecture white paper, appendix A (fp32 accumulate)",
            _RTX4090,
        ),
        GPU("B200", 2250, 8000, "NVIDIA DGX B200 data sheet, divided by its 8 GPUs", _B200),
    )
}


def gpu_of(name: str) -> GPU | None:
    """Return the GPU that a name such as NVIDIA-A100-SXM4-80GB means; an A1000 is no A100."""
    for gpu in GPUS.values():
        # Names leave out or put in something between letters and digits: RTX 4090, RTX-4090.
        pattern = re.sub(r"(?<=\D)(?=\d)", r"[\\W_]*", gpu.name)
        if re.search(rf"{pattern}(?!\d)", name.upper()):
            return gpu
    return None
