"""sdgp.pack and sdgp.matmul on a machine with the library, and without."""

import numpy as np
import pytest
import torch

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.packing.layout import SM90_ATOM
from sdgp_cusparselt.products import routes
from sdgp_cusparselt.tuning import store
from tests.emulator.control import Emulator
from tests.helpers import assert_product, oracle_magnitude


@pytest.fixture
def emulated(backend: CusparseLtBackend, monkeypatch, tmp_path) -> CusparseLtBackend:
    monkeypatch.setattr(routes, "LIBRARY", backend)
    monkeypatch.setattr(store, "_default", store.TuningCache(tmp_path / "decisions"))
    return backend


@pytest.mark.parametrize("layout", ["plain", "blocked", "random"])
@pytest.mark.parametrize("rows", [60, 256])
def test_packed_in_the_order_of_the_library_and_multiplied_by_it(
    emulated: CusparseLtBackend, emulator: Emulator, layout: str, rows: int
) -> None:
    emulator.layout(layout, seed=5)
    x, dense = torch.randn(rows, 64).bfloat16(), torch.randn(64, 40).bfloat16()
    packed = sdgp.pack(x)
    assert torch.equal(packed.unpack(), sdgp.prune(x))
    before = emulator.calls("cusparseLtMatmul")
    result = sdgp.matmul(packed, dense, backend="cusparselt")
    assert emulator.calls("cusparseLtMatmul") > before
    assert_product(result, oracle_magnitude(x, 2, 4, 1), dense)
    torch.testing.assert_close(sdgp.matmul(packed, dense, backend="dense"), result)


def test_an_operand_in_another_order_is_never_handed_over(emulated: CusparseLtBackend) -> None:
    x, dense = torch.randn(256, 64).bfloat16(), torch.randn(64, 40).bfloat16()
    packed = sdgp.pack(x, layout=SM90_ATOM)
    with pytest.raises(sdgp.NotSupportedError, match="reads another metadata order"):
        sdgp.matmul(packed, dense, backend="cusparselt")
    assert_product(sdgp.matmul(packed, dense), oracle_magnitude(x, 2, 4, 1), dense)


def test_reasons_are_named(emulated: CusparseLtBackend) -> None:
    packed = sdgp.pack(torch.randn(32, 64).bfloat16())
    with pytest.raises(sdgp.NotSupportedError, match="K must be a multiple of 16, N of 8"):
        sdgp.matmul(packed, torch.randn(64, 20).bfloat16(), backend="cusparselt")
    with pytest.raises(sdgp.NotSupportedError, match="neither row- nor column-major"):
        sdgp.matmul(packed, torch.randn(64, 48).bfloat16()[:, ::2], backend="cusparselt")
    with pytest.raises(ValueError, match="matmul: backend must be"):
        sdgp.matmul(packed, torch.randn(64, 16).bfloat16(), backend="cuda")


def test_without_a_device_it_multiplies_densely_and_keeps_the_kind_of_array() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    x = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float16)
    dense = np.ones((32, 8), np.float16)
    packed = sdgp.pack(x)
    assert sdgp.library_layout(16, 32, torch.float16, torch.device("cpu")) is None
    result = sdgp.matmul(packed, dense)
    assert isinstance(result, np.ndarray) and isinstance(sdgp.prune(x), np.ndarray)
    assert_product(torch.from_numpy(result), torch.from_numpy(sdgp.prune(x)), torch.ones(32, 8))
    with pytest.raises(sdgp.NotSupportedError, match="torch sees no CUDA device"):
        sdgp.matmul(packed, dense, backend="cusparselt")
