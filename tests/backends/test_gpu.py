"""The backend on a GPU with the real library; run by ``make gpu-check``."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.equivalence import compare_product
from sdgp_cusparselt.products import dispatch, routes
from sdgp_cusparselt.products.operands import Conv2dGradInput, LinearGradInput, LinearGradWeight
from sdgp_cusparselt.products.sparse import sparse_product
from sdgp_cusparselt.recording.records import LayerRecord
from sdgp_cusparselt.tuning import store

pytestmark = pytest.mark.gpu

NEVER = sdgp.SDGPConfig(prune="magnitude", tune="never", on_unsupported="raise")
BF16 = torch.bfloat16


def cuda(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path) -> CusparseLtBackend:
    """The registered backend, with decisions and proofs of its own."""
    backend = CusparseLtBackend()
    assert not backend.machine_reasons()
    monkeypatch.setattr(routes, "LIBRARY", backend)
    monkeypatch.setattr(store, "_default", store.TuningCache(tmp_path / "decisions"))
    return backend


@pytest.mark.parametrize("order", ["row", "col"])
@pytest.mark.parametrize(
    "tokens, k, n", [(16, 64, 64), (300, 256, 512), (1000, 1024, 512), (4096, 4096, 1024)]
)
def test_linear_grad_input(
    backend: CusparseLtBackend, tokens: int, k: int, n: int, order: str
) -> None:
    grad_output = cuda(tokens, k)
    weight = cuda(k, n) if order == "row" else cuda(n, k).t()
    result = sparse_product(backend, LinearGradInput(grad_output, weight), NEVER)
    assert compare_product(result, sdgp.prune(grad_output), weight) is None
    print({str(key): c.reason for key, c in backend.certificates.known().items()})


@pytest.mark.parametrize("tokens", [64, 1000, 4096])
def test_linear_grad_weight(backend: CusparseLtBackend, tokens: int) -> None:
    grad_output, input = cuda(tokens, 512), cuda(tokens, 256)
    config = NEVER.replace(grad_weight="sparse", grad_weight_prune="magnitude")
    body = tokens - tokens % 16
    result = sparse_product(backend, LinearGradWeight(grad_output[:body], input[:body]), config)
    pruned = sdgp.prune(grad_output[:body], dim=0).t()
    assert compare_product(result, pruned, input[:body]) is None


@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d_grad_input(backend: CusparseLtBackend, stride: int) -> None:
    last = torch.channels_last
    input = cuda(4, 64, 28, 28).to(memory_format=last)
    weight = cuda(128, 64, 1, 1).to(memory_format=last)
    output = torch.nn.functional.conv2d(input, weight, None, stride)
    grad_output = torch.randn_like(output)
    conv = ConvGeometry((stride, stride), (0, 0), (1, 1), 1)
    result = sparse_product(backend, Conv2dGradInput(grad_output, weight, input, conv), NEVER)
    dense = Conv2dGradInput(grad_output, weight, input, conv).emulated(NEVER)
    assert (result - dense).float().norm() <= 2e-2 * dense.float().norm()


def test_every_candidate_is_right_or_rejected_by_name(backend: CusparseLtBackend) -> None:
    from sdgp_cusparselt.backends.gemm import Gemm
    from sdgp_cusparselt.tuning import tune

    gemm = Gemm(2048, 2048, 4096, BF16, "row", torch.device("cuda", 0))
    decision = tune(gemm, backend, cache=store.default_cache())
    print(decision.use, decision.candidate, decision.speedup, decision.reason)
    for candidate, reason in decision.rejected:
        print("rejected", candidate, reason)
    assert decision.candidate is not None


def layer_and_data(tokens: int = 512) -> tuple[nn.Linear, Tensor, Tensor]:
    layer = nn.Linear(256, 512, device="cuda", dtype=BF16)
    sdgp.convert_(layer, NEVER)
    x = cuda(tokens, 256).requires_grad_()
    return layer, x, cuda(tokens, 512)


def test_training_step_on_autograds_own_threads(backend: CusparseLtBackend) -> None:
    layer, x, grad_output = layer_and_data()
    layer(x).backward(grad_output)
    assert layer.sdgp_record.calls["grad_input", "sparse"] == 1
    weight = layer.weight.detach()
    assert compare_product(x.grad, sdgp.prune(grad_output), weight) is None


def test_many_threads(backend: CusparseLtBackend) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            grad_output, weight = cuda(512, 256), cuda(256, 128)
            for _ in range(20):
                result = sparse_product(backend, LinearGradInput(grad_output, weight), NEVER)
            assert compare_product(result, sdgp.prune(grad_output), weight) is None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_side_stream_is_used(backend: CusparseLtBackend) -> None:
    grad_output, weight = cuda(4096, 4096), cuda(4096, 1024)
    expected = sparse_product(backend, LinearGradInput(grad_output, weight), NEVER)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(grad_output)
        torch.cuda._sleep(50_000_000)
        late.copy_(grad_output)
        result = sparse_product(backend, LinearGradInput(late, weight), NEVER)
    stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("method", ["magnitude", "mvue"])
def test_capture_and_replay_in_a_cuda_graph(backend: CusparseLtBackend, method: str) -> None:
    config = NEVER.replace(prune=method)
    grad_output, weight = cuda(1024, 512), cuda(512, 256)
    operands, record = LinearGradInput(grad_output, weight), LayerRecord("here")
    for _ in range(3):
        dispatch.run(operands, config, record)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = dispatch.run(operands, config, record)
    assert record.calls == {("grad_input", "sparse"): 4}
    grad_output.copy_(cuda(1024, 512))
    graph.replay()
    torch.cuda.synchronize()
    if method == "magnitude":
        assert compare_product(result, sdgp.prune(grad_output), weight) is None
    else:
        first = result.clone()
        graph.replay()
        torch.cuda.synchronize()
        assert not torch.equal(first, result)  # each replay draws anew


def test_unprepared_under_capture_is_plain_and_said(backend: CusparseLtBackend) -> None:
    layer, x, grad_output = layer_and_data(777)
    layer.sdgp_config = NEVER.replace(on_unsupported="plain", tune="first_use")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        output = layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            pytest.warns(sdgp.SDGPFallbackWarning, match="before the graph was captured"),
            torch.cuda.graph(graph, stream=stream),
        ):
            output.backward(grad_output)


def test_ten_thousand_steps_do_not_grow(backend: CusparseLtBackend) -> None:
    layer, x, grad_output = layer_and_data()

    def steps(count: int) -> int:
        for _ in range(count):
            x.grad = None
            layer.zero_grad(set_to_none=True)
            layer(x).backward(grad_output)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = steps(50)
    free_before, _ = torch.cuda.mem_get_info()
    after = steps(10_000)
    free_after, _ = torch.cuda.mem_get_info()
    assert after <= before
    assert free_before - free_after < 32 * 2**20


def test_compiled_model_equals_eager(backend: CusparseLtBackend) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    model = model.to("cuda", BF16)
    sdgp.convert_(model, NEVER)
    twin = copy.deepcopy(model)
    x, grad_output = cuda(512, 256).requires_grad_(), cuda(512, 256)
    model(x).backward(grad_output)
    eager, x.grad = x.grad, None
    torch.compile(twin, fullgraph=True)(x).backward(grad_output)
    assert (x.grad - eager).float().norm() <= 2e-2 * eager.float().norm()


def test_float16_runs_or_is_refused_with_a_reason(backend: CusparseLtBackend) -> None:
    grad_output, weight = cuda(512, 256, dtype=torch.float16), cuda(256, 128, dtype=torch.float16)
    layer = nn.Linear(128, 256, device="cuda", dtype=torch.float16, bias=False)
    layer.weight.data.copy_(weight)
    sdgp.convert_(layer, NEVER.replace(on_unsupported="plain"))
    x = torch.randn(512, 128, device="cuda", dtype=torch.float16, requires_grad=True)
    if backend.float16_reasons(torch.device("cuda", 0)):
        with pytest.warns(sdgp.SDGPFallbackWarning, match="self-test"):
            layer(x).backward(grad_output)
        assert compare_product(x.grad, grad_output, weight) is None
    else:
        layer(x).backward(grad_output)
        assert compare_product(x.grad, sdgp.prune(grad_output), weight) is None
