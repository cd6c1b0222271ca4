"""Whatever the first call of a thread ran under, later calls give what they give without it."""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.pruning import cpu
from tests.helpers import same_bits

METHODS = ["magnitude", "rescaled_magnitude", "random", "mvue"]


def under_inference_mode(prune: Callable[[Tensor], Tensor]) -> None:
    with torch.inference_mode():
        prune(torch.randn(8, 16))


def under_fake_mode(prune: Callable[[Tensor], Tensor]) -> None:
    with FakeTensorMode():
        prune(torch.randn(8, 16))


def with_real_tensors_under_fake_mode(prune: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(8, 16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        prune(x)


def under_make_fx(prune: Callable[[Tensor], Tensor]) -> None:
    graph = make_fx(prune)(torch.randn(8, 16))
    x = torch.randn(8, 16)
    assert ((graph(x) != 0).view(8, 4, 4).sum(-1) <= 2).all()
    # A traced graph reads its own input, not what the scratch held while it was traced.
    assert (graph(x) != 0).any() and not (graph(torch.zeros(8, 16)) != 0).any()


def under_a_meta_default_device(prune: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(8, 16)
    with torch.device("meta"):
        prune(x)


def under_vmap(prune: Callable[[Tensor], Tensor]) -> None:
    with contextlib.suppress(RuntimeError):  # torch 2.8 has no batching rule for Tensor.view(dtype)
        torch.func.vmap(prune, randomness="different")(torch.randn(3, 8, 16))


def under_jit_trace(prune: Callable[[Tensor], Tensor]) -> None:
    with contextlib.suppress(RuntimeError):  # torch.jit has no Tensor.view(dtype) in some versions
        torch.jit.trace(prune, torch.randn(8, 16), check_trace=False)


FIRST_CALLS = [
    under_inference_mode,
    under_fake_mode,
    with_real_tensors_under_fake_mode,
    under_make_fx,
    under_a_meta_default_device,
    under_vmap,
    under_jit_trace,
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", FIRST_CALLS, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_first_call_under_a_mode_poisons_no_later_one(
    first: Callable[[Callable[[Tensor], Tensor]], None], method: str
) -> None:
    x = torch.randn(8, 16)
    seeded = torch.Generator().manual_seed(1)
    expected = sdgp.prune(x, method=method, generator=seeded)

    def fresh_thread() -> Tensor:
        first(lambda t: sdgp.prune(t, method=method))
        y = sdgp.prune(x, method=method, generator=torch.Generator().manual_seed(1))
        assert type(y) is Tensor and not y.is_inference()
        return y

    with ThreadPoolExecutor(1) as thread:
        assert same_bits(thread.submit(fresh_thread).result(), expected)


def test_only_plain_tensors_take_the_blocked_ways() -> None:
    class Mine(Tensor):
        pass

    x = torch.randn(8, 4)
    assert cpu.takes(x, 1, "mvue", 2) and cpu.takes(torch.nn.Parameter(x), 1, "mvue", 2)
    assert not cpu.takes(x.as_subclass(Mine), 1, "mvue", 2)
    assert not cpu.takes(x.to("meta"), 1, "mvue", 2)
    assert isinstance(sdgp.prune(x.as_subclass(Mine)), Mine)


@pytest.mark.parametrize("method", METHODS)
def test_under_inference_mode_after_a_plain_call(method: str) -> None:
    x = torch.randn(8, 16)
    expected = sdgp.prune(x, method=method, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        y = sdgp.prune(x, method=method, generator=torch.Generator().manual_seed(1))
    assert same_bits(y.clone(), expected)
