"""Prove that our packing is the library's, byte for byte, or say why it is not.

Per library version, device, dtype, shape class and plan the order of the metadata is learned from
the library's own Compress; per shape, random and adversarial matrices are packed and compressed
and the two buffers compared whole. What is proven is kept on disk. What is not proven is never
used: the caller compresses with the library instead, and can print the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt import cache
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.packing.launch import KERNEL_DTYPES
from sdgp_cusparselt.packing.layout import MetadataLayout, padded_shape
from sdgp_cusparselt.packing.learn import Compress, learn
from sdgp_cusparselt.packing.pack import pack_gradient
from sdgp_cusparselt.pruning.methods import prune

# A cached proof holds for one way of packing: a change of the packers' bytes raises this.
PROOF_VERSION = 1
_FOLDER = "layouts"

Pack = Callable[[Tensor, MetadataLayout], Iterable[Tensor]]


@dataclass(frozen=True)
class Certificate:
    """The outcome for one shape under one plan.

    Attributes:
        layout: the order to pack in, or None: compress with the library.
        reason: how it was proven, or what differed.
        probes: matrices compressed to learn the order; 0 where it was known.
    """

    layout: MetadataLayout | None
    reason: str
    probes: int = 0

    @property
    def proven(self) -> bool:
        """Whether the fast packer may be used."""
        return self.layout is not None


def shape_class(rows: int, cols: int) -> str:
    """Return what shapes must share for one order to be expected of them.

    The orders that are known depend on whether there are 256 rows, and on which powers of two up
    to a tile of 128 x 64 divide the shape. Every shape is proven on its own all the same.
    """
    row_power = min(rows & -rows, 128)
    col_power = min(cols & -cols, 64)
    return f"rows{'>=' if rows >= 256 else '<'}256 rows%{row_power} cols%{col_power}"


def certify(
    compress: Compress,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    device: torch.device | str,
    identity: Mapping[str, object],
    *,
    folder: Path | None = None,
    pack: Pack | None = None,
) -> Certificate:
    """Learn the library's metadata order for a shape and prove the packer against it.

    Args:
        compress: a plan's Compress; takes a 2:4 [rows, cols] tensor on device, returns the whole
            compressed buffer as uint8 (``plan_compress`` makes one).
        rows: rows of the operand, padded to the library's multiples.
        cols: columns of the operand, likewise.
        dtype: element type of the operand.
        device: where it lies.
        identity: what the order may depend on besides: library version, device name, and the
            plan's algorithm id, operand orders and whatever else tells plans apart.
        folder: where proofs are kept; the cache folder if None.
        pack: gives every buffer that our packers make of an unpruned operand in a layout; both
            directions of ``pack_gradient`` if None.

    Returns:
        Certificate: with the layout, or with the reason why there is none.

    Raises:
        ValueError: a shape that the library would not take.

    Note:
        A disagreement is never repaired by guessing: where the order changes between shapes of a
        class, the class is refused.
    """
    device = torch.device(device)
    if padded_shape(rows, cols, dtype) != (rows, cols):
        rule = f"the padded shape {padded_shape(rows, cols, dtype)}"
        raise value_error("certify", "rows, cols", rule, (rows, cols), "Use padded_shape.")
    if dtype not in KERNEL_DTYPES:
        return Certificate(None, f"{dtype} operands are compressed by the library")
    path = proof_path(identity, rows, cols, dtype, folder)
    known = cache.load(path) or {}
    shape = [rows, cols]
    if shape in known.get("proven", []):
        return Certificate(_layouts(known)[0], "proven before")
    if known.get("refused"):
        return Certificate(None, str(known["refused"]))
    candidates, probes = _layouts(known), 0
    if not candidates:
        learned = learn(compress, rows, cols, dtype, device)
        candidates, probes = learned.candidates, learned.probes
        if not candidates:
            return _refuse(path, identity, shape, learned.reason, probes)
    left, difference = prove(compress, candidates, rows, cols, dtype, device, pack or both_ways)
    if not left:
        reason = f"{rows} x {cols}: {difference}"
        if known.get("proven"):
            reason += f"; the order that holds for {known['proven']} does not hold here"
        return _refuse(path, identity, shape, reason, probes)
    content = cache.update(path, lambda old: _proven(old, identity, shape, left))
    return Certificate(_layouts(content)[0], f"{probes} probes, then equal bytes", probes)


def prove(
    compress: Compress,
    candidates: Iterable[MetadataLayout],
    rows: int,
    cols: int,
    dtype: torch.dtype,
    device: torch.device,
    pack: Pack | None = None,
) -> tuple[list[MetadataLayout], str]:
    """Return the candidates whose packed bytes are the library's on every trial matrix.

    Args:
        compress: see ``certify``.
        candidates: layouts to try.
        rows: rows of the operand.
        cols: columns of the operand.
        dtype: element type of the operand.
        device: where it lies.
        pack: see ``certify``.

    Returns:
        the candidates left, and the first difference of the last one dropped.
    """
    pack = pack or both_ways
    fitting = [layout for layout in candidates if layout.misfit(rows, cols) is None]
    # Layouts that only differ beyond this shape write the same bytes here: one stands for all.
    alike = _alike(fitting, rows, cols)
    left, difference = list(alike), "" if fitting else "no layout of this class fits"
    for name, x in trials(rows, cols, dtype, device):
        if not left:
            break
        pruned = prune(x)
        # -0.0 is a zero to us; a library may keep its sign where it keeps a zero.
        pruned = torch.where(pruned == 0, torch.zeros_like(pruned), pruned)
        truth = compress(pruned)
        survivors = []
        for table in left:
            layout = alike[table][0]
            found = _difference(pack(x, layout), truth, rows * cols // 2 * dtype.itemsize)
            if found is None:
                survivors.append(table)
            else:
                difference = f"{name} matrix: {found}"
        left = survivors
    return [layout for layout in fitting if _places(layout, rows, cols) in left], difference


def _alike(
    layouts: Iterable[MetadataLayout], rows: int, cols: int
) -> dict[bytes, list[MetadataLayout]]:
    groups: dict[bytes, list[MetadataLayout]] = {}
    for layout in layouts:
        groups.setdefault(_places(layout, rows, cols), []).append(layout)
    return groups


def _places(layout: MetadataLayout, rows: int, cols: int) -> bytes:
    """Return what tells layouts apart at one shape: where rows and groups lie, size, padding."""
    zero = torch.zeros((), dtype=torch.int64)
    row = layout.address(torch.arange(rows), zero, rows, cols)
    group = layout.address(zero, torch.arange(cols // 4), rows, cols)
    sizes = torch.tensor([layout.nbytes(rows, cols), layout.padding])
    return torch.cat((row, group, sizes)).numpy().tobytes()


def both_ways(x: Tensor, layout: MetadataLayout) -> Iterable[Tensor]:
    """Yield what the packers write for an operand, along features and along tokens."""
    along_features = pack_gradient(x, features="magnitude", features_layout=layout)
    along_tokens = pack_gradient(
        x.t().contiguous(), features=None, tokens="magnitude", tokens_layout=layout
    )
    for packed in (along_features.features, along_tokens.tokens):
        if packed is not None:
            yield packed.buffer


def trials(
    rows: int, cols: int, dtype: torch.dtype, device: torch.device
) -> Iterable[tuple[str, Tensor]]:
    """Yield unpruned matrices to compare on: random ones, and what a packer gets wrong first."""
    generator = torch.Generator(device=device).manual_seed(rows * 31 + cols)

    def uniform() -> Tensor:
        return torch.rand((rows, cols), generator=generator, device=device)

    normal = torch.randn((rows, cols), generator=generator, device=device)
    yield "random", normal.to(dtype)
    yield "second random", (uniform() - 0.5).to(dtype)
    # Ties, and groups with none, one or two non-zeros in every position.
    few = torch.where(uniform() < 0.3, normal.sign(), 0.0)
    yield "sparse", few.to(dtype)
    largest = torch.finfo(dtype).max
    special = normal.to(dtype)
    for value in (0.0, -0.0, float("inf"), -float("inf"), largest, torch.finfo(dtype).tiny / 4):
        special = torch.where(uniform() < 0.1, torch.full_like(special, value), special)
    yield "special", special


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


def proof_path(
    identity: Mapping[str, object],
    rows: int,
    cols: int,
    dtype: torch.dtype,
    folder: Path | None = None,
) -> Path:
    """Return the file that holds what is known for an identity, a dtype and a shape class."""
    key = {name: str(value) for name, value in identity.items()}
    key |= {"dtype": str(dtype), "class": shape_class(rows, cols), "proof": str(PROOF_VERSION)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return (folder or cache.cache_dir() / _FOLDER) / f"{digest[:32]}.json"


def learned_layouts(folder: Path | None = None) -> list[dict[str, Any]]:
    """Return every proof on disk, for ``sdgp info``: identity, class, layouts or the refusal."""
    where = folder or cache.cache_dir() / _FOLDER
    found = (cache.load(path) for path in sorted(where.glob("*.json")))
    return [content for content in found if content is not None]


def _layouts(content: Mapping[str, Any]) -> tuple[MetadataLayout, ...]:
    return tuple(MetadataLayout.from_json(text) for text in content.get("candidates", []))


def _proven(
    old: dict[str, Any],
    identity: Mapping[str, object],
    shape: list[int],
    layouts: list[MetadataLayout],
) -> dict[str, Any]:
    proven = [*old.get("proven", []), shape]
    names = {name: str(value) for name, value in identity.items()}
    return {
        "identity": names,
        "class": shape_class(*shape),
        "candidates": [layout.to_json() for layout in layouts],
        "proven": [list(pair) for pair in sorted({(r, c) for r, c in proven})],
    }


def _refuse(
    path: Path, identity: Mapping[str, object], shape: list[int], reason: str, probes: int
) -> Certificate:
    names = {name: str(value) for name, value in identity.items()}
    content = {"identity": names, "class": shape_class(*shape), "refused": reason}
    cache.store(path, content)
    return Certificate(None, reason, probes)


def _difference(buffers: Iterable[Tensor], truth: Tensor, value_bytes: int) -> str | None:
    """Describe the first byte in which a buffer differs from the library's, or return None."""
    for number, buffer in enumerate(buffers):
        direction = ("along features", "along tokens")[number] if number < 2 else str(number)
        if buffer.numel() != truth.numel():
            return f"{direction}: {buffer.numel()} bytes, the library's are {truth.numel()}"
        if torch.equal(buffer, truth):
            continue
        bad = (buffer != truth).nonzero()
        at = int(bad[0])
        part = f"value byte {at}" if at < value_bytes else f"metadata byte {at - value_bytes}"
        return (
            f"{direction}: {len(bad)} bytes differ, first {part}, "
            f"0x{int(buffer[at]):02x} for 0x{int(truth[at]):02x}"
        )
    return None
