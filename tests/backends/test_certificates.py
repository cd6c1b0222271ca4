"""Which packer feeds a plan, and that the plan is what was asked for, against the emulator."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends import certificates, plans
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.errors import CusparseLtError
from sdgp_cusparselt.packing import certify, trials
from sdgp_cusparselt.products import dispatch, packers, routes
from sdgp_cusparselt.products.operands import LinearGradInput, LinearGradWeight
from sdgp_cusparselt.products.sparse import sparse_product
from sdgp_cusparselt.recording.records import LayerRecord
from sdgp_cusparselt.tuning import proof
from tests.emulator.control import Bad, Emulator
from tests.helpers import assert_product, oracle_magnitude

CONFIG = sdgp.SDGPConfig(prune="magnitude")
CPU = torch.device("cpu")
BF16 = torch.bfloat16


def right(backend: CusparseLtBackend, tokens: int = 256, k: int = 64, n: int = 32) -> Tensor:
    """A product that must be the dense one, whoever packed it."""
    grad_output, weight = torch.randn(tokens, k).bfloat16(), torch.randn(k, n).bfloat16()
    result = sparse_product(backend, LinearGradInput(grad_output, weight), CONFIG)
    assert_product(result, oracle_magnitude(grad_output, 2, 4, 1), weight)
    return result


LAYOUTS = ["plain", "blocked", "sm90_atom", "sm90_interleaved", "sm90_published", "random"]


@pytest.mark.parametrize("full_sizes", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_proven_order_needs_the_library_no_more(
    backend: CusparseLtBackend, emulator: Emulator, layout: str, full_sizes: bool
) -> None:
    emulator.layout(layout, seed=11)
    emulator.full_sizes(full_sizes)
    right(backend, 272, 96)
    (certificate,) = backend.certificates.known().values()
    assert certificate.packer == "ours", certificate.reason
    learned = emulator.calls("cusparseLtSpMMACompress")
    for _ in range(3):
        right(backend, 272, 96)
    another = CusparseLtBackend(backend.machine)
    right(another, 272, 96)
    assert emulator.calls("cusparseLtSpMMACompress") == learned  # the proof was kept on disk
    another.plans.clear()


def test_what_is_not_proven_is_left_to_the_library(
    backend: CusparseLtBackend, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certify, "prove", lambda *a, **k: (None, "one element differs"))
    for _ in range(2):
        before = emulator.calls("cusparseLtSpMMACompress")
        right(backend, 48)
        assert emulator.calls("cusparseLtSpMMACompress") > before
    (certificate,) = backend.certificates.known().values()
    assert certificate.packer == "library" and "one element differs" in certificate.reason


def test_an_order_that_depends_on_the_width_is_proven_for_each(
    backend: CusparseLtBackend, emulator: Emulator
) -> None:
    emulator.layout("random", seed=1)
    emulator.layout_of_width(48, "random", seed=2)
    emulator.layout_of_width(48, "random", seed=2)
    for n in (32, 48, 64, 48, 32):
        right(backend, 256, 128, n)
    found = {gemm.n: c.layout for (gemm, _), c in backend.certificates.known().items()}
    assert set(found) == {32, 48, 64} and None not in found.values()
    assert found[32] == found[64] != found[48]


@pytest.mark.parametrize("layout", ["blocked", "random"])
def test_an_order_may_depend_on_everything_that_tells_plans_apart(
    backend: CusparseLtBackend, emulator: Emulator, layout: str
) -> None:
    emulator.layout(layout, seed=3)
    emulator.layout_per_plan(layout == "random")
    x, dense = torch.randn(256, 64).bfloat16(), torch.randn(64, 40).bfloat16()
    pruned = oracle_magnitude(x, 2, 4, 1)
    for order, right_operand in (("row", dense), ("col", dense.t().contiguous().t())):
        gemm = Gemm(256, 40, 64, BF16, order, CPU)  # type: ignore[arg-type]
        for candidate in (Candidate(0), Candidate(1), Candidate(1, 4), Candidate(1, 2, 2, 1)):
            packed = backend.pack(x, gemm, candidate, method="magnitude")
            assert_product(backend.matmul(packed, right_operand, gemm, candidate), pruned, dense)
    known = backend.certificates.known()
    assert len(known) == 8 and all(c.proven for c in known.values())
    names = {certificates.plan_name(gemm, candidate) for gemm, candidate in known}
    assert len(names) == 8


def test_a_plan_that_multiplies_wrongly_proves_nothing(
    backend: CusparseLtBackend, emulator: Emulator
) -> None:
    emulator.bad_algorithm(1, Bad.ALWAYS_WRONG)
    gemm = Gemm(64, 32, 64, BF16, "row", CPU)
    refused = backend.certificate(gemm, Candidate(1))
    assert refused.packer == "library" and "product in 'plain'" in refused.reason
    assert backend.certificate(gemm, Candidate(0)).proven
    emulator.bad_algorithm(2, Bad.FAILS_AT_MATMUL)
    with pytest.raises(CusparseLtError, match="cusparseLtMatmul failed"):
        backend.certificate(gemm, Candidate(2))
    assert (gemm, Candidate(2)) not in backend.certificates.known()


@pytest.mark.parametrize("order", ["row", "col"])
@pytest.mark.parametrize("k", [16, 512])
def test_the_exact_product_sees_one_wrong_byte(
    backend: CusparseLtBackend, order: str, k: int
) -> None:
    gemm = Gemm(48, 24, k, BF16, order, CPU)  # type: ignore[arg-type]
    planned = backend.plans.get(gemm, Candidate(0))
    check = certificates.product_check(planned, gemm)
    left = trials.two_of_four(48, k, BF16, CPU, torch.Generator().manual_seed(1))
    packed = backend.compress(left, gemm, Candidate(0))
    assert check(packed, left) is None
    packed[48 * k] ^= 0x1  # another index in one group
    assert "out of bound" in str(check(packed, left))


def test_nothing_is_proven_under_capture(
    backend: CusparseLtBackend, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemm = Gemm(64, 32, 64, BF16, "row", CPU)
    with monkeypatch.context() as capturing:
        capturing.setattr(certificates, "is_capturing", lambda device: True)
        answer = backend.certificate(gemm, Candidate(0))
    assert answer.reason == certificates.NOT_YET and answer.packer == "library"
    assert emulator.calls("cusparseLtMatmulPlanInit") == 0 and not backend.certificates.known()
    assert backend.certificate(gemm, Candidate(0)).proven
    monkeypatch.setattr(certificates, "is_capturing", lambda device: True)
    assert backend.certificate(gemm, Candidate(0)).proven


@pytest.mark.parametrize("compared", [True, False])
def test_a_kernel_that_disagrees_is_not_used(
    backend: CusparseLtBackend, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, compared: bool
) -> None:
    asked = []

    def fault(x: Tensor, **wanted: object) -> str | None:
        asked.append((wanted["features"], wanted["tokens"]))
        return None if compared else "it differs in 3 bytes"

    monkeypatch.setattr(packers, "packer_fault", fault)
    monkeypatch.setattr(routes, "LIBRARY", backend)
    config = CONFIG.replace(grad_weight="sparse", grad_weight_prune="magnitude", tune="never")
    grad_output, weight = torch.randn(64, 32).bfloat16(), torch.randn(32, 16).bfloat16()
    input = torch.randn(64, 16).bfloat16()
    first, second = LinearGradInput(grad_output, weight), LinearGradWeight(grad_output, input)
    record = LayerRecord("here")
    for _ in range(2):
        dispatch.run_both(first, second, config, record)
    before = emulator.calls("cusparseLtSpMMACompress")
    for_input, for_weight = dispatch.run_both(first, second, config, record)
    used = emulator.calls("cusparseLtSpMMACompress") - before
    assert used == (0 if compared else 2)
    assert (("magnitude", "magnitude") in asked) == compared
    assert_product(for_input, oracle_magnitude(grad_output, 2, 4, 1), weight)
    assert_product(for_weight, oracle_magnitude(grad_output, 2, 4, 0).t(), input)


class Widest(TorchDispatchMode):
    """Remembers the largest tensor made in a dtype wider than the operands'."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor) and made.element_size() > 2:
                self.elements = max(self.elements, made.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("layout", ["blocked", "random"])
def test_proofs_widen_one_block_at_a_time(
    backend: CusparseLtBackend, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """No float32, int32 or int64 copy of an operand, learning included."""
    emulator.layout(layout, seed=7)
    monkeypatch.setattr(trials, "BLOCK", 1 << 14)
    rows, cols, n = 512, 512, 128
    # Tables of the learned order are int32, one per group and one per nibble.
    allowed = max(4 * trials.BLOCK, 2 * rows * cols // 4)
    sizes, real = [], trials.prune
    monkeypatch.setattr(
        trials, "prune", lambda x, **how: (sizes.append(x.numel()), real(x, **how))[1]
    )
    with Widest() as widest:
        found = backend.certificate(Gemm(rows, n, cols, BF16, "row", CPU), Candidate(0))
    assert found.proven and (found.probes > 0) == (layout == "random")
    assert 0 < widest.elements <= allowed < rows * cols
    assert 0 < max(sizes) <= trials.BLOCK  # pruning in plain torch may widen


@pytest.mark.parametrize("method, transpose", [("magnitude", False), ("mvue", True)])
def test_trials_widen_one_block_at_a_time(
    monkeypatch: pytest.MonkeyPatch, method: str, transpose: bool
) -> None:
    """As proofs do; only the rows of a result that are compared are float32."""
    monkeypatch.setattr(trials, "BLOCK", 1 << 12)
    gemm = Gemm(512, 512, 512, BF16, "col", CPU)
    with Widest() as widest:
        made = list(proof.trials(gemm, method=method, transpose=transpose, seed=3))
    assert len(made) == 3 and 0 < widest.elements <= 256 * 512 < 512 * 512


@pytest.mark.parametrize("value", [-1, 1])
def test_split_k_is_what_the_candidate_says_whatever_the_default(
    backend: CusparseLtBackend, emulator: Emulator, value: int
) -> None:
    """A plan for 256 rows that kept a default of -1 would hang."""
    emulator.default_split_k(value)
    right(backend)
    assert emulator.hangs() == 0
    for split in (1, 2):
        planned = backend.plans.get(Gemm(256, 32, 64, BF16, "row", CPU), Candidate(0, split))
        assert planned.plan.alg_selection.get(plans.cslt.AlgAttribute.SPLIT_K) == split


def misaligned(x: Tensor) -> Tensor:
    """The same matrix in the same order, two bytes further on."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return memory.as_strided(x.shape, x.stride(), memory.storage_offset()).copy_(x)


@pytest.mark.parametrize(
    "capability, safe, ids, splits, modes",
    [
        ((8, 0), True, range(21), {1}, {None}),
        ((8, 0), False, range(21), {1}, {None}),
        ((9, 0), True, (0, 17, 20, 12, 11), {1}, {None}),
        ((9, 0), False, range(21), {1, -1}, {None}),
        ((10, 0), True, (0,), {1}, {None, 3, 4, 6}),
        ((12, 0), False, range(21), {1}, {None, 3, 4, 6}),
    ],
)
def test_what_is_offered_in_this_process_and_in_one_that_may_hang(
    backend: CusparseLtBackend,
    emulator: Emulator,
    capability: tuple[int, int],
    safe: bool,
    ids: range,
    splits: set[int],
    modes: set[int | None],
) -> None:
    emulator.max_alg_id(21)
    backend.machine.cpu_capability = capability
    offered = backend.offered(Gemm(2048, 2048, 2048, BF16, "row", CPU), safe=safe)
    assert offered[0] == Candidate(0) and len(set(offered)) == len(offered)
    assert {c.alg_id for c in offered} == set(ids)
    assert {c.split_k for c in offered} == splits
    assert {c.split_k_mode for c in offered} == modes
    assert all(Candidate(i) in offered for i in ids)  # a plain one of each
    few_rows = backend.offered(Gemm(256, 2048, 2048, BF16, "row", CPU), safe=safe)
    assert all(c.split_k == 1 for c in few_rows)
    assert backend.candidates(Gemm(256, 2048, 2048, BF16, "row", CPU), safe=safe) == few_rows


def test_a_long_reduction_is_split_on_sm8x(backend: CusparseLtBackend) -> None:
    offered = backend.offered(Gemm(64, 32, 256, BF16, "row", CPU))
    assert {c.split_k for c in offered} == {1, 2, 4}


@pytest.mark.parametrize("lies", ["aligned", "misaligned", "with gaps"])
def test_a_weight_that_would_be_copied_for_every_product_takes_no_plan(
    backend: CusparseLtBackend, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, lies: str
) -> None:
    monkeypatch.setattr(routes, "LIBRARY", backend)
    weight = torch.randn(32, 48).bfloat16().t()
    if lies == "misaligned":
        weight = misaligned(weight)
    if lies == "with gaps":
        weight = torch.randn(48, 64).bfloat16()[:, ::2]
    input = torch.randn(64, 32).bfloat16().requires_grad_()
    grad_output = torch.randn(64, 48).bfloat16()
    config = CONFIG.replace(tune="never")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sdgp.SDGPFallbackWarning)
        sdgp.functional.linear(input, weight, config=config).backward(grad_output)
    assert (emulator.calls("cusparseLtMatmul") > 0) == (lies == "aligned")
    if lies == "aligned":
        assert_product(input.grad, oracle_magnitude(grad_output, 2, 4, 1), weight)
