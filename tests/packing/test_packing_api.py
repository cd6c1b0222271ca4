"""pack and matmul: what they return, and what they refuse before anything is launched."""

import packing_cases as cases
import packing_oracle as oracle
import pytest
import torch

from sdgp_cusparselt.errors import NotSupportedError
from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing import starting
from sdgp_cusparselt.packing.pack import matmul, pack, pack_gradient
from sdgp_cusparselt.packing.seeds import draw_seeds, seeds_tensor


@pytest.mark.parametrize("transpose", [False, True])
def test_pack_then_unpack_is_prune(transpose: bool) -> None:
    x = torch.randn(70, 48).bfloat16()
    packed = pack(x, transpose=transpose)
    assert packed.transposed == transpose
    assert torch.equal(packed.unpack(), oracle.prune_magnitude(x.t() if transpose else x))


def test_rescaling_preserves_column_sums_of_magnitudes() -> None:
    x = torch.randn(256, 64)
    packed = pack(x.half(), method="rescaled_magnitude")
    want, got = x.half().double().abs().sum(0), packed.unpack().double().abs().sum(0)
    # Each value is rounded once to fp16, and the fp32 ratio adds far less.
    torch.testing.assert_close(got, want, rtol=2**-11, atol=0)


def test_seeds_follow_torchs_generator() -> None:
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(5)
    first, second = draw_seeds(cpu, generator), draw_seeds(cpu, generator)
    assert first == draw_seeds(cpu, torch.Generator().manual_seed(5)) != second
    torch.manual_seed(7)
    default = draw_seeds(cpu)
    torch.manual_seed(7)
    assert draw_seeds(cpu) == default
    assert seeds_tensor(first, cpu).tolist() == list(first)


class FakeGenerator:
    """What ``draw_seeds`` asks of a CUDA generator."""

    device = torch.device("cuda", 0)

    def __init__(self, seed: int, offset: int) -> None:
        self.seed, self.offset = seed, offset

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


def test_a_cuda_generator_lends_its_philox_state_and_moves_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    generator = FakeGenerator(2**64 - 3, 40)
    pairs = [draw_seeds(torch.device("cuda", 0), generator) for _ in range(2)]  # type: ignore[arg-type]
    assert pairs == [(-3, 40), (-3, 44)]


@pytest.mark.gpu
def test_seeds_are_drawn_into_memory_under_capture() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seeds = draw_seeds(torch.device("cuda", 0))
    assert isinstance(seeds, torch.Tensor) and seeds.is_cuda


def test_one_of_four_packs_by_kernel_and_reference_and_three_is_refused() -> None:
    x = torch.randn(32, 32).half()
    packed = pack_gradient(x, n=1).features
    assert packed is not None and (packed.unpack().view(-1, 4) != 0).sum(-1).max() == 1
    with pytest.raises(ValueError, match="n must be 1 or 2"):
        pack_gradient(x, n=3)


def test_matmul_is_the_product_of_the_unpacked_operand() -> None:
    x, dense = torch.randn(32, 64).bfloat16(), torch.randn(64, 24).bfloat16()
    packed = pack(x)
    assert torch.equal(matmul(packed, dense), oracle.prune_magnitude(x) @ dense)


@pytest.mark.parametrize(
    "x, options, error, words",
    [
        ([[1.0] * 4], {}, TypeError, "torch.Tensor"),
        (torch.zeros(4).half(), {}, ValueError, "2-D"),
        (torch.zeros(4, 4), {}, TypeError, "float32"),
        (torch.zeros(0, 4).half(), {}, ValueError, "rows and columns"),
        (torch.zeros(1, 1).half().expand(4, 2**31), {}, ValueError, "rows and columns"),
        (torch.zeros(4, 6).half(), {}, ValueError, "multiple of 4"),
        (torch.zeros(4, 4).half(), {"method": "best"}, ValueError, "method"),
        (torch.zeros(4, 4).half(), {"backend": "gpu"}, ValueError, "backend"),
        (torch.zeros(4, 4, dtype=torch.int8), {"method": "mvue"}, TypeError, "mvue"),
        (torch.zeros(320, 64).half(), {"layout": layouts.BLOCKED}, ValueError, "layout"),
    ],
)
def test_bad_input_is_refused(
    x: object, options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        pack(x, **options)  # type: ignore[arg-type]


def test_samples_must_divide_the_tokens() -> None:
    with pytest.raises(ValueError, match="divisor"):
        pack_gradient(torch.zeros(10, 4).half(), tokens_per_sample=3)


def test_a_cpu_tensor_is_refused_by_the_gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "interpreted", lambda: False)
    with pytest.raises(NotSupportedError, match="x is on cpu"):
        pack(torch.zeros(16, 16).half(), backend="triton")


def test_without_triton_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "kernels", lambda: None)
    x = cases.adversarial(16, 16, torch.float16)
    assert pack(x).nbytes > 0
    with pytest.raises(NotSupportedError, match="triton cannot be imported"):
        pack(x, backend="triton")


@pytest.mark.parametrize(
    "dense, error",
    [(torch.zeros(32, 8).half(), ValueError), (torch.zeros(16, 8), TypeError)],
)
def test_matmul_refuses_what_does_not_match(dense: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        matmul(pack(torch.zeros(16, 16).half()), dense)
    with pytest.raises(ValueError, match="backend"):
        matmul(pack(torch.zeros(16, 16).half()), torch.zeros(16, 8).half(), backend="x")
