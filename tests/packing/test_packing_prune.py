"""Pruning to a dense tensor: the bits of packing and unpacking, by kernel and by reference."""

import packing_cases as cases
import packing_oracle as oracle
import pytest
import torch
from torch import Tensor

from sdgp_cusparselt.config.patterns import METHODS
from sdgp_cusparselt.errors import NotSupportedError
from sdgp_cusparselt.packing import launch, starting
from sdgp_cusparselt.packing.pack import pack_gradient
from sdgp_cusparselt.packing.prune import prune_dense

PRUNED = [method for method in METHODS if method != "none"]


def packed_and_unpacked(x: Tensor, method: str, n: int, dim: int, backend: str) -> Tensor:
    torch.manual_seed(5)
    if dim == 0:
        tokens = pack_gradient(x, features=None, tokens=method, n=n, backend=backend).tokens
        assert tokens is not None
        return tokens.unpack().t()
    features = pack_gradient(x, features=method, n=n, backend=backend).features
    assert features is not None
    return features.unpack()


@pytest.mark.parametrize("method", PRUNED)
@pytest.mark.parametrize("n", [2, 1])
@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("dtype", cases.FLOAT_DTYPES)
def test_bits_equal_pack_then_unpack(
    device: str, method: str, n: int, dim: int, dtype: torch.dtype
) -> None:
    """Ragged in both directions, over a block's border, rows further apart than they are wide."""
    wide = cases.adversarial(45, 76, dtype).to(device)
    x = wide[:, :60]
    for backend in ("triton", "reference"):
        torch.manual_seed(5)
        got = prune_dense(x, method=method, n=n, dim=dim, backend=backend)
        assert got.shape == x.shape and got.is_contiguous() and got.dtype == dtype
        want = packed_and_unpacked(x, method, n, dim, backend)
        assert cases.same_bits(got, want)
    if method != "rescaled_magnitude":  # whose ratio is a sum in another order
        assert cases.same_bits(got, packed_and_unpacked(x, method, n, dim, "triton"))


@pytest.mark.parametrize("dim", [-1, 0])
def test_magnitude_is_the_oracles(device: str, dim: int) -> None:
    x = cases.adversarial(64, 300, torch.bfloat16).to(device)
    operand = x.cpu() if dim else x.cpu().t()
    want = oracle.prune_magnitude(operand)
    want = torch.where(want == 0, torch.zeros_like(want), want)  # -0 becomes +0
    got = prune_dense(x, dim=dim, backend="triton").cpu()
    assert cases.same_bits(got if dim else got.t(), want)


def test_ratios_are_each_samples_own(device: str) -> None:
    x = torch.randn(64, 64).half().to(device)
    x[32:] *= 3
    arguments = {"method": "rescaled_magnitude", "backend": "triton"}
    both = prune_dense(x, tokens_per_sample=32, **arguments)
    halves = [prune_dense(part.contiguous(), **arguments) for part in (x[:32], x[32:])]
    assert cases.same_bits(both, torch.cat(halves))
    kept = both.double().abs().view(2, 32, 64).sum(1)
    torch.testing.assert_close(
        kept, x.double().abs().view(2, 32, 64).sum(1), rtol=2**-10, atol=0, check_device=False
    )


@pytest.mark.parametrize("method", ["magnitude", "mvue"])
def test_seeds_in_memory_draw_as_the_same_seeds_given(device: str, method: str) -> None:
    x = cases.adversarial(48, 64, torch.float16).to(device)
    seeds = torch.tensor([77, 8], device=device)
    outs = [torch.full_like(x, torch.nan) for _ in range(2)]
    for out, in_memory in zip(outs, (False, True), strict=True):
        prepared = launch.prepare_prune(
            (48, 64), 64, x.dtype, x.device, method=method, seeds_in_memory=in_memory
        )
        assert prepared.draws == (method == "mvue") and prepared.seeds_in_memory == in_memory
        seed, offset = (0, 4) if in_memory else (77, 12)  # an offset given is added
        with starting.on_device(x.device):
            prepared(
                x.data_ptr(),
                out.data_ptr(),
                seed,
                offset,
                starting.current_stream(x.device),
                seeds=seeds.data_ptr(),
            )
    assert cases.same_bits(outs[0], outs[1])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"n": 3}, "1:4 or 2:4"),
        ({"m": 8}, "1:4 or 2:4"),
        ({"dim": 2}, "dim must be"),
        ({"method": "best"}, "method must be"),
        ({"backend": "gpu"}, "backend must be"),
        ({"tokens_per_sample": 3}, "divisor"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prune_dense(torch.zeros(16, 16).half(), **options)  # type: ignore[arg-type]


def test_a_row_stride_that_is_no_octet_is_refused() -> None:
    with pytest.raises(ValueError, match="row_stride must be a multiple of 8"):
        launch.prepare_prune((4, 8), 9, torch.half, torch.device("cpu"), method="magnitude")


def test_a_dtype_that_the_kernel_does_not_move(device: str) -> None:
    x = torch.zeros(16, 16).to(torch.float8_e5m2).to(device)
    with pytest.raises(NotSupportedError, match="float16 and bfloat16"):
        prune_dense(x, backend="triton")
