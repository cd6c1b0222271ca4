"""Training steps whose products went pack -> plan -> matmul in C, against the dense backend."""

import threading
import warnings
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.plans import padded_rows
from sdgp_cusparselt.products import dispatch, packers, routes
from sdgp_cusparselt.recording.records import COMPILED
from sdgp_cusparselt.tuning import Decision, policy, store, timing
from sdgp_cusparselt.tuning.buckets import bucket
from sdgp_cusparselt.tuning.decision import Key
from tests.emulator.control import Bad, Emulator
from tests.helpers import assert_product

NEVER = sdgp.SDGPConfig(prune="magnitude", tune="never")
EPS = torch.finfo(torch.bfloat16).eps


@pytest.fixture
def emulated(
    backend: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> CusparseLtBackend:
    """The backend as dispatch sees it on a machine with a GPU, with a decision cache of its own."""
    monkeypatch.setattr(routes, "LIBRARY", backend)
    monkeypatch.setattr(store, "_default", store.TuningCache(tmp_path / "decisions"))
    return backend


class Net(nn.Module):
    """Linear layers, a 1x1 and a 3x3 convolution, and Hugging Face's Conv1D; odd token counts."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.point = nn.Conv2d(16, 32, 1)
        self.spatial = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.up, self.down = nn.Linear(32, 64), Conv1D(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.point(torch.relu(self.stem(x))))
        x = self.spatial(x).flatten(2).transpose(1, 2)
        return (x + self.down(torch.relu(self.up(x)))).float().square().mean()


def gradients(model: nn.Module, steps: int = 2) -> list[Tensor]:
    torch.manual_seed(9)
    for _ in range(steps):
        x = torch.randn(3, 3, 10, 10).bfloat16().to(memory_format=torch.channels_last)
        model(x).backward()
    return [p.grad.float() for p in model.parameters()]


def said() -> AbstractContextManager[object]:
    """Expect what is said of the 3x3 convolution, which is no single product."""
    return pytest.warns(sdgp.SDGPFallbackWarning, match="spatial: .* only an unpadded 1x1")


def net(config: sdgp.SDGPConfig) -> nn.Module:
    torch.manual_seed(1)
    model = Net().bfloat16().to(memory_format=torch.channels_last)
    sdgp.convert_(model, config)
    return model


@pytest.mark.parametrize("grad_weight", ["dense", "sparse"])
def test_training_steps_equal_the_dense_backend(
    emulated: CusparseLtBackend, emulator: Emulator, grad_weight: str
) -> None:
    # The 3x3 convolution prunes in both.
    config = NEVER.replace(
        grad_weight=grad_weight, grad_weight_prune="magnitude", on_unsupported="emulate"
    )
    model, twin = net(config), net(config.replace(backend="dense"))
    with said():
        sparse = gradients(model)
    dense = gradients(twin)
    records = {
        n: mod.sdgp_record for n, mod in model.named_modules() if hasattr(mod, "sdgp_record")
    }
    assert set(records) == {"point", "spatial", "up", "down"}
    for name, record in records.items():
        way = "emulated" if name == "spatial" else "sparse"
        assert record.calls["grad_input", way] == 2, (name, record)
        if grad_weight == "sparse":
            assert record.calls["grad_weight", way] == 2, (name, record)
    assert emulator.calls("cusparseLtMatmul") >= 6
    for a, b in zip(sparse, dense, strict=True):
        # Each of the layers between a parameter and the loss rounds once more to bfloat16.
        assert (a - b).norm() <= 8 * EPS * b.norm()


@pytest.mark.parametrize("shape", [(64,), (3, 16), (5, 7)], ids=str)
@pytest.mark.parametrize("method", ["magnitude", "rescaled_magnitude"])
def test_both_gradients_of_a_linear_layer_come_from_one_read(
    emulated: CusparseLtBackend,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    method: str,
) -> None:
    config = NEVER.replace(prune=method, grad_weight="sparse", grad_weight_prune="magnitude")
    layer = nn.Linear(32, 64, bias=False).bfloat16()
    sdgp.convert_(layer, config)
    x = torch.randn(*shape, 32, dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.randn(*shape, 64, dtype=torch.bfloat16)
    layer(x).backward(grad_output)  # learns the orders
    x.grad = layer.weight.grad = None
    reads = []
    real = packers.ReferencePacker.__call__

    def counting(*args: object) -> None:
        reads.append(args)
        real(*args)

    monkeypatch.setattr(packers.ReferencePacker, "__call__", counting)
    layer(x).backward(grad_output)
    whole = torch.Size(shape).numel() % 16 == 0
    assert len(reads) == (1 if whole else 2)
    flat = grad_output.reshape(-1, 64)
    pruned = sdgp.prune(grad_output, method=method).reshape(-1, 64)
    assert_product(x.grad.reshape(-1, 32), pruned, layer.weight.detach())
    reference = sdgp.prune(flat, dim=0).double().t() @ x.detach().reshape(-1, 32).double()
    assert (layer.weight.grad - reference).norm() <= 2 * EPS * reference.norm()
    assert layer.sdgp_record.calls == {
        ("grad_input", "sparse"): 2,
        ("grad_weight", "sparse"): 2,
    }


def test_many_threads_at_once(emulated: CusparseLtBackend, emulator: Emulator) -> None:
    emulator.thread_check()
    with said():
        expected = gradients(net(NEVER))
    failures = []

    def work() -> None:
        try:
            layer = nn.Linear(32, 32).bfloat16()
            sdgp.convert_(layer, NEVER)
            x = torch.randn(24, 32, dtype=torch.bfloat16, requires_grad=True)
            grad_output = torch.randn(24, 32, dtype=torch.bfloat16)
            for _ in range(3):
                x.grad = None
                layer(x).backward(grad_output)
            reference = sdgp.prune(grad_output).float() @ layer.weight.detach().float()
            assert (x.grad.float() - reference).norm() <= 2 * EPS * reference.norm()
            assert layer.sdgp_record.calls["grad_input", "sparse"] == 3
        except BaseException as error:
            failures.append(error)
        finally:
            emulated.plans.clear()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(torch.isfinite(g).all() for g in expected)


def linear(config: sdgp.SDGPConfig, tokens: int = 64) -> tuple[nn.Linear, Tensor, Tensor]:
    layer = nn.Linear(32, 64).bfloat16()
    sdgp.convert_(layer, config)
    x = torch.randn(tokens, 32, dtype=torch.bfloat16, requires_grad=True)
    return layer, x, torch.randn(tokens, 64, dtype=torch.bfloat16)


def timed_by(monkeypatch: pytest.MonkeyPatch, dense_us: float) -> None:
    """Let every sparse path take 10 us and torch's own product dense_us."""
    monkeypatch.setattr(
        timing,
        "HostTimer",
        lambda: lambda run, label: (run(), dense_us if "dense" in label else 10.0)[1],
    )


def test_first_use_takes_the_faster_way(
    emulated: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_by(monkeypatch, dense_us=100.0)
    layer, x, grad_output = linear(NEVER.replace(tune="first_use"))
    layer(x).backward(grad_output)
    assert dict(layer.sdgp_record.calls) == {("grad_input", "sparse"): 1}


@pytest.mark.parametrize("on_slower, way", [("plain", "plain"), ("emulate", "emulated")])
def test_a_slower_sparse_path_is_not_taken(
    emulated: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch, on_slower: str, way: str
) -> None:
    timed_by(monkeypatch, dense_us=5.0)
    layer, x, grad_output = linear(NEVER.replace(tune="first_use", on_slower=on_slower))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a choice, not a fallback
        layer(x).backward(grad_output)
    assert dict(layer.sdgp_record.calls) == {("grad_input", way): 1}
    gradient = grad_output if on_slower == "plain" else sdgp.prune(grad_output)
    assert torch.equal(x.grad, gradient @ layer.weight.detach())
    forced, x, grad_output = linear(NEVER.replace(tune="first_use", backend="cusparselt"))
    forced(x).backward(grad_output)
    assert dict(forced.sdgp_record.calls) == {("grad_input", "sparse"): 1}


def test_the_default_tunes_at_first_use_and_says_so(
    emulated: CusparseLtBackend,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    timed_by(monkeypatch, dense_us=100.0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).bfloat16()
    sdgp.convert_(model, sdgp.SDGPConfig(prune="magnitude"))
    x = torch.randn(40, 32, dtype=torch.bfloat16, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).backward(torch.randn(40, 32, dtype=torch.bfloat16))
    assert all(layer.sdgp_record.calls == {("grad_input", "sparse"): 1} for layer in model)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "tuned 2 products" in lines[1] and "2 sparse, 0 plain" in lines[1]
    x.grad = None
    model(x).backward(torch.randn(40, 32, dtype=torch.bfloat16))
    assert capsys.readouterr().err == ""


def test_64_token_counts_are_tuned_once_a_bucket_and_proven_once_a_plan(
    emulated: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_by(monkeypatch, dense_us=100.0)
    search, proof = policy.search_here, policy.plan_fault
    tuned, proven = list[int](), list[int]()

    def searched(key: Key, *arguments: object) -> Decision:
        tuned.append(key.gemm.m)
        return search(key, *arguments)

    def proved(key: Key, *arguments: object) -> str:
        proven.append(padded_rows(key.gemm.m))
        return proof(key, *arguments)

    monkeypatch.setattr(policy, "search_here", searched)
    monkeypatch.setattr(policy, "plan_fault", proved)
    lengths = [20 + 11 * (29 * i % 64) for i in range(64)]
    buckets, plans = {bucket(n) for n in lengths}, {padded_rows(n) for n in lengths}
    assert len(set(lengths)) == 64 and len(buckets) == 8 and len(plans) > 40

    def train() -> None:
        layer, _, _ = linear(sdgp.SDGPConfig(prune="magnitude"))
        for tokens in lengths:
            x = torch.randn(tokens, 32, dtype=torch.bfloat16, requires_grad=True)
            grad_output = torch.randn(tokens, 64, dtype=torch.bfloat16)
            layer(x).backward(grad_output)
            assert_product(x.grad, sdgp.prune(grad_output), layer.weight.detach())
        assert dict(layer.sdgp_record.calls) == {("grad_input", "sparse"): len(lengths)}

    train()
    assert sorted(tuned) == sorted(buckets)
    # A search proves the top of its bucket.
    assert sorted(proven) == sorted(plans - buckets)
    tuned.clear()
    proven.clear()
    monkeypatch.setattr(store, "_default", store.TuningCache(store.default_cache().folder))
    dispatch.forget()
    train()
    assert not tuned and sorted(proven) == sorted(plans), "the next process reads and proves"


def test_what_cannot_win_on_a_card_runs_plain_without_a_word(
    emulated: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {**emulated.machine.key(torch.device("cpu")), "device": "NVIDIA A100-SXM4-80GB"}
    monkeypatch.setattr(emulated.machine, "key", lambda device: key)
    layer, x, grad_output = linear(sdgp.SDGPConfig(prune="magnitude"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x).backward(grad_output)
    assert dict(layer.sdgp_record.calls) == {("grad_input", "plain"): 1}
    assert torch.equal(x.grad, grad_output @ layer.weight.detach())


def test_untuned_shapes_run_plain_and_say_so(emulated: CusparseLtBackend) -> None:
    layer, x, grad_output = linear(sdgp.SDGPConfig(prune="magnitude", tune="ahead"))
    with pytest.warns(sdgp.SDGPFallbackWarning, match="not tuned yet: run sdgp tune"):
        layer(x).backward(grad_output)
    assert dict(layer.sdgp_record.calls) == {("grad_input", "plain"): 1}
    strict, x, grad_output = linear(
        sdgp.SDGPConfig(prune="magnitude", tune="ahead", on_unsupported="raise")
    )
    with pytest.raises(sdgp.NotSupportedError, match="not tuned yet"):
        strict(x).backward(grad_output)


@pytest.mark.parametrize("kind", [Bad.ALWAYS_WRONG, Bad.NON_DETERMINISTIC, Bad.GIVES_NAN])
def test_all_algorithms_bad_means_plain(
    emulated: CusparseLtBackend, emulator: Emulator, kind: Bad
) -> None:
    emulator.max_alg_id(2)
    for alg_id in range(2):
        emulator.bad_algorithm(alg_id, kind)
    layer, x, grad_output = linear(NEVER.replace(tune="first_use"))
    with pytest.warns(sdgp.SDGPFallbackWarning):
        layer(x).backward(grad_output)
    assert dict(layer.sdgp_record.calls) == {("grad_input", "plain"): 1}
    assert torch.equal(x.grad, grad_output @ layer.weight.detach())


def test_a_layer_that_fails_a_check_goes_plain_and_names_the_element(
    emulated: CusparseLtBackend, emulator: Emulator
) -> None:
    layer, x, grad_output = linear(NEVER.replace(check_every=2))
    for _ in range(2):
        x.grad = None
        layer(x).backward(grad_output)
    assert layer.sdgp_record.calls["grad_input", "sparse"] == 2
    emulator.bad_algorithm(0, Bad.ALWAYS_WRONG)  # proven before; goes bad now
    emulated.plans.clear()
    x.grad = None
    words = r"Linear: grad_input .* it failed a check against dense: M=64 N=32 K=64 bfloat16"
    with pytest.warns(sdgp.SDGPFallbackWarning, match=words) as caught:
        layer(x).backward(grad_output)
    assert "alg_id=0" in str(caught[0].message)
    assert torch.equal(x.grad, grad_output @ layer.weight.detach())
    assert layer.sdgp_record.calls["grad_input", "plain"] == 1
    layer(x).backward(grad_output)
    assert layer.sdgp_record.calls["grad_input", "plain"] == 2


def test_a_failed_check_raises_where_falling_back_is_forbidden(
    emulated: CusparseLtBackend, emulator: Emulator
) -> None:
    layer, x, grad_output = linear(NEVER.replace(check_every=1, on_unsupported="raise"))
    layer(x).backward(grad_output)
    emulator.bad_algorithm(0, Bad.ALWAYS_WRONG)
    emulated.plans.clear()
    with pytest.raises(sdgp.EquivalenceError, match="Linear: grad_input is not used: it failed"):
        layer(x).backward(grad_output)


def test_checks_of_every_product_pass_on_a_sound_library(emulated: CusparseLtBackend) -> None:
    config = NEVER.replace(check_every=1, grad_weight="sparse")
    model = net(config)
    with said():
        gradients(model)
    for module in model.modules():
        if hasattr(module, "sdgp_record"):
            assert not module.sdgp_record.broken
            way = "plain" if module.sdgp_record.name == "spatial" else "sparse"
            assert module.sdgp_record.calls["grad_input", way] == 2


def test_compiled_layers_take_the_same_way(emulated: CusparseLtBackend) -> None:
    torch._dynamo.reset()
    layer, x, grad_output = linear(NEVER)
    before = COMPILED.calls["grad_input", "sparse"]
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).backward(grad_output)
    assert COMPILED.calls["grad_input", "sparse"] == before + 1
    reference = sdgp.prune(grad_output).float() @ layer.weight.detach().float()
    assert (x.grad.float() - reference).norm() <= 2 * EPS * reference.norm()


def test_decisions_are_looked_up_once_per_problem(
    emulated: CusparseLtBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, grad_output = linear(NEVER)
    layer(x).backward(grad_output)
    monkeypatch.setattr(routes, "decision_for", None)  # would raise if it were called
    layer(x).backward(grad_output)
    assert layer.sdgp_record.calls["grad_input", "sparse"] == 2
