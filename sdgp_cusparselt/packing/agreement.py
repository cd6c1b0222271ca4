"""Does the kernel write what the reference writes? Asked once per process, for what will run.

A certificate proves an order with one method and one tile. Every other method, direction and tile
is compiled into a kernel of its own, by whatever compiler this machine has; the first use of each
is compared here, byte for byte, on an operand that is small and takes the same tile.
"""

import math
import threading
from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt.devices import is_capturing
from sdgp_cusparselt.packing.layout import MetadataLayout, default_layout, padded_shape
from sdgp_cusparselt.packing.pack import kernel_obstacle, pack_gradient
from sdgp_cusparselt.packing.trials import few_integers, normal, two_of_four

#: Rows and columns of the operand at most: a whole tile of every known layout and kernel.
SIDE = 256
NOT_YET = "the kernel was not compared with the reference before the graph was captured"

_found: dict[tuple[Any, ...], str | None] = {}
_lock = threading.Lock()


def packer_fault(
    x: Tensor,
    *,
    features: str | None = None,
    tokens: str | None = None,
    features_layout: MetadataLayout | None = None,
    tokens_layout: MetadataLayout | None = None,
    tokens_per_sample: int | None = None,
    backend: str = "auto",
) -> str | None:
    """Return why ``pack_gradient`` must not be used with these arguments, or None.

    Args:
        x: [M, K] what would be packed; its values are not read.
        features, tokens, features_layout, tokens_layout, tokens_per_sample, backend: as
            ``pack_gradient``.

    Returns:
        The first difference between kernel and reference; None where there is none, or where the
        reference itself would pack. Under graph capture nothing is compared: a reason, if it was
        not done before.
    """
    if backend == "reference" or kernel_obstacle(x) is not None:
        return None
    if backend == "auto" and not x.is_cuda:  # the interpreter is for tests
        return None
    layouts = (features_layout if features else None, tokens_layout if tokens else None)
    shape, per_sample = small_shape(x, layouts, tokens_per_sample)
    key = (x.device, x.dtype, _covers(shape), per_sample, features, tokens, *layouts)
    if key not in _found:
        if is_capturing(x.device):
            return NOT_YET
        fault = _compare(x, shape, per_sample, (features, tokens), layouts)
        with _lock:
            _found[key] = fault
    return _found[key]


def _compare(
    x: Tensor,
    shape: tuple[int, int],
    per_sample: int | None,
    methods: tuple[str | None, str | None],
    layouts: tuple[MetadataLayout | None, MetadataLayout | None],
) -> str | None:
    small = _operand(shape, methods, x)
    both = []
    for backend in ("triton", "reference"):
        packed = pack_gradient(
            small,
            features=methods[0],
            tokens=methods[1],
            features_layout=layouts[0],
            tokens_layout=layouts[1],
            tokens_per_sample=per_sample,
            backend=backend,
            generator=torch.Generator(x.device).manual_seed(2),
        )
        both.append((packed.features, packed.tokens))
    for name, method, ours, truth in zip(("features", "tokens"), methods, *both, strict=True):
        if ours is None or truth is None or torch.equal(ours.buffer, truth.buffer):
            continue
        wrong = ours.buffer != truth.buffer
        metadata = int(wrong[-ours.metadata.numel() :].sum())
        return (
            f"the kernel for {method} along {name} of {list(shape)} {x.dtype} differs from the "
            f"reference in {int(wrong.sum())} bytes, {metadata} of them metadata"
        )
    return None


def _operand(shape: tuple[int, int], methods: tuple[str | None, str | None], x: Tensor) -> Tensor:
    """Return what the methods can be compared on; the reference refuses "none" where not 2:4."""
    generator = torch.Generator(x.device).manual_seed(1)
    rows, cols = shape
    if methods == ("none", "none"):
        made = few_integers(rows, cols, x.dtype, x.device, generator)
        index = torch.arange(max(shape), device=x.device) % 4 < 2
        return made * index[:rows, None] * index[None, :cols]
    if methods[0] == "none":
        return two_of_four(rows, cols, x.dtype, x.device, generator)
    if methods[1] == "none":
        return two_of_four(cols, rows, x.dtype, x.device, generator).t().contiguous()
    made = normal(rows, cols, x.dtype, x.device, generator)
    if "rescaled_magnitude" in methods:
        return made.mul_(4).round_()  # sums of integers are exact in any order
    for value in (0.0, -0.0, float("inf"), float("nan"), torch.finfo(x.dtype).max):
        draw = torch.rand(shape, generator=generator, device=x.device)
        made.masked_fill_(draw < 0.03, value)
    return made


def small_shape(
    x: Tensor,
    layouts: tuple[MetadataLayout | None, MetadataLayout | None],
    tokens_per_sample: int | None,
) -> tuple[tuple[int, int], int | None]:
    """Return a shape that takes the tile that x takes, and the tokens of one of its samples."""
    rows, cols = x.shape
    sides = [SIDE, SIDE]
    for turned, layout in enumerate(layouts):
        if layout is not None:
            sides[turned] = max(sides[turned], layout.tile_rows)
            sides[1 - turned] = max(sides[1 - turned], 4 * layout.tile_groups)
    per_sample = tokens_per_sample
    if per_sample is None or per_sample >= min(rows, sides[0]):
        heights, per_sample = [min(rows, sides[0]), rows], None
    else:
        whole = math.lcm(per_sample, sides[0])
        heights = [sides[0] - sides[0] % per_sample, min(whole, rows), rows]
    shapes = [(height, width) for width in (min(cols, sides[1]), cols) for height in heights]
    return next((s for s in shapes if _fit(s, layouts, x)), (rows, cols)), per_sample


def _fit(
    shape: tuple[int, int],
    layouts: tuple[MetadataLayout | None, MetadataLayout | None],
    x: Tensor,
) -> bool:
    for operand, layout in zip((shape, shape[::-1]), layouts, strict=True):
        padded = padded_shape(*operand, x.dtype)
        if (layout or default_layout(*padded, x.dtype)).misfit(*padded) is not None:
            return False
    return True


def _covers(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the powers of two that cover a shape: what a tile is chosen by."""
    return (shape[0] - 1).bit_length(), (shape[1] - 1).bit_length()
