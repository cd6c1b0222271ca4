"""DLPack arrays in and out, and the disk cache: what other modules lean on."""

import json
import threading
from pathlib import Path

import numpy as np
import packing_oracle as oracle
import pytest
import torch

from sdgp_cusparselt import cache
from sdgp_cusparselt.arrays import like, same_kind, to_tensor
from sdgp_cusparselt.errors import SDGPCacheWarning
from sdgp_cusparselt.packing.pack import matmul, pack
from sdgp_cusparselt.pruning.methods import prune


def test_numpy_goes_in_and_comes_out_without_a_copy() -> None:
    x = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float16)
    tensor = to_tensor(x, "pack", "x")
    assert tensor.data_ptr() == x.ctypes.data
    back = like(x, tensor)
    assert isinstance(back, np.ndarray) and back.ctypes.data == x.ctypes.data
    back[0, 0] = 3
    assert x[0, 0] == 3


def test_pack_prune_and_matmul_take_numpy() -> None:
    x = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float16)
    packed = pack(x)
    pruned = oracle.prune_magnitude(torch.from_numpy(x))
    assert torch.equal(packed.unpack(), pruned)
    product = matmul(packed, np.eye(16, dtype=np.float16))
    assert isinstance(product, np.ndarray)
    np.testing.assert_array_equal(product, pruned.numpy())
    kept = same_kind(prune)(x, method="magnitude")
    assert isinstance(kept, np.ndarray)
    np.testing.assert_array_equal(kept, pruned.numpy())


def test_tensors_pass_through() -> None:
    x = torch.zeros(4, 4)
    assert to_tensor(x, "pack", "x") is x and like(x, x) is x


def test_what_cannot_be_shared_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"pack: x must be a torch\.Tensor or an array"):
        pack([[1.0, 2.0, 3.0, 4.0]])
    with pytest.raises(TypeError, match="cannot be shared"):
        pack(np.full((4, 4), None))


@pytest.mark.gpu
def test_cupy_goes_in_and_comes_out_without_a_copy() -> None:
    cupy = pytest.importorskip("cupy", reason="needs CuPy")
    x = cupy.random.standard_normal((64, 64)).astype(cupy.float16)
    tensor = to_tensor(x, "pack", "x")
    assert tensor.data_ptr() == x.data.ptr
    assert like(x, tensor).data.ptr == x.data.ptr
    product = matmul(pack(x), cupy.eye(64, dtype=cupy.float16))
    assert isinstance(product, cupy.ndarray)
    want = oracle.prune_magnitude(torch.from_dlpack(x).cpu())
    assert torch.equal(torch.from_dlpack(product).cpu(), want)


def test_cache_round_trip_and_corruption(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "facts.json"
    assert cache.load(path) is None
    cache.store(path, {"a": [1, 2]})
    assert cache.load(path) == {"a": [1, 2]}
    for broken in ("{", "[1]", ""):
        path.write_text(broken)
        with pytest.warns(SDGPCacheWarning, match="corrupt"):
            assert cache.load(path) is None
        assert not path.exists() and path.with_name("facts.json.aside").read_text() == broken


def test_cache_updates_from_many_threads_all_count(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"

    def add(name: str) -> None:
        cache.update(path, lambda old: {**old, name: 1})

    threads = [threading.Thread(target=add, args=(str(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.load(path) == {str(i): 1 for i in range(8)}
    assert sorted(p.name for p in tmp_path.glob("*.partial*")) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    cache.store(path, {"a": 1})
    with pytest.raises(TypeError):
        cache.store(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.glob("*.partial")) == []


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDGP_CACHE_DIR", str(tmp_path))
    assert cache.cache_dir() == tmp_path
    monkeypatch.delenv("SDGP_CACHE_DIR")
    assert cache.cache_dir().name == "sdgp_cusparselt"
