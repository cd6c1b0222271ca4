"""Check, choose between kernel and reference, and pack: the Python side of the packing layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt.arrays import like, to_tensor
from sdgp_cusparselt.errors import NotSupportedError, type_error, value_error
from sdgp_cusparselt.packing import launch
from sdgp_cusparselt.packing.layout import MetadataLayout, default_layout, padded_shape
from sdgp_cusparselt.packing.packed import PACKED_DTYPES, Packed24
from sdgp_cusparselt.packing.reference import Draws, keep_two, pack_operand

METHODS = ("none", "random", "magnitude", "rescaled_magnitude", "mvue")
BACKENDS = ("auto", "triton", "reference")
# Row and column numbers are 32-bit inside a block; offsets are 64-bit.
MAX_SIDE = 2**31 - 2**12


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
    _check_x(x, features, tokens)
    samples = _checked_samples(x, tokens_per_sample)
    use_kernel = _use_kernel(x, backend)
    x = _row_major(x)
    wanted = []
    for transposed, method, layout in (
        (False, features, features_layout),
        (True, tokens, tokens_layout),
    ):
        if method is not None:
            packed = _allocate(x, layout, transposed)
            wanted.append(launch.Direction(packed, method, transposed))
    seeds = None
    if any(direction.method in ("random", "mvue") for direction in wanted):
        seeds = draw_seeds(x.device, generator)
    run = _by_kernel if use_kernel else _by_reference
    sums = run(x, wanted, samples, seeds, column_sums)
    found = {direction.transposed: direction.packed for direction in wanted}
    return PackedGradient(found.get(False), found.get(True), sums)


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


def draw_seeds(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Return the two int64 words that one pack's random numbers follow from.

    Drawn by torch on the device itself: no synchronisation, ``torch.manual_seed`` rules, and a
    CUDA graph that captured it draws new words at each replay.
    """
    return torch.randint(
        -(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator
    )


def _check_x(x: Tensor, features: str | None, tokens: str | None) -> None:
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


def _checked_samples(x: Tensor, tokens_per_sample: int | None) -> int:
    rows = x.shape[0]
    per_sample = rows if tokens_per_sample is None else tokens_per_sample
    if per_sample < 1 or rows % per_sample:
        rule = f"a divisor of the {rows} tokens"
        fix = "Pass how many rows of x one sample has."
        raise value_error("pack", "tokens_per_sample", rule, tokens_per_sample, fix)
    return per_sample


def _use_kernel(x: Tensor, backend: str) -> bool:
    """Choose, or raise NotSupportedError with the reason."""
    if backend not in BACKENDS:
        rule = f"one of {', '.join(BACKENDS)}"
        raise value_error("pack", "backend", rule, repr(backend), "Pick one of these.")
    if backend == "reference":
        return False
    reason = kernel_obstacle(x)
    if backend == "triton" and reason is not None:
        raise NotSupportedError(f"pack: the Triton kernel cannot run: {reason}.")
    # The interpreter is for tests, which ask for it by name.
    return reason is None and (backend == "triton" or x.is_cuda)


def kernel_obstacle(x: Tensor) -> str | None:
    """Return why the Triton kernel cannot pack x, or None if it can."""
    if launch.kernels() is None:
        return "triton cannot be imported (pip install triton)"
    if x.dtype not in launch.KERNEL_DTYPES:
        return f"x is {x.dtype}, and the kernel moves float16 and bfloat16"
    if x.is_cuda == launch.interpreted():
        if x.is_cuda:
            return "TRITON_INTERPRET is set, so kernels run on the CPU"
        return f"x is on {x.device}, and the kernel runs on a CUDA GPU"
    return None


def _row_major(x: Tensor) -> Tensor:
    """Return x with adjacent columns; rows may lie any distance apart."""
    x = x.detach()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _allocate(x: Tensor, layout: MetadataLayout | None, transposed: bool) -> Packed24:
    rows, cols = x.shape[::-1] if transposed else x.shape
    if layout is None:
        layout = default_layout(*padded_shape(rows, cols, x.dtype), x.dtype)
    return Packed24.empty((rows, cols), x.dtype, layout, device=x.device, transposed=transposed)


def _by_kernel(
    x: Tensor,
    wanted: list[launch.Direction],
    per_sample: int,
    seeds: Tensor | None,
    column_sums: bool,
) -> Tensor | None:
    rescaled = [d for d in wanted if d.method == "rescaled_magnitude"]
    # One launch carries one ratio; a second rescaled direction takes a launch of its own.
    extra = rescaled[1:]
    together = [d for d in wanted if all(d is not later for later in extra)]
    ratio, rows_per_ratio = None, 1
    if rescaled:
        ratio, rows_per_ratio = _kernel_ratio(x, rescaled[0].transposed, per_sample)
    partial = launch.launch_pack(
        x,
        together,
        ratio=ratio,
        rows_per_ratio=rows_per_ratio,
        seeds=seeds,
        column_sums=column_sums,
    )
    for direction in extra:
        ratio, rows_per_ratio = _kernel_ratio(x, direction.transposed, per_sample)
        launch.launch_pack(x, [direction], ratio=ratio, rows_per_ratio=rows_per_ratio)
    return None if partial is None else partial.sum(0)


def _kernel_ratio(x: Tensor, transposed: bool, per_sample: int) -> tuple[Tensor, int]:
    """Return the ratio in x's own coordinates, and how many rows of x share a row of it."""
    rows_per_sample = x.shape[0] if transposed else per_sample
    ratio = safe_ratio(*launch.launch_abs_sums(x, transposed, rows_per_sample))
    return (ratio.t(), 1) if transposed else (ratio, per_sample)


def _by_reference(
    x: Tensor,
    wanted: list[launch.Direction],
    per_sample: int,
    seeds: Tensor | None,
    column_sums: bool,
) -> Tensor | None:
    for direction in wanted:
        transposed = direction.transposed
        operand = x.t() if transposed else x
        ratio = None
        if direction.method == "rescaled_magnitude":
            ratio = _reference_ratio(operand, operand.shape[0] if transposed else per_sample)
        done = pack_operand(
            operand,
            direction.packed.layout,
            method=direction.method,
            ratio=ratio,
            draws=None if seeds is None else Draws(seeds, int(transposed)),
            transposed=transposed,
        )
        direction.packed.buffer.copy_(done.buffer)
    return x.sum(0, dtype=torch.float32) if column_sums else None


def _reference_ratio(operand: Tensor, per_sample: int) -> Tensor:
    """Return float32 [rows, cols], each sample's ratio repeated over its rows."""
    keys = operand.contiguous().view(torch.int16) & 0x7FFF
    short = -operand.shape[1] % 4
    groups = torch.nn.functional.pad(keys, (0, short)).unflatten(1, (-1, 4))  # type: ignore[no-untyped-call]
    keep = torch.stack(keep_two(groups.unbind(-1)), -1).flatten(1)[:, : operand.shape[1]]
    size = operand.abs().float()
    kept = torch.where(keep, size, 0.0)
    samples = (-1, per_sample, operand.shape[1])
    ratio = safe_ratio(size.view(samples).sum(1), kept.view(samples).sum(1))
    return ratio.repeat_interleave(per_sample, 0)


def safe_ratio(total: Tensor, kept: Tensor) -> Tensor:
    """Return total / kept, and 1 where nothing was kept or a sum overflowed."""
    ratio = total / kept
    return torch.where(torch.isfinite(ratio) & (kept > 0), ratio, torch.ones_like(ratio))
