"""Layers behind a producer: one line makes, packs and multiplies what the ordinary way does."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.errors import CusparseLtError
from sdgp_cusparselt.packing import launch
from sdgp_cusparselt.packing.layout import PLAIN
from sdgp_cusparselt.products import maker_check, makers, prepared, produced, produced_run
from sdgp_cusparselt.products.makers import Asked, KernelMaker
from sdgp_cusparselt.products.packers import Wanted
from sdgp_cusparselt.products.produced import FusedLinear, LayerGradients, Needs, produced_grads
from sdgp_cusparselt.products.produced_layers import apart
from sdgp_cusparselt.products.produced_line import ProducedLine
from sdgp_cusparselt.pruning.producers import (
    ActivationBackward,
    CrossEntropyBackward,
    Producer,
)
from sdgp_cusparselt.recording.records import LayerRecord
from tests.products.worlds import World

ALL = Needs(True, True, True)
TOKENS, OUT, IN = 48, 64, 32
needs_interpreter = pytest.mark.skipif(
    not launch.interpreted(), reason="needs Triton's interpreter: TRITON_INTERPRET=1 and no GPU"
)


def producer_of(name: str, dtype: torch.dtype = torch.bfloat16) -> Producer:
    if name == "cross_entropy":
        logits = (3 * torch.randn(TOKENS, OUT)).to(dtype)
        row_scale = torch.where(torch.arange(TOKENS) % 7 == 3, 0.0, 0.25)
        target = torch.randint(OUT, (TOKENS,))
        return CrossEntropyBackward(
            logits, logits.float().logsumexp(1), target, row_scale, 0.1, 1e-3
        )
    activation, *more = name.split()
    shape = (3, TOKENS // 3, OUT)
    upstream, pre, up = (torch.randn(shape).to(dtype) for _ in range(3))
    mask = torch.rand(shape) < 0.7 if "masked" in more else None
    gate = up if "gated" in more else None
    return ActivationBackward(activation, upstream, pre, gate, mask, 1 / 0.7)


def layers_of(
    producer: Producer, config: sdgp.SDGPConfig, needs: Needs = ALL
) -> tuple[FusedLinear, ...]:
    gradients = producer.gradients()
    leading, dtype = gradients[0].shape[:-1], gradients[0].dtype
    x = torch.randn(*leading, IN).to(dtype)
    return tuple(
        FusedLinear(
            torch.randn(OUT, IN).to(dtype) if needs.input else None,
            x if needs.weight else None,
            needs,
            True,
            config,
            LayerRecord(f"layer {number}"),
        )
        for number in range(len(gradients))
    )


def lines() -> list[ProducedLine]:
    return [one for one in prepared.calls.produced.values() if one is not produced_run.UNFUSED]


def assert_equal(found: tuple[LayerGradients, ...], want: tuple[LayerGradients, ...]) -> None:
    for ours, truth in zip(found, want, strict=True):
        for one, other in ((ours.input, truth.input), (ours.weight, truth.weight)):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.shape == other.shape and torch.equal(one, other)
        if truth.bias is not None:
            assert ours.bias is not None and ours.bias.dtype == truth.bias.dtype
            # Two ways of summing in float32, each rounded once.
            torch.testing.assert_close(ours.bias, truth.bias, rtol=2**-7, atol=2**-10)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many gradients were made by lines."""
    made: list[int] = []
    call = makers.ReferenceMaker.__call__

    def counting(self: makers.ReferenceMaker, *arguments: object) -> None:
        made.append(1)
        call(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(makers.ReferenceMaker, "__call__", counting)
    yield made


NAMES = ("gelu", "silu gated", "relu_squared masked", "gelu_tanh gated masked", "cross_entropy")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prune, grad_weight", [("magnitude", "dense"), ("mvue", "sparse")])
def test_a_line_gives_what_the_layers_own_backward_gives(
    world: World, counted: list[int], name: str, prune: str, grad_weight: str
) -> None:
    config = sdgp.SDGPConfig(prune=prune, tune="never", grad_weight=grad_weight)
    producer = producer_of(name)
    layers = layers_of(producer, config)
    produced_grads(producer, layers)  # prepares
    assert len(lines()) == 1 and not counted
    before = [dict(layer.record.calls) for layer in layers]  # type: ignore[union-attr]
    torch.manual_seed(7)
    found = produced_grads(producer, layers)
    assert counted == [1]
    torch.manual_seed(7)
    want = apart(producer.gradients(), layers)
    assert_equal(found, want)
    for layer, old in zip(layers, before, strict=True):
        calls = layer.record.calls  # type: ignore[union-attr]
        assert calls["grad_input", "sparse"] == old["grad_input", "sparse"] + 2
        if grad_weight == "sparse":
            assert calls["grad_weight", "sparse"] == old["grad_weight", "sparse"] + 2
    assert lines()[0].asked.dense == (grad_weight == "dense")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("needs", [Needs(True, False, False), Needs(False, True, True)])
def test_only_what_is_needed_is_made(
    world: World, counted: list[int], name: str, needs: Needs
) -> None:
    config = sdgp.SDGPConfig(prune="magnitude", tune="never", grad_weight="sparse")
    producer = producer_of(name)
    layers = layers_of(producer, config, needs)
    produced_grads(producer, layers)
    torch.manual_seed(7)
    found = produced_grads(producer, layers)
    assert counted == [1]
    for one in found:
        assert [g is not None for g in one] == list(needs)
    torch.manual_seed(7)
    assert_equal(found, apart(producer.gradients(), layers))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_prune_then_multiply(name: str) -> None:
    """On a CPU, in float64: the twin, pruned by ``prune``, and one product."""
    config = sdgp.SDGPConfig(prune="magnitude", grad_weight="sparse", grad_weight_prune="magnitude")
    producer = producer_of(name, torch.float64)
    layers = layers_of(producer, config)
    for _ in range(2):
        found = produced_grads(producer, layers)
    for gradient, layer, ours in zip(producer.gradients(), layers, found, strict=True):
        flat = gradient.reshape(-1, OUT)
        assert layer.weight is not None and layer.input is not None
        want = sdgp.prune(gradient, method="magnitude") @ layer.weight
        torch.testing.assert_close(ours.input, want)
        turned = sdgp.prune(flat, method="magnitude", dim=0).t() @ layer.input.view(-1, IN)
        torch.testing.assert_close(ours.weight, turned)
        torch.testing.assert_close(ours.bias, flat.sum(0))


@pytest.mark.parametrize("name", NAMES[:4])
def test_without_pruning_they_are_autograds(name: str) -> None:
    """In float64, of the unfused layers."""
    producer = producer_of(name, torch.float64)
    assert isinstance(producer, ActivationBackward)
    x = torch.randn(3, TOKENS // 3, IN, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(OUT, IN, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    pre, up = x @ weights[0].t(), x @ weights[1].t()
    gated = producer.up is not None
    from sdgp_cusparselt.pruning.producers import forward

    hidden = forward(producer.activation, pre, up if gated else None, producer.mask, producer.scale)
    used = weights if gated else weights[:1]
    x_grad, *want = torch.autograd.grad(hidden, [x, *used], producer.upstream)
    producer.pre, producer.up = pre.detach(), up.detach() if gated else None
    config = sdgp.SDGPConfig(prune="none")
    layers = tuple(
        FusedLinear(w.detach(), x.detach(), ALL, True, config, LayerRecord("one")) for w in used
    )
    found = produced_grads(producer, layers)
    inputs = [one.input for one in found if one.input is not None]
    torch.testing.assert_close(sum(inputs[1:], inputs[0]), x_grad)
    for one, grad_weight in zip(found, want, strict=True):
        torch.testing.assert_close(one.weight, grad_weight)


def test_a_line_that_fails_is_not_used_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sdgp.SDGPConfig(prune="magnitude", tune="never")
    producer = producer_of("silu gated")
    layers = layers_of(producer, config)
    want = produced_grads(producer, layers)
    assert len(lines()) == 1
    failed: list[int] = []

    def fail(*arguments: object) -> None:
        failed.append(1)
        raise CusparseLtError(10, "CUSPARSE_STATUS_NOT_SUPPORTED", "cusparseLtMatmul")

    monkeypatch.setattr(makers.ReferenceMaker, "__call__", fail)
    for _ in range(3):
        assert_equal(produced_grads(producer, layers), want)
    assert failed == [1] and not lines()


@pytest.mark.parametrize(
    "change",
    [{"prune": "rescaled_magnitude"}, {"telemetry_every": 2}, {"check_every": 2}],
    ids=lambda change: next(iter(change)),
)
def test_what_cannot_be_fused_runs_apart(
    world: World, counted: list[int], change: dict[str, object]
) -> None:
    config = sdgp.SDGPConfig(**({"prune": "magnitude", "tune": "never"} | change))  # type: ignore[arg-type]
    producer = producer_of("gelu")
    layers = layers_of(producer, config)
    for _ in range(3):
        produced_grads(producer, layers)
    assert not counted and not lines()
    assert layers[0].record.calls["grad_input", "sparse"] == 3  # type: ignore[union-attr]


def test_tokens_that_are_no_multiple_leave_grad_weight_apart(
    world: World, counted: list[int]
) -> None:
    config = sdgp.SDGPConfig(prune="magnitude", tune="never", grad_weight="sparse")
    pre, upstream = (torch.randn(40, OUT).bfloat16() for _ in range(2))
    producer = ActivationBackward("gelu", upstream, pre)
    layers = layers_of(producer, config)
    produced_grads(producer, layers)
    torch.manual_seed(7)
    found = produced_grads(producer, layers)
    assert counted == [1] and lines()[0].asked.dense
    torch.manual_seed(7)
    assert_equal(found, apart(producer.gradients(), layers))


ASKED = {
    "both": Asked(
        Wanted(2, 16, "mvue", "mvue", PLAIN, PLAIN), dense=False, sums=False
    ),
    "features and dense": Asked(
        Wanted(2, 16, features="magnitude", features_layout=PLAIN), dense=True, sums=True
    ),
}  # fmt: skip


@needs_interpreter
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", ["silu gated", "gelu_tanh gated masked", "cross_entropy"])
def test_the_kernel_is_compared_with_its_twin(name: str, asked: str) -> None:
    columns = 256 if name == "cross_entropy" else 64
    producer = maker_check._small_producer(producer_of(name), (32, columns))
    assert makers.obstacle(producer, ASKED[asked]) is None
    assert maker_check.compare(producer, ASKED[asked]) is None


def test_smoothed_labels_need_whole_blocks() -> None:
    producer = maker_check._small_producer(producer_of("cross_entropy"), (32, 64))
    assert isinstance(producer, CrossEntropyBackward)
    why = "labels are smoothed over classes that are no multiple of 256"
    assert makers.obstacle(producer, ASKED["both"]) == why
    plain = replace(producer, label_smoothing=0.0)
    assert makers.obstacle(plain, ASKED["both"]) is None


@needs_interpreter
def test_a_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    producer = maker_check._small_producer(producer_of("gelu masked"), (32, 64))
    right = KernelMaker.__init__

    def other_scale(self: KernelMaker, one: ActivationBackward, asked: Asked) -> None:
        one = ActivationBackward(one.activation, one.upstream, one.pre, one.up, one.mask, 1.5)
        right(self, one, asked)

    monkeypatch.setattr(KernelMaker, "__init__", other_scale)
    assert "elements are wrong" in str(maker_check.compare(producer, ASKED["both"]))
    monkeypatch.undo()
    monkeypatch.setattr(maker_check, "SECOND_OFFSET", 8)
    gated = maker_check._small_producer(producer_of("gelu gated"), (32, 64))
    assert "bytes of mvue are wrong" in str(maker_check.compare(gated, ASKED["both"]))


def test_inputs_that_the_kernel_cannot_read_are_named() -> None:
    asked = ASKED["both"]
    whole = torch.randn(16, 64).bfloat16()

    def why(**changes: Tensor) -> str | None:
        fields = {"upstream": whole, "pre": whole} | changes
        return makers.obstacle(ActivationBackward("gelu", **fields), asked)  # type: ignore[arg-type]

    assert "no matrix" in str(why(pre=whole.view(4, 4, 64).transpose(0, 1)))
    assert "another dtype" in str(why(pre=whole.half()))
    assert "whole vectors" in str(why(pre=torch.randn(16, 65).bfloat16()[:, 1:]))
    assert "mask" in str(why(mask=torch.ones(16, 64)))


def test_compiled_code_takes_the_line_as_one_operator(
    world: World, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the operator is used, on a GPU, and its shapes as the compiler sees them."""
    monkeypatch.setattr(produced, "OPAQUE_ON", ["cpu"])
    config = sdgp.SDGPConfig(prune="magnitude", tune="never")
    for name, needs in (("silu gated", ALL), ("gelu masked", Needs(False, True, True))):
        producer = producer_of(name)
        layers = layers_of(producer, config, needs)
        texts = tuple(
            replace(layer, config=config.text, record=layer.record.token)  # type: ignore[union-attr]
            for layer in layers
        )
        want = produced_grads(producer, layers)
        counted.clear()
        assert_equal(produced_grads(producer, texts), want)
        assert counted == ([1] if needs.input else [])
        assert isinstance(producer, ActivationBackward)
        arguments = (
            producer.activation, producer.upstream, producer.pre, producer.up, producer.mask,
            producer.scale, [one.weight for one in layers if one.weight is not None],
            [one.input for one in layers], [need for one in layers for need in one.needs],
            [True] * len(layers), config.text, [one.record for one in texts],
        )  # fmt: skip
        torch.library.opcheck(
            produced.activated_linear_grads,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )
