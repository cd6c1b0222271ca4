"""Prepared calls: kept, bounded, a thread's own, given up when what they rest on is gone."""

import threading
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt import devices
from sdgp_cusparselt.backends import machine as machine_module
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.commands.parser import main
from sdgp_cusparselt.products import dispatch, routes, sparse
from sdgp_cusparselt.products.operands import LinearGradInput
from sdgp_cusparselt.recording.records import LayerRecord
from sdgp_cusparselt.tuning import store
from tests.products.worlds import NEVER, REFUSED, World, misaligned_linear, step


def test_a_failed_call_bars_its_kind_and_no_other(world: World) -> None:
    config = sdgp.SDGPConfig(**NEVER)
    first, second = world.linear(), world.linear(outputs=48)
    for layer in (first, second):
        sdgp.convert_(layer, config)
        step(layer)
    world.emulator.fail("cusparseLtMatmul", REFUSED)
    with pytest.warns(sdgp.SDGPFallbackWarning):
        step(first)
    step(first)
    step(second)
    assert first.sdgp_record.calls == {("grad_input", "sparse"): 1, ("grad_input", "plain"): 2}
    assert second.sdgp_record.calls == {("grad_input", "sparse"): 2}


def test_a_pair_that_fails_runs_both_products_by_themselves(world: World) -> None:
    config = sdgp.SDGPConfig(**NEVER, grad_weight="sparse", grad_weight_prune="magnitude")
    layer = world.linear()
    sdgp.convert_(layer, config)
    expected = step(layer)
    step(layer)
    world.emulator.fail("cusparseLtMatmul", REFUSED)
    for ours, before in zip(step(layer), expected, strict=True):
        assert torch.equal(ours, before)
    assert layer.sdgp_record.calls == {("grad_input", "sparse"): 3, ("grad_weight", "sparse"): 3}


def test_capture_is_not_remembered(world: World) -> None:
    layer = world.linear()
    sdgp.convert_(layer, sdgp.SDGPConfig(**NEVER))
    with world.patch.context() as patch:
        patch.setattr(routes, "is_capturing", lambda device: True)
        with pytest.warns(sdgp.SDGPFallbackWarning):
            step(layer)
        assert world.emulator.calls("cusparseLtMatmulPlanInit") == 0
    step(layer)
    assert layer.sdgp_record.calls == {("grad_input", "plain"): 1, ("grad_input", "sparse"): 1}


def test_what_was_prepared_runs_under_capture(world: World) -> None:
    layer = world.linear()
    sdgp.convert_(layer, sdgp.SDGPConfig(**NEVER))
    step(layer)
    world.patch.setattr(routes, "is_capturing", lambda device: True)
    step(layer)
    assert layer.sdgp_record.calls == {("grad_input", "sparse"): 2}


def test_a_reason_that_may_pass_is_looked_at_again(world: World) -> None:
    layer = world.linear()
    sdgp.convert_(layer, sdgp.SDGPConfig(**NEVER))
    with world.patch.context() as patch:
        patch.setattr(routes, "decision_for", world.raising(torch.OutOfMemoryError("full")))
        with pytest.warns(sdgp.SDGPFallbackWarning):
            step(layer)
    for _ in range(routes.ASK_AGAIN):
        step(layer)
    assert layer.sdgp_record.calls["grad_input", "plain"] == routes.ASK_AGAIN
    assert layer.sdgp_record.calls["grad_input", "sparse"] == 1


def test_an_evicted_plan_is_made_again(world: World) -> None:
    layer = world.linear()
    sdgp.convert_(layer, sdgp.SDGPConfig(**NEVER))
    expected = step(layer)
    world.backend.plans.clear()
    for ours, before in zip(step(layer), expected, strict=True):
        assert torch.equal(ours, before)
    assert layer.sdgp_record.calls == {("grad_input", "sparse"): 2}


def test_prepared_calls_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.prepared, "LIMIT", 4)
    config, record = sdgp.SDGPConfig(**NEVER), LayerRecord("here")
    weight = torch.randn(64, 32).bfloat16()
    for tokens in range(16, 16 * 12, 16):
        dispatch.run(LinearGradInput(torch.randn(tokens, 64).bfloat16(), weight), config, record)
    assert len(dispatch.prepared.calls.single) == 4
    assert record.calls == {("grad_input", "sparse"): 11}


def test_threads_prepare_calls_of_their_own(world: World) -> None:
    world.emulator.thread_check()
    layer = world.linear()
    sdgp.convert_(layer, sdgp.SDGPConfig(**NEVER))
    step(layer)
    seen: list[int] = []

    def work() -> None:
        seen.append(len(dispatch.prepared.calls.single))
        g = torch.randn(48, 64).bfloat16()
        operands = LinearGradInput(g, layer.weight.detach())
        dispatch.run(operands, layer.sdgp_config, layer.sdgp_record)
        seen.append(len(dispatch.prepared.calls.single))
        world.backend.plans.clear()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0, 1]
    assert layer.sdgp_record.calls == {("grad_input", "sparse"): 2}


def test_a_folder_that_cannot_be_written_keeps_proofs_in_memory(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    world.patch.setenv("SDGP_CACHE_DIR", str(tmp_path / "file" / "below"))
    world.patch.setattr(store, "_default", store.TuningCache(tmp_path / "file" / "decisions"))
    layer = world.linear()
    sdgp.convert_(layer, sdgp.SDGPConfig(**(NEVER | {"tune": "first_use"})))
    with pytest.warns(sdgp.SDGPCacheWarning):
        step(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(layer)
    assert sum(layer.sdgp_record.calls.values()) == 2


def test_reasons_ask_the_tensors_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs: the second is too old, whatever the first can do."""
    capabilities = {0: (9, 0), 1: (7, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_capability",
        lambda device: capabilities[device if isinstance(device, int) else device.index],
    )
    machine = Machine("cuda")
    assert machine.hardware_reasons() == []
    assert machine.hardware_reasons(torch.device("cuda:0")) == []
    (reason,) = machine.hardware_reasons(torch.device("cuda:1"))
    assert "7.0" in reason
    (reason,) = machine.hardware_reasons(torch.device("cpu"))
    assert reason == "the tensors are on cpu, not on cuda"


def test_a_compiler_that_is_missing_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Driver:
        @property
        def active(self) -> None:
            asked.append(1)
            raise RuntimeError("Failed to find C compiler. Please specify via CC")

    import triton.runtime

    monkeypatch.setattr(triton.runtime, "driver", Driver())
    machine = Machine("cuda", library=object())
    (reason,) = machine.software_reasons()
    assert reason.startswith("no pack kernel can be compiled: Failed to find C compiler")
    assert machine.software_reasons() == [reason] and len(asked) == 1
    assert machine_module.compiler_fault() is not None


def plainly(layer: nn.Module, tokens: int = 48) -> bool:
    """Ask what a layer's forward asks."""
    x = torch.empty(tokens, 32, dtype=layer.weight.dtype)
    arguments = (x, layer.weight, x.dtype, layer.sdgp_config, layer.sdgp_record)
    return dispatch.linear_is_plain(*arguments)


@pytest.mark.parametrize("grad_weight", ["dense", "sparse"])
@pytest.mark.filterwarnings("ignore::sdgp_cusparselt.errors.SDGPFallbackWarning")
def test_what_runs_plain_is_known_to_a_layers_forward(world: World, grad_weight: str) -> None:
    layer, other = world.linear(outputs=24), world.linear()
    config = sdgp.SDGPConfig(**NEVER, grad_weight=grad_weight)
    for one in (layer, other):
        sdgp.convert_(one, config)
        assert not plainly(one)
        step(one)
    assert plainly(layer) and not plainly(layer, tokens=32) and not plainly(other)
    expected = {("grad_input", "plain"): 2} | (
        {("grad_weight", "plain"): 2} if grad_weight == "sparse" else {}
    )
    assert layer.sdgp_record.calls == expected, "it is counted like a backward pass"
    layer.sdgp_config = config.replace(telemetry_every=4)
    assert not plainly(layer), "samples are taken in backward"
    layer.sdgp_config = config
    with sdgp.record_shapes():
        assert not plainly(layer), "shapes are recorded in backward"
    layer.sdgp_record.broken["grad_input"] = "it failed a check"
    assert not plainly(layer)


@pytest.mark.filterwarnings("ignore::sdgp_cusparselt.errors.SDGPFallbackWarning")
def test_what_may_pass_does_not_freeze_a_forward(world: World) -> None:
    layer = world.linear()
    sdgp.convert_(layer, sdgp.SDGPConfig(**(NEVER | {"tune": "ahead"})))
    step(layer)
    answers = [plainly(layer) for _ in range(routes.ASK_AGAIN)]
    assert answers == [True] * (routes.ASK_AGAIN - 1) + [False]


@pytest.mark.filterwarnings("ignore::sdgp_cusparselt.errors.SDGPFallbackWarning")
def test_where_a_tensor_lies_is_not_known_to_a_forward(world: World) -> None:
    layer = misaligned_linear()
    sdgp.convert_(layer, sdgp.SDGPConfig(**NEVER))
    step(layer)
    assert layer.sdgp_record.calls == {("grad_input", "plain"): 1} and not plainly(layer)


def test_routes_ask_about_the_device_of_the_tensors(world: World) -> None:
    asked: list[torch.device | None] = []

    def reasons(device: torch.device | None = None) -> list[str]:
        asked.append(device)
        return []

    world.patch.setattr(world.backend.machine, "hardware_reasons", reasons)
    layer = world.linear()
    sdgp.convert_(layer, sdgp.SDGPConfig(**NEVER))
    step(layer)
    assert asked == [torch.device("cpu")]


def test_another_device_is_made_current_for_pack_and_product(world: World) -> None:
    made: list[int] = []

    class Guard:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            made.append(self.index)

        def __exit__(self, *error: object) -> None:
            made.append(-1)

    operands = LinearGradInput(torch.randn(48, 64).bfloat16(), torch.randn(64, 32).bfloat16())
    product = sparse.SparseProduct(operands, sdgp.SDGPConfig(**NEVER), world.backend)
    expected = product(operands)
    assert not made
    product.index = 1
    product.current_device = lambda: 1 if made and made[-1] == 1 else 0
    world.patch.setattr(torch.cuda, "device", Guard)
    assert torch.equal(product(operands), expected)
    assert made == [1, -1]


def test_packing_by_hand_makes_the_tensors_device_current(world: World) -> None:
    seen: list[torch.device] = []

    def on_device(device: torch.device) -> AbstractContextManager[None]:
        seen.append(device)
        return nullcontext()

    world.patch.setattr("sdgp_cusparselt.products.by_hand.on_device", on_device)
    world.patch.setattr("sdgp_cusparselt.commands.check.on_device", on_device)
    world.patch.setattr("sdgp_cusparselt.commands.check.CASES", ())
    sdgp.pack(torch.randn(32, 64).bfloat16())
    assert seen == [torch.device("cpu")]
    assert main(["check", "--device", "cpu"]) == 0
    assert seen == [torch.device("cpu")] * 2


def test_a_capture_is_asked_of_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs: a graph is captured on the second, while the first is current."""
    current = [0]

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *error: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    assert devices.is_capturing(torch.device("cuda:1"))
    assert not devices.is_capturing(torch.device("cuda:0"))
    assert not devices.is_capturing(torch.device("cpu"))


def test_what_breaks_a_rule_is_not_multiplied_by_force(world: World) -> None:
    operands = LinearGradInput(torch.randn(48, 24).bfloat16(), torch.randn(24, 32).bfloat16())
    with pytest.raises(sdgp.NotSupportedError, match="K .outputs. is 24"):
        sparse.sparse_product(world.backend, operands, sdgp.SDGPConfig(**NEVER))
