"""decision_for: what ``SDGPConfig.tune`` says about a product that is about to run."""

from sdgp_cusparselt.backends.gemm import Gemm, SparseExecutor
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.tuning.decision import MATMUL, Decision, Key, Rival, dense_decision
from sdgp_cusparselt.tuning.search import prove_default, tune
from sdgp_cusparselt.tuning.store import TuningCache, default_cache
from sdgp_cusparselt.tuning.timing import Timer

UNDER_CAPTURE = "untuned under graph capture: run one step before capturing"
NOT_TUNED_YET = "not tuned yet: run sdgp tune"


def decision_for(
    gemm: Gemm,
    executor: SparseExecutor,
    config: SDGPConfig,
    *,
    method: str,
    transpose: bool,
    capturing: bool,
    rival: Rival = MATMUL,
    cache: TuningCache | None = None,
    timer: Timer | None = None,
) -> Decision:
    """Return which way a product runs now; after the first call a dictionary look-up.

    Args:
        gemm: the product.
        executor: what runs it sparsely.
        config: its ``tune`` policy: "first_use" tunes here and now, "ahead" only reads what
            ``sdgp tune`` stored, "never" proves the library's default algorithm once.
        method: how the left operand is pruned while it is packed.
        transpose: whether the packed operand is the transpose of the tensor at hand.
        capturing: whether a CUDA graph is being captured; then nothing may be tried out.
        rival: what the sparse path has to beat.
        cache: where decisions are; this process's own if None.
        timer: see ``tune``.

    Returns:
        Decision: ``use`` and ``reason``. A dense one under capture is not remembered.
    """
    cache = default_cache() if cache is None else cache
    policy, key = config.tune, Key(gemm, method, transpose, rival.name)
    known = cache.recall(policy, key)
    if known is not None:
        return known
    if policy != "never":
        known = cache.read(key, executor)
        if known is not None:
            return cache.remember(policy, known)
        if policy == "ahead":
            return cache.remember(policy, dense_decision(key, NOT_TUNED_YET, transient=True))
    if capturing:
        return dense_decision(key, UNDER_CAPTURE, transient=True)
    if policy == "never":
        found = prove_default(gemm, executor, method=method, transpose=transpose, rival=rival)
    else:
        found = tune(
            gemm,
            executor,
            cache=cache,
            method=method,
            transpose=transpose,
            rival=rival,
            timer=timer,
        )
    return cache.remember(policy, found)
