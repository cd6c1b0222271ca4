"""Every method where torch must be deterministic: on a CPU by running it, on CUDA by name.

A GPU is not needed to see what would throw there: meta tensors run the code that every device
but a CPU runs, each operation is recorded, and torch's own list of those that throw is looked
through.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends import dense
from sdgp_cusparselt.backends.base import ConvGeometry
from sdgp_cusparselt.config.choices import SDGPConfig
from tests.helpers import same_bits

METHODS = ["magnitude", "rescaled_magnitude", "random", "mvue"]
PATTERNS = [(1, 4), (2, 4), (3, 4), (4, 8), (16, 32)]


class Recorder(TorchDispatchMode):
    """Records every operation, and the dtypes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.dtype]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        dtypes = [a.dtype for a in args if isinstance(a, Tensor)]
        self.calls.append((function.overloadpacket.__name__, dtypes))
        return function(*args, **(kwargs or {}))


def throwing() -> set[str]:
    """Return the names of what torch documents to throw, as operations call themselves."""
    text = torch.use_deterministic_algorithms.__doc__ or ""
    _, _, listed = text.partition("operations will throw a")
    # Behind it older versions list products, which only need a setting of cuBLAS.
    listed = listed.partition("CUBLAS_WORKSPACE_CONFIG")[0]
    names = re.findall(r"\* :(?:func|class):`torch\.([\w.]+)`", listed)
    # AvgPool3d -> avgpool3d, as avg_pool3d_backward without its underlines.
    return {name.rpartition(".")[2].lower().replace("_", "") for name in names}


def throws(call: tuple[str, list[torch.dtype]]) -> bool:
    name, dtypes = call
    plain = name.lower().replace("_", "").removesuffix("backward")
    floats = any(dtype.is_floating_point for dtype in dtypes)
    # A running sum throws for floats alone, until torch 2.15, whose list is without it; kthvalue
    # and its kin throw without being listed.
    if plain == "cumsum":
        return floats
    return plain in throwing() | {"kthvalue", "cumprod", "scatteradd", "indexput"}


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_list_is_read_as_it_is_written() -> None:
    names = throwing()
    assert {"median", "histc", "bincount", "put", "adaptiveavgpool2d"} <= names
    assert throws(("cumsum", [torch.float32])) and not throws(("cumsum", [torch.int64]))
    assert throws(("median", [])) and throws(("put_", [])) and not throws(("mul", [torch.float32]))


@pytest.mark.parametrize("n, m", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_method_calls_what_throws_on_cuda(
    method: str, n: int, m: int, dtype: torch.dtype
) -> None:
    with Recorder() as recorder:
        x = torch.randn(6, 2 * m + 3, device="meta").to(dtype)
        for dim in (0, 1):
            assert sdgp.prune(x, method=method, n=n, m=m, dim=dim).is_meta
    assert len(recorder.calls) > 20
    assert [call for call in recorder.calls if throws(call)] == []


@pytest.mark.parametrize("method", METHODS)
def test_no_emulated_product_calls_what_throws_on_cuda(method: str) -> None:
    config = SDGPConfig(
        prune=method, grad_weight="sparse", grad_weight_prune=method, backend="dense", beta=0.5
    )
    conv = ConvGeometry((1, 1), (1, 1), (1, 1), 1)
    with Recorder() as recorder:
        rows, weight = torch.randn(12, 8, device="meta"), torch.randn(8, 6, device="meta")
        dense.linear_grad_input(rows, weight, config)
        dense.linear_grad_weight(rows, torch.randn(12, 6, device="meta"), config)
        images = torch.randn(2, 8, 5, 5, device="meta")
        kernel = torch.randn(8, 4, 3, 3, device="meta")
        input = torch.randn(2, 4, 5, 5, device="meta")
        dense.conv2d_grad_input(images, kernel, input, conv, config)
        dense.conv2d_grad_weight(images, input, kernel, conv, config)
    names = {name for name, _ in recorder.calls}
    assert {"mm", "convolution_backward"} <= names
    assert [call for call in recorder.calls if throws(call)] == []


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("n, m", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_deterministic_mode_changes_no_bit_on_a_cpu(method: str, n: int, m: int) -> None:
    x = torch.randn(40, 64)

    def pruned() -> Tensor:
        source = torch.Generator().manual_seed(1)
        return sdgp.prune(x, method=method, n=n, m=m, generator=source)

    first = pruned()
    assert same_bits(first, pruned())
    torch.use_deterministic_algorithms(False)
    assert same_bits(first, pruned())


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("method", METHODS)
def test_an_emulated_layer_runs_in_deterministic_mode(method: str) -> None:
    config = SDGPConfig(prune=method, backend="dense")
    layer = torch.nn.Linear(32, 64)
    sdgp.convert_(layer, config)
    input = torch.randn(8, 32, requires_grad=True)
    layer(input).backward(torch.ones(8, 64))
    assert input.grad is not None


def test_no_operation_sees_a_bool_as_an_integer() -> None:
    """torch.compile of some versions cannot: a mask is used with torch.where instead."""
    with Recorder() as recorder:
        x = torch.randn(8, 32, device="meta")
        for method in METHODS:
            for n, m in PATTERNS:
                sdgp.prune(x, method=method, n=n, m=m)
    views = [dtypes for name, dtypes in recorder.calls if name == "view"]
    assert views and not any(torch.bool in dtypes for dtypes in views)
