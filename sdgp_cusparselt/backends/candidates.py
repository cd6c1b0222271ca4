"""Which ways of running a product are offered: in this process, or only in one that may hang."""

from sdgp_cusparselt.backends.gemm import Candidate, Gemm

#: Segment-K (split_k = -1) may hang on sm90 with fewer sparse rows than about 400.
SEGMENT_K_ROWS = 1024
HEURISTIC, DATA_PARALLEL, STREAM_K = 3, 4, 6  # SplitKMode, sm100 and later
#: Algorithms that were run and measured on an architecture by others, best ones after the
#: default; on sm8x that is all of them. Any other one may hang or end the CUDA context.
MEASURED = {9: (0, 17, 20, 12, 11)}


def offered(gemm: Gemm, count: int, major: int, *, safe: bool) -> list[Candidate]:
    """Return ways of running gemm, the library's default algorithm first.

    Args:
        gemm: the product.
        count: how many algorithm ids the library has for it.
        major: compute capability, major number.
        safe: only what may be tried in this process; else also segment-K and algorithms that
            nobody was seen to run, which need a process of their own and a time limit.
    """
    ids = list(range(count))
    if safe and major >= 9:
        ids = [i for i in MEASURED.get(major, (0,)) if i < count]
    found = [Candidate(i) for i in ids]
    if major >= 10:
        modes = (HEURISTIC, DATA_PARALLEL, STREAM_K)
        found += [Candidate(i, split_k_mode=mode) for i in ids for mode in modes]
    elif major == 9 and not safe and gemm.m >= SEGMENT_K_ROWS:
        found += [Candidate(i, -1) for i in ids]
    elif major < 9 and gemm.k >= 4 * max(gemm.m, gemm.n):
        found += [Candidate(i, split) for split in (2, 4) for i in ids]
    return found
