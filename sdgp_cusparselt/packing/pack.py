"""Check, choose between kernel and reference, and pack: the Python side of the packing layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt.arrays import like, to_tensor
from sdgp_cusparselt.config.patterns import METHODS, STOCHASTIC
from sdgp_cusparselt.errors import NotSupportedError, type_error, value_error
from sdgp_cusparselt.packing import launch, starting
from sdgp_cusparselt.packing.layout import MetadataLayout, default_layout, padded_shape
from sdgp_cusparselt.packing.packed import PACKED_DTYPES, Packed24, buffer_nbytes
from sdgp_cusparselt.packing.ratios import kernel_ratio, reference_ratio
from sdgp_cusparselt.packing.reference import Draws, pack_operand
from sdgp_cusparselt.packing.seeds import Seeds, draw_seeds, seeds_tensor
from sdgp_cusparselt.packing.variants import KERNEL_DTYPES, layout_obstacle

BACKENDS = ("auto", "triton", "reference")
# Row and column numbers, and words between tiles of metadata, are 32-bit; offsets are 64-bit.
MAX_SIDE = 2**28


@dataclass(frozen=True)
class PackedGradient:
    """What one read of a gradient gave.

    Attributes:
        features: the gradient [M, K] packed along K, the operand of grad_input; or None.
        tokens: its transpose [K, M] packed along M, the operand of grad_weight; or None.
        column_sums: float32 [K], sums of the unpruned gradient over tokens; or None.
    """

    features: Packed24 | None
    tokens: Packed24 | None
    column_sums: Tensor | None


def pack(
    x: Any,
    *,
    method: str = "magnitude",
    transpose: bool = False,
    backend: str = "auto",
    generator: torch.Generator | None = None,
    layout: MetadataLayout | None = None,
) -> Packed24:
    """Prune 2:4 and compress.

    pack(x).unpack() = prune(x, dim=-1);  pack(x, transpose=True).unpack() = prune(x.T, dim=-1)

    Args:
        x: [M, K] float16|bfloat16, any device; int8|float8 in the reference, for none, magnitude
            and random. A tensor, or an array that shares its memory through DLPack (NumPy,
            CuPy). K is a multiple of 4 unless transpose, where M may be anything.
        method: none (x is 2:4 already), random, magnitude, rescaled_magnitude or mvue.
        transpose: pack x.T along tokens, from the same row-major x.
        backend: "triton", "reference" (plain torch), or "auto": the kernel on a GPU where it can
            run, else the reference. Both give the same bytes.
        generator: source of random numbers for random and mvue; torch's own if None.
        layout: where the metadata goes; the sm80 order if None. For a library, pass the order
            learned from it.

    Returns:
        Packed24 on x's device.

    Raises:
        ValueError: x not 2-D, a width that is not in groups, an unknown method or backend, a
            layout that does not fit.
        TypeError: a dtype without a 2:4 format.
        NotSupportedError: backend "triton" where the kernel cannot run; the reason is named.

    Note:
        Under method "none" a group with over two non-zeros raises ValueError in the reference;
        the kernel keeps its two largest, because a check would wait for the GPU.
    """
    packed = pack_gradient(
        to_tensor(x, "pack", "x"),
        features=None if transpose else method,
        tokens=method if transpose else None,
        features_layout=layout,
        tokens_layout=layout,
        backend=backend,
        generator=generator,
    )
    result = packed.tokens if transpose else packed.features
    assert result is not None  # the direction asked for is always there
    return result


def pack_gradient(
    x: Tensor,
    *,
    features: str | None = "magnitude",
    tokens: str | None = None,
    features_layout: MetadataLayout | None = None,
    tokens_layout: MetadataLayout | None = None,
    column_sums: bool = False,
    tokens_per_sample: int | None = None,
    n: int = 2,
    backend: str = "auto",
    generator: torch.Generator | None = None,
) -> PackedGradient:
    """Pack a gradient along features, along tokens, or both, reading it once.

    features.unpack() = prune(x, dim=-1);  tokens.unpack() = prune(x.T, dim=-1);
    column_sums = x.sum(0)

    Args:
        x: [M, K] float16|bfloat16, any device.
        features: method of the operand of grad_input, or None.
        tokens: method of the operand of grad_weight, or None.
        features_layout: see ``pack``.
        tokens_layout: see ``pack``.
        column_sums: whether to sum x over tokens, for the bias gradient.
        tokens_per_sample: rows of x that share a rescale ratio; all of them if None.
        n: values kept of four, 2 or 1; with 1 the second value of each pair is zero.
        backend: see ``pack``.
        generator: see ``pack``.

    Returns:
        PackedGradient: what was asked for.

    Raises:
        ValueError, TypeError, NotSupportedError: see ``pack``.

    Note:
        rescaled_magnitude reads x a second time, beforehand, for its ratio. Column sums are
        deterministic, and so is everything else for given seeds.
    """
    check_matrix(x, features, tokens)
    if n not in (1, 2):
        raise value_error("pack", "n", "1 or 2", n, "Other patterns have no 2:4 format.")
    per_sample = checked_samples(x, tokens_per_sample)
    x = x.detach()
    wanted = []
    for transposed, method, layout in (
        (False, features, features_layout),
        (True, tokens, tokens_layout),
    ):
        if method is not None:
            wanted.append(_Direction(method, transposed, _layout(x, layout, transposed)))
    by_kernel = use_kernel(x, backend, [direction.layout for direction in wanted])
    seeds: Seeds = (0, 0)
    if any(direction.method in STOCHASTIC for direction in wanted):
        seeds = draw_seeds(x.device, generator)
    run = _by_kernel if by_kernel else _by_reference
    return run(x, wanted, n, per_sample, seeds, column_sums)


def matmul(packed: Packed24, dense: Any, *, backend: str = "auto") -> Any:
    """Multiply a packed operand with a dense matrix.

    out = packed.unpack() @ dense

    Args:
        packed: [M, K].
        dense: [K, N] of packed's dtype, on its device; a tensor or a DLPack array.
        backend: "auto" or "dense"; both unpack and multiply.

    Returns:
        [M, N] of packed's dtype, the same kind of array as dense.

    Raises:
        ValueError: shapes that do not match, or an unknown backend.
        TypeError: dtypes that differ.
    """
    if backend not in ("auto", "dense"):
        raise value_error("matmul", "backend", "'auto' or 'dense'", repr(backend), "Pick one.")
    right = to_tensor(dense, "matmul", "dense")
    if right.ndim != 2 or right.shape[0] != packed.shape[1]:
        rule = f"[{packed.shape[1]}, N]"
        raise value_error("matmul", "dense", rule, list(right.shape), "Transpose or reshape it.")
    if right.dtype != packed.dtype:
        raise type_error("matmul", "dense", f"of {packed.dtype}", right.dtype, "Cast it first.")
    return like(dense, packed.unpack() @ right)


def check_matrix(x: Tensor, features: str | None, tokens: str | None) -> None:
    """Raise unless x can be packed that way; nothing has been allocated or launched yet."""
    if not isinstance(x, Tensor):
        raise type_error("pack", "x", "a torch.Tensor", type(x).__name__, "Convert it first.")
    if x.ndim != 2:
        fix = "Flatten the leading dimensions into tokens."
        raise value_error("pack", "x", "2-D, [tokens, features]", f"{x.ndim}-D", fix)
    if x.dtype not in PACKED_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in PACKED_DTYPES)
        raise type_error("pack", "x", f"of a dtype in ({names})", x.dtype, "Cast it first.")
    if min(x.shape) < 1 or max(x.shape) > MAX_SIDE:
        rule = f"between 1 and {MAX_SIDE} rows and columns"
        raise value_error("pack", "x", rule, list(x.shape), "Split it.")
    if features is not None and x.shape[1] % 4:
        raise value_error(
            "pack", "x", "of a width that is a multiple of 4", x.shape[1],
            "Pad the features, or pack with transpose=True.",
        )  # fmt: skip
    for method in (features, tokens):
        if method is not None and method not in METHODS:
            rule = f"one of {', '.join(METHODS)}"
            raise value_error("pack", "method", rule, repr(method), "Pick one of these.")
        if method in ("mvue", "rescaled_magnitude") and x.element_size() == 1:
            fix = "Use magnitude or random, or a 16-bit dtype."
            raise type_error("pack", "x", f"float16 or bfloat16 for {method}", x.dtype, fix)


def checked_samples(x: Tensor, tokens_per_sample: int | None) -> int:
    """Return the rows of one sample, or raise ValueError."""
    rows = x.shape[0]
    per_sample = rows if tokens_per_sample is None else tokens_per_sample
    if per_sample < 1 or rows % per_sample:
        rule = f"a divisor of the {rows} tokens"
        fix = "Pass how many rows of x one sample has."
        raise value_error("pack", "tokens_per_sample", rule, tokens_per_sample, fix)
    return per_sample


@dataclass(frozen=True)
class _Direction:
    """One operand to make: by which method, whether of the transpose of x, and in which order."""

    method: str
    transposed: bool
    layout: MetadataLayout

    def of(self, x: Tensor) -> Tensor:
        return x.t() if self.transposed else x

    def wrap(self, buffer: Tensor, x: Tensor) -> Packed24:
        rows, cols = x.shape[::-1] if self.transposed else x.shape
        return Packed24(buffer, (rows, cols), x.dtype, self.layout, self.transposed)


def _layout(x: Tensor, layout: MetadataLayout | None, transposed: bool) -> MetadataLayout:
    rows, cols = x.shape[::-1] if transposed else x.shape
    if layout is None:
        return default_layout(*padded_shape(rows, cols, x.dtype), x.dtype)
    buffer_nbytes((rows, cols), x.dtype, layout)  # raises where it does not fit
    return layout


def use_kernel(x: Tensor, backend: str, layouts: list[MetadataLayout]) -> bool:
    """Choose, or raise NotSupportedError with the reason."""
    if backend not in BACKENDS:
        rule = f"one of {', '.join(BACKENDS)}"
        raise value_error("pack", "backend", rule, repr(backend), "Pick one of these.")
    if backend == "reference":
        return False
    reason = kernel_obstacle(x, *layouts)
    if backend == "triton" and reason is not None:
        raise NotSupportedError(f"pack: the Triton kernel cannot run: {reason}.")
    # The interpreter is for tests, which ask for it by name.
    return reason is None and (backend == "triton" or x.is_cuda)


def kernel_obstacle(x: Tensor, *layouts: MetadataLayout) -> str | None:
    """Return why the Triton kernel cannot pack x in these orders, or None if it can."""
    if starting.kernels() is None:
        return "triton cannot be imported (pip install triton)"
    if x.dtype not in KERNEL_DTYPES:
        return f"x is {x.dtype}, and the kernel moves float16 and bfloat16"
    if x.is_cuda == starting.interpreted():
        if x.is_cuda:
            return "TRITON_INTERPRET is set, so kernels run on the CPU"
        return f"x is on {x.device}, and the kernel runs on a CUDA GPU"
    return next(filter(None, map(layout_obstacle, layouts)), None)


def _by_kernel(
    x: Tensor,
    wanted: list[_Direction],
    n: int,
    per_sample: int,
    seeds: Seeds,
    column_sums: bool,
) -> PackedGradient:
    """Pack from one read of x; rescaled_magnitude reads it once more per direction."""
    read = launch.aligned(x)
    by = {direction.transposed: direction for direction in wanted}
    features, tokens = by.get(False), by.get(True)
    in_memory = isinstance(seeds, Tensor)
    prepared = launch.prepare_pack(
        (x.shape[0], x.shape[1]),
        read.stride(0),
        x.dtype,
        x.device,
        features=None if features is None else features.method,
        tokens=None if tokens is None else tokens.method,
        features_layout=None if features is None else features.layout,
        tokens_layout=None if tokens is None else tokens.layout,
        n=n,
        column_sums=column_sums,
        rows_per_ratio=per_sample,
        seeds_in_memory=in_memory,
    )
    ratios = {
        direction.transposed: kernel_ratio(read, direction.transposed, per_sample, n)
        for direction in wanted
        if direction.method == "rescaled_magnitude"
    }
    sizes = {False: prepared.features_nbytes, True: prepared.tokens_nbytes}
    buffers = {
        transposed: torch.empty(sizes[transposed], dtype=torch.uint8, device=x.device)
        for transposed in by
    }
    sums = None
    if prepared.sums_shape is not None:
        sums = torch.empty(prepared.sums_shape, dtype=torch.float32, device=x.device)
    seed, offset = (0, 0) if isinstance(seeds, Tensor) else seeds
    with starting.on_device(x.device):
        prepared(
            read.data_ptr(),
            _address(buffers.get(False)),
            _address(buffers.get(True)),
            seed,
            offset,
            starting.current_stream(x.device),
            seeds=_address(seeds) if isinstance(seeds, Tensor) else 0,
            features_ratio=_address(ratios.get(False)),
            tokens_ratio=_address(ratios.get(True)),
            sums=_address(sums),
        )
    return PackedGradient(
        None if features is None else features.wrap(buffers[False], x),
        None if tokens is None else tokens.wrap(buffers[True], x),
        None if sums is None else sums.sum(0)[: x.shape[1]],
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _by_reference(
    x: Tensor,
    wanted: list[_Direction],
    n: int,
    per_sample: int,
    seeds: Seeds,
    column_sums: bool,
) -> PackedGradient:
    found: dict[bool, Packed24] = {}
    words = seeds_tensor(seeds, x.device)
    for direction in wanted:
        operand = direction.of(x)
        ratio = None
        if direction.method == "rescaled_magnitude":
            rows = operand.shape[0] if direction.transposed else per_sample
            ratio = reference_ratio(operand, rows, n)
        found[direction.transposed] = pack_operand(
            operand,
            direction.layout,
            method=direction.method,
            n=n,
            ratio=ratio,
            draws=Draws(words, int(direction.transposed)),
            transposed=direction.transposed,
        )
    sums = x.sum(0, dtype=torch.float32) if column_sums else None
    return PackedGradient(found.get(False), found.get(True), sums)
