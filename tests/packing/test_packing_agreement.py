"""The kernel is compared with the reference once for each method, direction and tile it runs in."""

import importlib

import pytest
import torch

from sdgp_cusparselt.packing import agreement
from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing.agreement import packer_fault
from sdgp_cusparselt.packing.pack import METHODS
from sdgp_cusparselt.packing.variants import Target, choose_tile

# The package has a function of the same name.
packing = importlib.import_module("sdgp_cusparselt.packing.pack")
TRITON = {"backend": "triton"}


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_found", {})


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes that the kernel was started on."""
    seen: list[tuple[int, int]] = []
    real = packing._by_kernel

    def counted(x: torch.Tensor, *given: object) -> object:
        seen.append((x.shape[0], x.shape[1]))
        return real(x, *given)

    monkeypatch.setattr(packing, "_by_kernel", counted)
    return seen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("direction", ["features", "tokens"])
def test_every_method_agrees_in_every_direction(
    device: str, launches: list[tuple[int, int]], method: str, direction: str
) -> None:
    x = torch.empty(96, 64, dtype=torch.bfloat16, device=device)
    for _ in range(2):
        assert packer_fault(x, **{direction: method}, **TRITON) is None
    assert len(launches) == 1  # the second question is answered from memory


@pytest.mark.parametrize("methods", [("magnitude", "mvue"), ("none", "none"), ("none", "random")])
def test_both_directions_at_once(device: str, methods: tuple[str, str]) -> None:
    x = torch.empty(64, 48, dtype=torch.float16, device=device)
    assert packer_fault(x, features=methods[0], tokens=methods[1], **TRITON) is None


def test_a_large_operand_is_stood_for_by_a_small_one_with_the_same_tile(
    device: str, launches: list[tuple[int, int]]
) -> None:
    x = torch.empty(1, dtype=torch.bfloat16, device=device).expand(8192, 4096)
    layout = layouts.BLOCKED
    assert packer_fault(x, features="magnitude", features_layout=layout, **TRITON) is None
    ((rows, cols),) = launches
    assert (rows, cols) == (256, 256)
    target = Target("magnitude", layout)
    for targets in ((target, None), (None, target), (target, target)):
        small, large = (choose_tile(*shape, *targets) for shape in ((256, 256), x.shape))
        assert small == large
    assert packer_fault(x[:4096], features="magnitude", features_layout=layout, **TRITON) is None
    assert len(launches) == 1  # the same tile
    assert packer_fault(x[:16], features="magnitude", **TRITON) is None
    assert launches[1:] == [(16, 256)]  # another


@pytest.mark.parametrize("tokens_per_sample", [None, 24])
def test_samples_of_any_length(device: str, tokens_per_sample: int | None) -> None:
    """As long as the ratio is read in the same way; a sum of integers has one value only."""
    x = torch.empty(1, dtype=torch.bfloat16, device=device).expand(1536, 16)
    wanted = {"features": "rescaled_magnitude", "tokens_per_sample": tokens_per_sample}
    assert packer_fault(x, **wanted, **TRITON) is None


@pytest.mark.parametrize(
    "rows, cols, tokens_per_sample, want",
    [
        (8192, 4096, None, ((256, 256), None)),
        (8192, 4096, 8192, ((256, 256), None)),  # one sample is taller than any block
        (8192, 48, 64, ((256, 48), 64)),
        (25600, 4096, 100, ((6400, 256), 100)),  # whole samples in whole tiles
        (16, 64, None, ((16, 64), None)),
    ],
)
def test_the_operand_that_stands_for_another(
    rows: int, cols: int, tokens_per_sample: int | None, want: tuple[object, int | None]
) -> None:
    x = torch.empty(1, dtype=torch.bfloat16).expand(rows, cols)
    layout = layouts.default_layout(rows, cols)
    assert agreement.small_shape(x, (layout, None), tokens_per_sample) == want


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", ["values", "metadata"])
def test_one_wrong_bit_is_found(
    device: str, monkeypatch: pytest.MonkeyPatch, method: str, part: str
) -> None:
    real = packing._by_kernel

    def spoiling(*given: object) -> object:
        packed = real(*given)
        buffer, metadata = packed.tokens.buffer, packed.tokens.metadata
        buffer[6 if part == "values" else buffer.numel() - metadata.numel()] ^= 1
        return packed

    monkeypatch.setattr(packing, "_by_kernel", spoiling)
    x = torch.empty(64, 64, dtype=torch.bfloat16, device=device)
    for _ in range(2):
        found = packer_fault(x, tokens=method, **TRITON)
        assert found is not None and f"{method} along tokens" in found
        assert f"in 1 bytes, {int(part == 'metadata')} of them metadata" in found


def test_where_the_reference_packs_there_is_nothing_to_compare(
    launches: list[tuple[int, int]],
) -> None:
    x = torch.empty(64, 64, dtype=torch.bfloat16)
    assert packer_fault(x, features="magnitude") is None  # a CPU
    assert packer_fault(x, features="magnitude", backend="reference") is None
    assert packer_fault(x.to(torch.int8), features="magnitude", **TRITON) is None
    assert launches == []


def test_nothing_is_compared_under_capture(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(64, 64, dtype=torch.bfloat16, device=device)
    assert packer_fault(x, features="magnitude", **TRITON) is None
    monkeypatch.setattr(agreement, "is_capturing", lambda device: True)
    assert packer_fault(x, features="magnitude", **TRITON) is None  # known
    assert packer_fault(x, features="mvue", **TRITON) == agreement.NOT_YET
