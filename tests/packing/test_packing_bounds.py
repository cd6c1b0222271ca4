"""Every access of every kernel lies inside a tensor that it was given, as the interpreter sees."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import packing_cases as cases
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are Triton's")
from sdgp_cusparselt.packing import launch, ratios, starting
from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing.layout import MetadataLayout

pytestmark = pytest.mark.skipif(
    not starting.interpreted(), reason="accesses are watched in the interpreter"
)
# Four tiles of the first kind are taller than the operand: rows of padding belong to no sample.
TALL = MetadataLayout(
    "tall", (*layouts.PLAIN.row_strides, 256, 512), (1, 2, 8), region=((128, 32),)
)


class Watch:
    """The addresses that kernels touched, first and last byte."""

    def __init__(self) -> None:
        self.loads: list[tuple[int, int]] = []
        self.stores: list[tuple[int, int]] = []

    def note(self, found: list[tuple[int, int]], pointers: Any, mask: Any) -> None:
        touched = np.atleast_1d(pointers.data)[np.broadcast_to(mask.data, pointers.data.shape)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        found += [(int(at), int(at) + size) for at in np.unique(touched)]

    def outside(self, found: list[tuple[int, int]], tensors: list[Tensor]) -> list[int]:
        spans = [(t.data_ptr(), t.data_ptr() + span(t) * t.element_size()) for t in tensors]
        return [at for at, end in found if not any(a <= at and end <= b for a, b in spans)]


def span(tensor: Tensor) -> int:
    """Elements from the first to the last, whatever lies between."""
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    from triton.runtime import interpreter

    found, builder = Watch(), interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def noted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        found.note(found.loads, pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found.note(found.stores, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", noted_load)
    monkeypatch.setattr(builder, "create_masked_store", noted_store)
    yield found


@pytest.mark.parametrize(
    "rows, cols, per_sample", [(96, 64, 32), (90, 40, 30), (33, 24, 33), (17, 8, 1)]
)
@pytest.mark.parametrize("method", ["rescaled_magnitude", "mvue"])
@pytest.mark.parametrize("layout", [layouts.PLAIN, TALL], ids=lambda one: one.name)
def test_pack(
    watch: Watch, rows: int, cols: int, per_sample: int, method: str, layout: MetadataLayout
) -> None:
    x = cases.adversarial(rows, cols + 8, torch.bfloat16)[:, :cols]
    seeds = torch.tensor([1, 2])
    prepared = launch.prepare_pack(
        (rows, cols),
        x.stride(0),
        x.dtype,
        x.device,
        features=method,
        tokens=method,
        features_layout=layout,
        tokens_layout=layout,
        column_sums=True,
        rows_per_ratio=per_sample,
        seeds_in_memory=True,
    )
    sizes = (prepared.features_nbytes, prepared.tokens_nbytes)
    buffers = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    of_samples, of_rows = torch.ones(rows // per_sample, cols), torch.ones(rows)
    assert prepared.sums_shape is not None
    sums = torch.zeros(prepared.sums_shape)
    prepared(
        x.data_ptr(),
        *(buffer.data_ptr() for buffer in buffers),
        0,
        0,
        0,
        seeds=seeds.data_ptr(),
        features_ratio=of_samples.data_ptr(),
        tokens_ratio=of_rows.data_ptr(),
        sums=sums.data_ptr(),
    )
    assert watch.loads and watch.stores
    assert watch.outside(watch.loads, [x, seeds, of_samples, of_rows]) == []
    assert watch.outside(watch.stores, [*buffers, sums]) == []
    written = {at for at, _ in watch.stores}
    assert all(buffer.data_ptr() in written for buffer in buffers)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("rows, cols, per_sample", [(96, 64, 32), (90, 40, 30)])
def test_prune_and_sums(
    watch: Watch,
    tokens: bool,
    rows: int,
    cols: int,
    per_sample: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of three rows of programs one is split off to another layer, and with it comes a fourth.
    monkeypatch.setattr(starting, "_MAX_GRID", 2)
    x = cases.adversarial(rows, cols + 8, torch.float16)[:, :cols]
    ratio = ratios.kernel_ratio(x, tokens, per_sample)
    assert watch.loads and watch.outside(watch.loads, [x]) == []
    watch.loads.clear()
    watch.stores.clear()
    prepared = launch.prepare_prune(
        (rows, cols),
        x.stride(0),
        x.dtype,
        x.device,
        method="rescaled_magnitude",
        tokens=tokens,
        rows_per_ratio=per_sample,
    )
    out = torch.zeros(rows, cols, dtype=x.dtype)
    prepared(x.data_ptr(), out.data_ptr(), 0, 0, 0, ratio=ratio.data_ptr())
    assert watch.outside(watch.loads, [x, ratio]) == []
    assert watch.outside(watch.stores, [out]) == []
    # Words of two columns, each written once.
    assert len(set(watch.stores)) == rows * cols // 2
