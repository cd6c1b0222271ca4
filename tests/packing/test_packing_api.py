"""pack and matmul: what they return, and what they refuse before anything is launched."""

import packing_cases as cases
import packing_oracle as oracle
import pytest
import torch

from sdgp_cusparselt.errors import NotSupportedError
from sdgp_cusparselt.packing import launch
from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing.pack import draw_seeds, matmul, pack, pack_gradient


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
    generator = torch.Generator().manual_seed(5)
    first = draw_seeds(torch.device("cpu"), generator)
    second = draw_seeds(torch.device("cpu"), generator)
    again = draw_seeds(torch.device("cpu"), torch.Generator().manual_seed(5))
    assert torch.equal(first, again) and not torch.equal(first, second)


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
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(NotSupportedError, match="x is on cpu"):
        pack(torch.zeros(16, 16).half(), backend="triton")


def test_without_triton_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "kernels", lambda: None)
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
