"""Whatever keeps a product from running sparse on a device that could: torch's own result, to the
bit, one message, no exception. The emulator stands for the library and a CPU for the GPU."""

import copy
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.gemm import Candidate
from sdgp_cusparselt.products import packers, routes
from tests.emulator.control import Bad
from tests.products.worlds import NEVER, REFUSED, World, misaligned_linear, prepared, step

Outcome = Callable[[World], tuple[nn.Module, dict[str, object]]]
OUTCOMES: dict[str, tuple[Outcome, str]] = {}


def outcome(words: str) -> Callable[[Outcome], Outcome]:
    """Enter a line of the table: how it comes about, and words of what is said of it."""

    def enter(make: Outcome) -> Outcome:
        OUTCOMES[make.__name__] = make, words
        return make

    return enter


@outcome("not tuned yet")
def not_tuned(world: World) -> tuple[nn.Module, dict[str, object]]:
    return world.linear(), {"tune": "ahead"}


@outcome("none of")
def no_algorithm_is_right(world: World) -> tuple[nn.Module, dict[str, object]]:
    for alg_id in range(4):
        world.emulator.bad_algorithm(alg_id, Bad.ALWAYS_WRONG)
    return world.linear(), {"tune": "first_use"}


@outcome("CusparseLtError")
def refused_at_plan(world: World) -> tuple[nn.Module, dict[str, object]]:
    decision = SimpleNamespace(use="sparse", candidate=Candidate(0), transient=False)
    world.patch.setattr(routes, "decision_for", lambda *a, **k: decision)
    world.emulator.bad_algorithm(0, Bad.NOT_SUPPORTED_AT_PLAN)
    return world.linear(), {}


@outcome("it failed while it ran: CusparseLtError")
def refused_at_run(world: World) -> tuple[nn.Module, dict[str, object]]:
    prepared(world)
    world.emulator.fail("cusparseLtMatmul", REFUSED)
    return world.linear(), {}


@outcome("OutOfMemoryError")
def out_of_memory_while_tuning(world: World) -> tuple[nn.Module, dict[str, object]]:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    world.patch.setattr(routes, "decision_for", world.raising(error))
    return world.linear(), {}


@outcome("it failed while it ran: OutOfMemoryError")
def out_of_memory_while_packing(world: World) -> tuple[nn.Module, dict[str, object]]:
    prepared(world)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    world.patch.setattr(packers.ReferencePacker, "__call__", world.raising(error))
    return world.linear(), {}


@outcome("PermissionError")
def unwritable_cache(world: World) -> tuple[nn.Module, dict[str, object]]:
    world.patch.setattr(routes, "decision_for", world.raising(PermissionError("/cache")))
    return world.linear(), {}


@outcome("float16 failed its self-test")
def self_test_failed(world: World) -> tuple[nn.Module, dict[str, object]]:
    error = sdgp.NotSupportedError("float16 failed its self-test on this GPU: illegal instruction")
    world.patch.setattr(routes, "decision_for", world.raising(error))
    return world.linear(dtype=torch.float16), {}


@outcome("before the graph was captured")
def capture_without_a_plan(world: World) -> tuple[nn.Module, dict[str, object]]:
    world.patch.setattr(routes, "is_capturing", lambda device: True)
    return world.linear(), {}


@outcome("float32 runs 1:2")
def wrong_dtype(world: World) -> tuple[nn.Module, dict[str, object]]:
    return world.linear(dtype=torch.float32), {}


@outcome(r"K \(outputs\) is 24")
def narrow(world: World) -> tuple[nn.Module, dict[str, object]]:
    return world.linear(outputs=24), {}


@outcome("only an unpadded 1x1 convolution")
def k_by_k(world: World) -> tuple[nn.Module, dict[str, object]]:
    layer = nn.Conv2d(32, 64, 3, padding=1).bfloat16()
    return layer.to(memory_format=torch.channels_last), {}


@outcome("would have to be copied")
def misaligned(world: World) -> tuple[nn.Module, dict[str, object]]:
    return misaligned_linear(), {}


@outcome("CusparseLtError")
def a_second_device_that_the_library_refuses(
    world: World,
) -> tuple[nn.Module, dict[str, object]]:
    decision = SimpleNamespace(use="sparse", candidate=Candidate(0), transient=False)
    world.patch.setattr(routes, "decision_for", lambda *a, **k: decision)
    world.emulator.fail("cusparseLtInit", 7)  # INTERNAL_ERROR, as seen with several GPUs
    return world.linear(), {}


@outcome("the product is empty")
def zero_tokens(world: World) -> tuple[nn.Module, dict[str, object]]:
    layer = world.linear()
    layer.tokens = 0
    return layer, {}


@outcome("no pack kernel can be compiled: Failed to find C compiler")
def no_c_compiler(world: World) -> tuple[nn.Module, dict[str, object]]:
    reason = "no pack kernel can be compiled: Failed to find C compiler; install gcc, or set CC"
    world.patch.setattr(world.backend.machine, "_software", [reason])
    return world.linear(), {}


@outcome("no libcusparseLt")
def no_library(world: World) -> tuple[nn.Module, dict[str, object]]:
    world.patch.setattr(world.backend.machine, "_software", ["no libcusparseLt was found"])
    return world.linear(), {}


@pytest.mark.parametrize("grad_weight", ["dense", "sparse"])
@pytest.mark.parametrize("name", OUTCOMES)
def test_the_outcome_is_torchs_own_result(world: World, name: str, grad_weight: str) -> None:
    make, words = OUTCOMES[name]
    layer, changes = make(world)
    twin = copy.deepcopy(layer)
    if name == "misaligned":  # a copy is aligned
        assert layer.weight.data_ptr() % 16 and twin.weight.data_ptr() % 16 == 0
    config = sdgp.SDGPConfig(
        **(NEVER | {"grad_weight": grad_weight, "grad_weight_prune": "magnitude"} | changes)
    )
    sdgp.convert_(layer, config)
    expected, record = step(twin), layer.sdgp_record
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            found = step(layer)
            # An outcome of grad_input alone leaves grad_weight sparse.
            alone = record.calls["grad_weight", "sparse"] > 0
            for ours, torchs in zip(found[:1] if alone else found, expected, strict=not alone):
                assert torch.equal(ours, torchs)
    said = [str(w.message) for w in caught if w.category is sdgp.SDGPFallbackWarning]
    # The products of one layer may differ in their reasons: K of one is M of the other.
    assert len(said) == 1 or (grad_weight == "sparse" and len(set(said)) == 2), said
    assert re.search(words, said[0])
    assert record.calls["grad_input", "plain"] == 3
    assert {way for product, way in record.calls if product == "grad_input"} == {"plain"}
    assert sum(record.fallbacks[key] for key in record.fallbacks if key[0] == "grad_input") >= 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(layer)


@pytest.mark.parametrize("transposed", [False, True])
def test_grad_weight_alone_is_torchs_own_however_the_weight_lies(
    world: World, transposed: bool
) -> None:
    """torch multiplies in the weight's order, and bits depend on the order of a product."""
    torch.manual_seed(5)
    memory = torch.randn(384, 64).t() if transposed else torch.randn(64, 384)
    ours, torchs = (memory.detach().requires_grad_() for _ in range(2))
    x, grad_output = torch.randn(300, 384), torch.randn(300, 64)  # float32 never runs sparse
    config = sdgp.SDGPConfig(**NEVER, grad_weight="sparse", grad_weight_prune="magnitude")
    output = sdgp.functional.linear(x, ours, config=config)
    with pytest.warns(sdgp.SDGPFallbackWarning, match="float32 runs 1:2"):
        (found,) = torch.autograd.grad(output, ours, grad_output)
    (expected,) = torch.autograd.grad(nn.functional.linear(x, torchs), torchs, grad_output)
    assert torch.equal(found, expected) and found.stride() == expected.stride()
