"""Every product of the backend, through the library's C interface, against dense products."""

import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import profile

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends import convolution
from sdgp_cusparselt.backends.base import ConvGeometry, Problem
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.dense import dense_conv2d_grad_input
from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.products.operands import (
    Conv2dGradInput,
    Conv2dGradWeight,
    LinearGradInput,
    LinearGradWeight,
    conv_rival,
)
from sdgp_cusparselt.products.sparse import sparse_product
from tests.emulator.control import Emulator
from tests.helpers import assert_product, oracle_magnitude

CONFIG = sdgp.SDGPConfig(prune="magnitude")
CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [16, 31, 256, 300])
@pytest.mark.parametrize("layout", ["plain", "blocked", "sm90_atom", "random"])
def test_linear_grad_input(
    backend: CusparseLtBackend, emulator: Emulator, dtype: torch.dtype, tokens: int, layout: str
) -> None:
    emulator.layout(layout, seed=3)
    grad_output = torch.randn(tokens, 64).to(dtype)
    weight = torch.randn(64, 40).to(dtype)
    result = sparse_product(backend, LinearGradInput(grad_output, weight), CONFIG)
    assert_product(result, oracle_magnitude(grad_output, 2, 4, 1), weight)
    assert emulator.calls("cusparseLtMatmul") == 2  # the first one proved the order


def test_a_column_major_weight(backend: CusparseLtBackend) -> None:
    grad_output = torch.randn(4, 9, 32).bfloat16()
    weight = torch.randn(48, 32).bfloat16().t()
    result = sparse_product(backend, LinearGradInput(grad_output, weight), CONFIG)
    assert result.shape == (4, 9, 48)
    pruned = oracle_magnitude(grad_output, 2, 4, 2).view(-1, 32)
    assert_product(result.view(-1, 48), pruned, weight)


def test_one_of_four_and_rescaled(backend: CusparseLtBackend) -> None:
    grad_output, weight = torch.randn(3, 16, 32).bfloat16(), torch.randn(32, 16).bfloat16()
    one = sparse_product(backend, LinearGradInput(grad_output, weight), CONFIG.replace(n=1))
    pruned = oracle_magnitude(grad_output, 1, 4, 2).view(-1, 32)
    assert_product(one.view(-1, 16), pruned, weight)
    config = CONFIG.replace(prune="rescaled_magnitude")
    rescaled = sparse_product(backend, LinearGradInput(grad_output, weight), config)
    pruned = sdgp.prune(grad_output, method="rescaled_magnitude").view(-1, 32)
    assert_product(rescaled.view(-1, 16), pruned, weight)


@pytest.mark.parametrize("tokens", [16, 48, 70])
def test_linear_grad_weight(backend: CusparseLtBackend, tokens: int) -> None:
    grad_output, input = torch.randn(tokens, 32).bfloat16(), torch.randn(tokens, 24).bfloat16()
    config = CONFIG.replace(grad_weight="sparse", grad_weight_prune="magnitude")
    result = sparse_product(backend, LinearGradWeight(grad_output, input), config)
    pruned = oracle_magnitude(grad_output, 2, 4, 0)
    body = tokens - tokens % 16
    if body == tokens:
        assert_product(result, pruned.t(), input)
    else:  # two products, each rounded to bfloat16
        size = pruned.double().abs().t() @ input.double().abs()
        error = (result.double() - pruned.double().t() @ input.double()).abs()
        assert (error <= 3 * torch.finfo(torch.bfloat16).eps * size).all()


@pytest.mark.parametrize("method", ["random", "mvue"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("n", [1, 2])
def test_groups_that_overflow_stay_visible_in_every_way(
    backend: CusparseLtBackend, method: str, value: float, n: int
) -> None:
    """At least one in every group, both ways, so that nothing is left to draw."""
    grad_output, weight = torch.randn(32, 64).bfloat16(), torch.randn(64, 16).bfloat16()
    input = torch.randn(32, 16).bfloat16()
    at = torch.arange(32)[:, None] + torch.arange(64)[None, :]
    grad_output[(at * 3) % 4 == 0] = value
    config = CONFIG.replace(prune=method, n=n, grad_weight="sparse", grad_weight_prune=method)
    of_input = LinearGradInput(grad_output, weight)
    of_weight = LinearGradWeight(grad_output, input)
    for got in (sparse_product(backend, of_input, config), of_input.emulated(config)):
        assert not got.isfinite().any()
    for got in (sparse_product(backend, of_weight, config), of_weight.emulated(config)):
        assert not got.isfinite().any()


CONVS = {
    "1x1": ((1, 1), ConvGeometry((1, 1), (0, 0), (1, 1), 1)),
    "1x1 strided": ((1, 1), ConvGeometry((2, 2), (0, 0), (1, 1), 1)),
    "1x1 strided in one direction": ((1, 1), ConvGeometry((1, 3), (0, 0), (1, 1), 1)),
}


@pytest.mark.parametrize("name", CONVS)
def test_conv2d_grad_input(backend: CusparseLtBackend, emulator: Emulator, name: str) -> None:
    kernel, conv = CONVS[name]
    last = torch.channels_last
    input = torch.randn(2, 8, 10, 11).bfloat16().to(memory_format=last)
    weight = torch.randn(32, 8, *kernel).bfloat16().to(memory_format=last)
    shape = F.conv2d(input, weight, None, conv.stride, conv.padding, conv.dilation)
    grad_output = torch.randn_like(shape)
    result = sparse_product(backend, Conv2dGradInput(grad_output, weight, input, conv), CONFIG)
    pruned = oracle_magnitude(grad_output, 2, 4, 1)

    def exact(gradient: Tensor, kernel: Tensor) -> Tensor:
        leaf = torch.zeros(input.shape, dtype=torch.float64, requires_grad=True)
        output = F.conv2d(leaf, kernel.double(), None, conv.stride, conv.padding, conv.dilation)
        return torch.autograd.grad(output, leaf, gradient.double())[0]

    size = exact(pruned.abs(), weight.abs())
    error = (result.double() - exact(pruned, weight)).abs()
    assert (error <= torch.finfo(torch.bfloat16).eps * size + 1e-30).all()
    assert result.is_contiguous(memory_format=last) and result.shape == input.shape
    assert emulator.calls("cusparseLtMatmul") == 2  # the first one proved the order


@pytest.mark.parametrize("name", ["1x1 strided", "1x1 strided in one direction"])
def test_the_rival_of_a_convolution_is_torchs_own_and_copies_nothing(name: str) -> None:
    kernel, conv = CONVS[name]
    last = torch.channels_last
    input = torch.randn(2, 8, 10, 11).bfloat16().to(memory_format=last)
    weight = torch.randn(32, 8, *kernel).bfloat16().to(memory_format=last)
    output = F.conv2d(input, weight, None, conv.stride, conv.padding, conv.dilation)
    grad_output = torch.randn_like(output)
    rival = conv_rival(grad_output, weight, input, conv)
    left, right = convolution.pixels(grad_output), weight[:, :, 0, 0]
    with profile() as profiled:
        dense = rival.dense(left, right)
    copied = [e for e in profiled.key_averages() if e.key == "aten::to"]
    assert not copied
    expected = dense_conv2d_grad_input(grad_output, weight, input, conv)
    torch.testing.assert_close(dense, expected)
    finished = rival.finish(left @ right)
    assert finished.shape == dense.shape
    assert (finished - dense).float().norm() <= 0.02 * dense.float().norm()


def test_conv2d_grad_weight(backend: CusparseLtBackend) -> None:
    for stride in (1, 2):
        input = torch.randn(2, 16, 8, 8).bfloat16().to(memory_format=torch.channels_last)
        weight = torch.randn(32, 16, 1, 1).bfloat16()
        grad_output = torch.randn_like(F.conv2d(input, weight, stride=stride))
        conv = ConvGeometry((stride, stride), (0, 0), (1, 1), 1)
        config = CONFIG.replace(grad_weight="sparse", grad_weight_prune="magnitude")
        result = sparse_product(backend, Conv2dGradWeight(grad_output, input, weight, conv), config)
        flat = grad_output.permute(0, 2, 3, 1).reshape(-1, 32)
        read = input[:, :, ::stride, ::stride].permute(0, 2, 3, 1).reshape(-1, 16)
        assert_product(result.view(32, 16), oracle_magnitude(flat, 2, 4, 0).t(), read)


def test_plans_are_made_once_and_token_counts_that_pad_alike_share_them(
    backend: CusparseLtBackend, emulator: Emulator
) -> None:
    weight = torch.randn(64, 32).bfloat16()
    for tokens in (17, 32, 20, 32):
        sparse_product(backend, LinearGradInput(torch.randn(tokens, 64).bfloat16(), weight), CONFIG)
    assert len(backend.plans) == 1
    assert emulator.calls("cusparseLtMatmulPlanInit") == 1
    sparse_product(backend, LinearGradInput(torch.randn(33, 64).bfloat16(), weight), CONFIG)
    assert len(backend.plans) == 2


def test_the_oldest_plan_goes_first(backend: CusparseLtBackend, emulator: Emulator) -> None:
    backend.plan_limit = 2
    weight = torch.randn(32, 16).bfloat16()
    for tokens in (16, 32, 16, 48):
        sparse_product(backend, LinearGradInput(torch.randn(tokens, 32).bfloat16(), weight), CONFIG)
    assert len(backend.plans) == 2
    assert emulator.live()["plan"] == 2
    sparse_product(backend, LinearGradInput(torch.randn(16, 32).bfloat16(), weight), CONFIG)
    assert emulator.calls("cusparseLtMatmulPlanInit") == 3


def test_each_thread_has_its_own_handle(backend: CusparseLtBackend, emulator: Emulator) -> None:
    emulator.thread_check()
    weight, failures = torch.randn(32, 16).bfloat16(), []

    def work(seed: int) -> None:
        try:
            grad_output = torch.randn(32, 32, generator=torch.Generator().manual_seed(seed))
            grad_output = grad_output.bfloat16()
            for _ in range(5):
                result = sparse_product(backend, LinearGradInput(grad_output, weight), CONFIG)
            pruned = oracle_magnitude(grad_output, 2, 4, 1)
            assert_product(result, pruned, weight)
        except BaseException as error:
            failures.append(error)
        finally:
            backend.plans.clear()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_refused_plan_leaves_nothing_behind(
    backend: CusparseLtBackend, emulator: Emulator
) -> None:
    gemm = Gemm(32, 16, 32, torch.bfloat16, "row", CPU)
    backend.plans.max_alg_id(gemm)
    before = emulator.live()
    with pytest.raises(RuntimeError, match="CONFIG_ID"):
        backend.plans.get(gemm, Candidate(10_000))
    assert emulator.live() == before
    with pytest.raises(RuntimeError, match="cusparseLtStructuredDescriptorInit"):
        backend.plans.get(Gemm(32, 16, 24, torch.bfloat16, "row", CPU), Candidate(0))
    assert emulator.live() == before


def problem(**changes: object) -> Problem:
    given: dict = {"product": "grad_input", "m": 64, "n": 32, "k": 32, "dtype": torch.bfloat16}
    return Problem(**(given | {"device": CPU, "config": CONFIG} | changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, []),
        ({"m": 63}, []),
        ({"k": 40}, ["K (outputs) is 40, no multiple of 16"]),
        ({"n": 20, "k": 8}, ["K (outputs) is 8", "N (inputs) is 20, no multiple of 8"]),
        ({"m": 0}, ["the product is empty"]),
        ({"m": 2**20, "k": 2**12}, ["more than 2147483647 elements"]),
        ({"dtype": torch.float32}, ["float32 runs 1:2"]),
        ({"dtype": torch.float64}, ["neither bfloat16 nor float16"]),
        ({"config": CONFIG.replace(m=8)}, ["2:8 does not fit the 2:4 format"]),
        ({"config": CONFIG.replace(n=1)}, []),
        ({"product": "grad_weight", "m": 40, "k": 100}, ["M (outputs) is 40"]),
        ({"product": "grad_weight", "k": 12}, ["K (tokens) is 12, fewer than 16"]),
        ({"conv": ConvGeometry((1, 1), (0, 0), (1, 1), 2)}, ["2 groups"]),
        (
            {"conv": ConvGeometry((1, 1), (0, 0), (1, 1), 1), "channels_last": False},
            ["memory_format=torch.channels_last"],
        ),
        ({"dense_order": None}, ["would have to be copied"]),
        ({"dense_order": "col"}, []),
        ({"dense_order": "col", "product": "grad_weight"}, ["would have to be copied"]),
        (
            {"conv": ConvGeometry((1, 1), (1, 1), (1, 1), 1), "kernel_size": (3, 3)},
            ["only an unpadded 1x1 convolution is one product"],
        ),
        (
            {"conv": ConvGeometry((1, 1), (1, 1), (1, 1), 1)},
            ["only an unpadded 1x1 convolution is one product"],
        ),
        (
            {
                "product": "grad_weight",
                "conv": ConvGeometry((1, 1), (0, 0), (1, 1), 1),
                "kernel_size": (3, 3),
            },
            ["only an unpadded 1x1 convolution"],
        ),
    ],
)
def test_reasons(backend: CusparseLtBackend, changes: dict, words: list[str]) -> None:
    reasons = backend.not_supported_reasons(problem(**changes))
    assert len(reasons) == len(words)
    for reason, word in zip(reasons, words, strict=True):
        assert word in reason


def test_a_machine_without_a_gpu_says_so() -> None:
    backend = CusparseLtBackend()
    if not torch.cuda.is_available():
        assert backend.machine_reasons() == ["torch sees no CUDA device"]
        assert backend.not_supported_reasons(problem()) == ["torch sees no CUDA device"]
