"""Prove that a plan reads what our packer writes, or say why it does not.

NVIDIA keeps the order of the metadata private, and it may change with library, GPU, algorithm and
shape. So nothing is assumed: for every plan, matrices are packed and compressed; the library's
buffer, read in a candidate order, must be the pruned operand, our buffer must be it too, and a
product of our buffer with small integers must be exact. Known orders are tried before one is
learned. What is not proven is never used: the caller compresses with the library instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.packing.layout import NAMED, MetadataLayout, padded_shape
from sdgp_cusparselt.packing.learn import Compress, learn
from sdgp_cusparselt.packing.pack import pack_gradient
from sdgp_cusparselt.packing.proofs import Certificate, Proofs
from sdgp_cusparselt.packing.reading import reading_fault
from sdgp_cusparselt.packing.trials import pruned_24, two_of_four, unpruned
from sdgp_cusparselt.packing.variants import KERNEL_DTYPES

Pack = Callable[[Tensor, MetadataLayout], Iterable[Tensor]]
#: (packed buffer, the operand in it) -> what is wrong with its product, or None.
Check = Callable[[Tensor, Tensor], str | None]


def certify(
    compress: Compress,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    device: torch.device | str,
    proofs: Proofs,
    plan: str = "",
    *,
    pack: Pack | None = None,
    check: Check | None = None,
) -> Certificate:
    """Return in which order a plan reads metadata, proven, and remember it.

    Args:
        compress: the plan's Compress; takes a 2:4 [rows, cols] tensor on device, returns the
            whole compressed buffer as uint8 (``plan_compress`` makes one).
        rows: rows of the operand, padded to the library's multiples.
        cols: columns of the operand, likewise.
        dtype: element type of the operand.
        device: where it lies.
        proofs: what is known on this machine.
        plan: what tells the plan from others of that operand: width, orders, algorithm, split.
        pack: gives every buffer that our packers make of an unpruned operand in a layout; both
            directions of ``pack_gradient`` if None.
        check: multiplies a packed buffer by small integers through the plan and says what is
            wrong with the result; no product is run if None.

    Returns:
        Certificate: with the layout, or with the reason why there is none.

    Raises:
        ValueError: a shape that the library would not take.
        CusparseLtError: the library refused to compress or to multiply.
    """
    device = torch.device(device)
    if padded_shape(rows, cols, dtype) != (rows, cols):
        rule = f"the padded shape {padded_shape(rows, cols, dtype)}"
        raise value_error("certify", "rows, cols", rule, (rows, cols), "Use padded_shape.")
    if dtype not in KERNEL_DTYPES:
        return Certificate(None, f"{dtype} operands are compressed by the library")
    name = f"{rows}x{cols} {plan}".strip()
    found = proofs.find(name)
    if found is None:
        proving = partial(
            prove,
            compress,
            rows=rows,
            cols=cols,
            dtype=dtype,
            device=device,
            pack=pack,
            check=check,
        )
        found = _certificate(proving, compress, rows, cols, dtype, device, proofs)
        proofs.add(name, found)
    return found


def _certificate(
    proving: Callable[[Iterable[MetadataLayout]], tuple[MetadataLayout | None, str]],
    compress: Compress,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    device: torch.device,
    proofs: Proofs,
) -> Certificate:
    """Try what is known, then learn."""
    layout, difference = proving([*proofs.layouts(), *NAMED.values()])
    if layout is not None:
        return Certificate(layout, "a known order, proven")
    learned = learn(compress, rows, cols, dtype, device)
    if not learned.candidates:
        reason = f"no known order ({difference}), and {learned.reason}"
        return Certificate(None, reason, learned.probes)
    layout, difference = proving(learned.candidates)
    if layout is None:
        return Certificate(None, f"the learned order: {difference}", learned.probes)
    return Certificate(layout, f"learned in {learned.probes} probes, proven", learned.probes)


def prove(
    compress: Compress,
    candidates: Iterable[MetadataLayout],
    rows: int,
    cols: int,
    dtype: torch.dtype,
    device: torch.device,
    pack: Pack | None = None,
    check: Check | None = None,
) -> tuple[MetadataLayout | None, str]:
    """Return the first candidate in which the library's and our buffers hold every trial matrix.

    Args:
        compress: see ``certify``.
        candidates: orders to try, each with every region rule that gives the observed size.
        rows: rows of the operand.
        cols: columns of the operand.
        dtype: element type of the operand.
        device: where it lies.
        pack: see ``certify``.
        check: see ``certify``.

    Returns:
        the layout or None, and the first difference of the last candidate dropped.
    """
    pack = pack or both_ways
    left: list[MetadataLayout] | None = None
    difference = ""
    for name, x in unpruned(rows, cols, dtype, device):
        pruned = pruned_24(x)
        truth = compress(pruned)
        if left is None:
            nbytes = truth.numel() - rows * cols // 2 * dtype.itemsize
            left = _distinct(candidates, rows, cols, nbytes)
            difference = f"none has {nbytes} bytes of metadata at {rows} x {cols}"
        for layout in list(left):
            fault = _trial_fault(x, pruned, truth, layout, pack)
            if fault is not None:
                left.remove(layout)
                difference = f"{name} matrix in {layout.name!r}: {fault}"
        if not left:
            return None, difference
    for layout in left or ():
        fault = _product_fault(layout, rows, cols, dtype, device, pack, check)
        if fault is None:
            return layout, difference
        difference = f"product in {layout.name!r}: {fault}"
    return None, difference


def _trial_fault(
    x: Tensor, pruned: Tensor, truth: Tensor, layout: MetadataLayout, pack: Pack
) -> str | None:
    fault = reading_fault(truth, layout, pruned, increasing=False)
    if fault is not None:
        return f"the library's buffer: {fault}"
    for direction, buffer in zip(("features", "tokens"), pack(x, layout), strict=False):
        fault = reading_fault(buffer, layout, pruned, increasing=True)
        if fault is not None:
            return f"ours along {direction}: {fault}"
    return None


def _product_fault(
    layout: MetadataLayout,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    device: torch.device,
    pack: Pack,
    check: Check | None,
) -> str | None:
    if check is None:
        return None
    generator = torch.Generator(device).manual_seed(rows * 37 + cols)
    left = two_of_four(rows, cols, dtype, device, generator)
    return check(next(iter(pack(left, layout))), left)


def _distinct(
    candidates: Iterable[MetadataLayout], rows: int, cols: int, nbytes: int
) -> list[MetadataLayout]:
    """Return the candidates that fit; of those that write the same bytes here, the first."""
    found: list[MetadataLayout] = []
    for candidate in candidates:
        for layout in candidate.fitted(rows, cols, nbytes)[:1]:
            if not any(layout.reads_as(other, rows, cols) for other in found):
                found.append(layout)
    return found


def both_ways(x: Tensor, layout: MetadataLayout) -> Iterable[Tensor]:
    """Yield what the packers write for an operand, along features and along tokens."""
    along_features = pack_gradient(x, features="magnitude", features_layout=layout).features
    if along_features is not None:
        yield along_features.buffer
    turned = x.t().contiguous()
    along_tokens = pack_gradient(turned, features=None, tokens="magnitude", tokens_layout=layout)
    if along_tokens.tokens is not None:
        yield along_tokens.tokens.buffer


def plan_compress(plan: Any) -> Compress:
    """Return a plan's own Compress as a function from a dense tensor to the whole buffer.

    Args:
        plan: pycusparselt.MatmulPlan whose structured operand is row-major without padding.

    Source: cusparseLtSpMMACompressedSize, cusparseLtSpMMACompress.
    """

    def compress(dense: Tensor) -> Tensor:
        dense = dense.contiguous()
        size, scratch_size = plan.compressed_size()
        # Filled, so that a byte the library leaves alone cannot pass as one it wrote.
        out = torch.full((size,), 0xA5, dtype=torch.uint8, device=dense.device)
        scratch = torch.empty(max(scratch_size, 16), dtype=torch.uint8, device=dense.device)
        stream = 0
        if dense.is_cuda:
            stream = torch.cuda.current_stream(dense.device).cuda_stream
        plan.compress(dense.data_ptr(), out.data_ptr(), scratch.data_ptr(), stream=stream)
        return out

    return compress
