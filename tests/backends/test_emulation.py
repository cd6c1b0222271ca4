"""What emulates a gradient: blocks on a CPU, the kernel and compiled code on a GPU."""

import math

import pytest
import torch
from torch import Tensor

from sdgp_cusparselt.backends import blocks, dense, emulation
from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import SDGPFallbackWarning
from sdgp_cusparselt.packing.prune import prune_dense
from sdgp_cusparselt.pruning import compiled
from sdgp_cusparselt.pruning.methods import prune
from tests.helpers import assert_product, same_bits

METHODS = ["magnitude", "rescaled_magnitude", "random", "mvue"]


def config_of(method: str, n: int = 2, m: int = 4, beta: float = 0.0) -> SDGPConfig:
    return SDGPConfig(
        prune=method, n=n, m=m, beta=beta, grad_weight_prune=method, backend="dense",
        grad_weight="sparse" if m == 4 else "dense",
    )  # fmt: skip


def seeded(seed: int = 3) -> None:
    torch.manual_seed(seed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "shape", [(48, 24), (5, 48, 24), (3, 4, 5, 24), (24,), (0, 24), (0, 2, 24)]
)
@pytest.mark.parametrize("beta", [0.0, 0.25])
def test_grad_input_by_blocks_is_the_product_of_the_pruned_gradient(
    method: str, shape: tuple[int, ...], beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    grad_output, weight = torch.randn(shape), torch.randn(24, 16)
    monkeypatch.setattr(blocks, "SIDE", 4)
    for elements in (1 << 21, 6 * 24 * 10, 100):
        monkeypatch.setattr(blocks, "ELEMENTS", elements)
        config = config_of(method, beta=beta)
        seeded()
        pruned = emulation.prune_features(grad_output, config)
        seeded()
        result = blocks.linear_grad_input(grad_output, weight, config)
        assert result.shape == (*shape[:-1], 16)
        assert_product(result.reshape(-1, 16), pruned.reshape(-1, 24), weight)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [0, 6, 64])
def test_grad_weight_by_blocks_is_the_product_of_the_pruned_gradient(
    method: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grad_output, input = torch.randn(tokens, 24), torch.randn(tokens, 16)
    config = config_of(method)
    monkeypatch.setattr(blocks, "SIDE", 8)
    for elements in (1 << 21, 8 * 64):
        monkeypatch.setattr(blocks, "ELEMENTS", elements)
        parts = [slice(0, 24)] if elements > 9999 or tokens < 64 else [
            slice(0, 8), slice(8, 16), slice(16, 24)
        ]  # fmt: skip
        seeded()
        if method in ("random", "mvue"):  # drawn block by block
            pruned = torch.cat(
                [emulation.prune_tokens(grad_output[:, p], config) for p in parts], 1
            )
        else:
            pruned = emulation.prune_tokens(grad_output, config)
        seeded()
        result = blocks.linear_grad_weight(grad_output, input, config)
        assert_product(result, pruned.t(), input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_rescale_ratio_is_the_same_whatever_the_blocks_and_the_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = (torch.randn(999, 64) * torch.exp(2 * torch.randn(999, 64))).to(dtype)
    config = config_of("rescaled_magnitude")
    whole = prune(x, method="rescaled_magnitude")
    threads = torch.get_num_threads()
    for rows in (1, 7, 100, 256, 999):
        torch.set_num_threads(1 + rows % 2)
        ratio = blocks._ratio(list(x.split(rows)), config, -1)
        kept = prune(x)
        assert same_bits((kept.to(ratio.dtype) * ratio).to(dtype), whole)
    torch.set_num_threads(threads)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way of a GPU on a CPU: Triton's interpreter, and compiled code run eagerly."""
    monkeypatch.setattr(emulation, "_on_gpu", lambda x: type(x) is Tensor)
    monkeypatch.setattr(emulation, "KERNEL", "triton")
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(compiled, "_compiled", {})
    monkeypatch.setattr(emulation, "_launched", set())
    monkeypatch.setattr(emulation, "_announced", set())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_of_four_are_one_pass_of_the_kernel(
    method: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulation, "prune_compiled", None)  # not to be called
    config = config_of(method, n)
    x = torch.randn(2, 16, 32).bfloat16()
    flat = x.view(32, 32)
    seeded()
    features = emulation.prune_features(x, config)
    seeded()
    expected = prune_dense(flat, method=method, n=n, tokens_per_sample=16, backend="triton")
    assert same_bits(features, expected.view(x.shape))
    if method in ("magnitude", "rescaled_magnitude"):
        reference = prune(x, method=method, n=n, scale_dims=(1,))
        torch.testing.assert_close(features, reference, rtol=2**-8, atol=0)
    seeded()
    tokens = emulation.prune_tokens(flat, config)
    seeded()
    assert same_bits(tokens, prune_dense(flat, method=method, n=n, dim=0, backend="triton"))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", ["magnitude", "rescaled_magnitude"])
def test_channels_and_pixels_take_the_kernel(method: str, groups: int, last: bool) -> None:
    x = torch.randn(2, 16, 3, 4).bfloat16()
    x = x.to(memory_format=torch.channels_last) if last else x
    config = config_of(method)
    kept = emulation.prune_channels(x, groups, config)
    expected = prune(x, method=method, dim=1, scale_dims=(2, 3))
    torch.testing.assert_close(kept, expected, rtol=2**-8, atol=0)
    assert len(emulation._launched) == 1
    pixels = x.permute(0, 2, 3, 1).reshape(24, 16)
    expected = prune(pixels, method=method, dim=0).view(2, 3, 4, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(emulation.prune_pixels(x, config), expected, rtol=2**-8, atol=0)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "n, m, dtype, width",
    [(4, 8, torch.bfloat16, 32), (2, 4, torch.float32, 32), (2, 4, torch.bfloat16, 30)],
)
def test_what_the_kernel_cannot_prune_is_compiled(
    n: int, m: int, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def recorded(x: Tensor, *pattern: object) -> tuple[Tensor, None]:
        asked.append(pattern)
        return x, None

    monkeypatch.setattr(emulation, "prune_compiled", recorded)
    emulation.prune_features(torch.randn(8, width).to(dtype), config_of("mvue", n, m))
    assert asked == [("mvue", n, m, -1, None)] and not emulation._launched


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_is_compiled_once_for_every_shape(method: str) -> None:
    traced: list[object] = []

    def eager(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    compiled.BACKEND = eager  # the fixture puts it back
    for tokens in (8, 24, 40):
        x = torch.randn(tokens, 32).bfloat16()
        kept, reason = compiled.prune_compiled(x, method, 4, 8, -1)
        assert reason is None and ((kept != 0).view(tokens, 4, 8).sum(-1) == 4).all()
        if method in ("magnitude", "rescaled_magnitude"):
            torch.testing.assert_close(kept, prune(x, method=method, n=4, m=8))
    assert len(traced) == 1


@pytest.mark.usefixtures("gpu")
def test_more_patterns_than_a_code_object_may_have_are_compiled() -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for n in (1, 2, 3):
            assert compiled.prune_compiled(torch.randn(8, 30), "magnitude", n, 5, -1)[1] is None


@pytest.mark.usefixtures("gpu")
def test_where_nothing_compiles_plain_torch_prunes_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    x = torch.randn(8, 32)
    config = config_of("magnitude", 4, 8)
    for _ in range(3):
        assert same_bits(emulation.prune_features(x, config), prune(x, n=4, m=8))
    told = [w for w in recwarn if issubclass(w.category, SDGPFallbackWarning)]
    assert len(told) == 1 and "no compiler here" in str(told[0].message)


@pytest.mark.usefixtures("gpu")
def test_under_capture_only_what_ran_before_is_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(emulation, "_capturing", lambda _: True)
    x, config = torch.randn(16, 32).bfloat16(), config_of("magnitude")
    assert not emulation._kernel_takes(x, "magnitude", config, -1)
    emulation._by_kernel(x, "magnitude", config, -1)
    assert emulation._kernel_takes(x, "magnitude", config, -1)
    assert not emulation._kernel_takes(x[:8], "magnitude", config, -1)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_inductor_gives_what_plain_torch_gives(method: str) -> None:
    x = torch.randn(64, 48)
    kept, reason = compiled.prune_compiled(x, method, 4, 8, -1)
    assert reason is None
    assert ((kept != 0).view(64, 6, 8).sum(-1) == 4).all()
    if method in ("magnitude", "rescaled_magnitude"):
        torch.testing.assert_close(kept, prune(x, method=method, n=4, m=8))


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_of_an_emulated_gradient(method: str) -> None:
    conv = ConvGeometry((1, 1), (1, 1), (1, 1), 2)
    grad_output, weight = torch.randn(2, 8, 5, 5), torch.randn(8, 3, 3, 3)
    input = torch.randn(2, 6, 5, 5)
    config = config_of(method)
    seeded()
    kept = emulation.prune_channels(grad_output, 2, config)
    seeded()
    result = dense.conv2d_grad_input(grad_output, weight, input, conv, config)
    torch.testing.assert_close(result, dense.dense_conv2d_grad_input(kept, weight, input, conv))
    assert math.isclose(float((kept != 0).float().mean()), 0.5, abs_tol=1e-6)
