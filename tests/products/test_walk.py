"""How few Python functions a product enters, and how little it makes, once it is prepared."""

import gc
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.products import dispatch, packers, prepared
from sdgp_cusparselt.products.operands import LinearGradInput, LinearGradWeight
from sdgp_cusparselt.recording.records import LayerRecord
from tests.products import null_launch

CONFIG = sdgp.SDGPConfig(tune="never", grad_weight="sparse")
#: Python frames from a layer's backward to the launch.
LIMIT = 12
GRADIENT = torch.randn(2, 24, 32).bfloat16()
WEIGHT, INPUT = torch.randn(32, 16).bfloat16(), torch.randn(48, 16).bfloat16()


def grad_input(record: LayerRecord) -> None:
    dispatch.run(LinearGradInput(GRADIENT, WEIGHT), CONFIG, record)


def both(record: LayerRecord) -> None:
    first = LinearGradInput(GRADIENT, WEIGHT)
    dispatch.run_both(first, LinearGradWeight(GRADIENT.view(-1, 32), INPUT), CONFIG, record)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[LayerRecord]:
    record = LayerRecord("walk")
    with null_launch.null_launches(monkeypatch) as arm:
        both(record)
        arm()
        for _ in range(3):
            both(record)
            grad_input(record)
        yield record


def entered(call: Callable[[], None]) -> list[str]:
    """Return the Python functions that a call enters up to the last launch, this one left out."""
    names: list[str] = []

    def see(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            names.append(frame.f_code.co_qualname)

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    last = len(names) - names[::-1].index("launch")
    return names[1:last]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code objects have no qualified names")
@pytest.mark.parametrize("product", [grad_input, both])
def test_the_way_to_the_launch_is_short(
    record: LayerRecord, product: Callable[[LayerRecord], None]
) -> None:
    names = entered(lambda: product(record))[1:]
    assert names[-1] == "launch" and "draw_seeds" in names
    assert names.count("launch") == 1, "one read of the gradient"
    keys = sum(name.endswith((".key", ".__init__")) for name in names)
    allowed = LIMIT if product is grad_input else LIMIT + keys // 2
    assert len(names) <= allowed, names


def test_a_layers_backward_stands_few_frames_above_the_launch(
    record: LayerRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Linear(16, 32, bias=False).bfloat16()  # the sizes that are prepared
    sdgp.convert_(layer, CONFIG)
    output = layer(torch.randn(2, 24, 16, dtype=torch.bfloat16, requires_grad=True))
    stacks: list[list[str]] = []

    def look(*arguments: object) -> None:
        frame, names = sys._getframe(), []
        while frame is not None and frame.f_code.co_name != "backward":
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        stacks.append(names)

    monkeypatch.setattr(null_launch, "launch", look)
    output.backward(GRADIENT)
    assert layer.sdgp_record.calls == {("grad_input", "sparse"): 1, ("grad_weight", "sparse"): 1}
    assert stacks and all(len(names) <= LIMIT for names in stacks), stacks


def test_nothing_is_resolved_twice(record: LayerRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later call is a look-up: what resolves would raise."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("resolved again")

    for module, name in (("prepared", "prepare"), ("routes", "route_of"), ("sparse", "_matrices")):
        monkeypatch.setattr(f"sdgp_cusparselt.products.{module}.{name}", never)
    grad_input(record)
    both(record)


def test_prepared_calls_keep_no_tensor_and_make_two(record: LayerRecord) -> None:
    made: list[tuple[int, ...]] = []
    real = torch.empty

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(args)
        return real(*args, **kwargs)

    torch.empty = counting
    try:
        grad_input(record)
        assert len(made) == 2, "one buffer and the result"
        made.clear()
        both(record)
        assert len(made) == 3, "one buffer and two results"
    finally:
        torch.empty = real
    seen: set[int] = set()
    open_: list[object] = [*prepared.calls.single.values(), *prepared.calls.both.values()]
    ours = ("sdgp_cusparselt.products", "sdgp_cusparselt.packing", "builtins")
    while open_:
        one = open_.pop()
        if id(one) in seen or not type(one).__module__.startswith(ours):
            continue
        seen.add(id(one))
        assert not isinstance(one, torch.Tensor)
        open_ += [x for x in gc.get_referents(one) if not isinstance(x, type(sys))]


def test_a_captured_graph_draws_from_memory(
    record: LayerRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds by value would be the same at every replay."""
    seen: list[tuple[object, ...]] = []
    words = torch.tensor([3, 4])
    monkeypatch.setattr(packers, "draw_seeds", lambda device: words)
    monkeypatch.setattr(null_launch, "launch", lambda *given: seen.append(given))
    for call in prepared.calls.single.values():
        pack = call.sparse.pack
        pack.start_captured = pack._prepare(torch.empty(48, 32), in_memory=True)
        assert pack.start_captured.seeds_in_memory and not pack.start.seeds_in_memory
    grad_input(record)
    (given,) = seen
    assert words.data_ptr() in given
