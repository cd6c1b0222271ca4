"""What tuning found for one product, and how that is written as JSON."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sdgp_cusparselt.backends.gemm import Candidate, Gemm, Packer
from sdgp_cusparselt.tuning.buckets import bucket_of

Orders: dict[str, Literal["row", "col"]] = {"row": "row", "col": "col"}
Uses: dict[str, Literal["sparse", "dense"]] = {"sparse": "sparse", "dense": "dense"}
Packers: dict[str, Packer] = {"ours": "ours", "library": "library"}


@dataclass(frozen=True)
class Rival:
    """What the sparse path has to beat, and what it still has to do with its product.

    Attributes:
        name: part of the cache key; names the geometry where it matters, such as
            ``conv 3x3 stride 1 56x56``.
        dense: (left [M, K], right [K, N]) -> the dense result; the operands are unpruned.
        finish: sparse product [M, N] -> what ``dense`` returns, such as a col2im.
        before: what the sparse path does with the left operand [M, K] before it packs.
    """

    name: str
    dense: Callable[[Tensor, Tensor], object]
    finish: Callable[[Tensor], object] = lambda product: product
    before: Callable[[Tensor], object] = lambda left: None


#: The plain product: the rival of linear layers and 1 x 1 convolutions.
MATMUL = Rival("mm", torch.mm)
#: torch's product of activations with a weight that is not transposed in memory, the rival of a
#: weight that is packed ahead: (weight [M, K], activations [N, K].T) -> [N, M].
LINEAR = Rival("linear", lambda left, right: torch.mm(right.t(), left.t()))

#: The rivals that need no geometry, by name.
RIVALS = {rival.name: rival for rival in (MATMUL, LINEAR)}


class Key(NamedTuple):
    """What a decision is for. The method is part of it because pack takes part in the race."""

    gemm: Gemm
    method: str
    transpose: bool
    rival: str

    def text(self) -> str:
        """Return the key within one machine's file; devices of one machine key share it."""
        operand = f"{self.method} transposed" if self.transpose else self.method
        return f"{self.gemm.describe()} {operand} vs {self.rival}"

    @property
    def measured(self) -> "Key":
        """The key of the product that is measured in its place, and of what is stored."""
        return self._replace(gemm=bucket_of(self.gemm, self.transpose))


@dataclass(frozen=True)
class Decision:
    """Which way one product runs on one machine, and why.

    Attributes:
        gemm: the product that was measured; others of its bucket use the decision as well.
        method: how its left operand is pruned.
        transpose: whether that operand is the transpose of the tensor that is packed.
        rival: name of what the sparse path raced against.
        use: the faster way that is right: "sparse" or "dense".
        candidate: the fastest proven candidate, also where dense is faster (a caller that forces
            the sparse path runs it); None if no candidate is proven.
        reason: why ``use`` is what it is.
        sparse_us: microseconds of pack, matmul and finish together, without the pack of a weight
            that is packed ahead; None where not timed.
        pack_us: of the pack alone.
        matmul_us: of the sparse product alone.
        dense_us: of the rival.
        rejected: every candidate that is out, with the reason.
        packer: what packed the operand in the race: our kernel, or the library's own Compress,
            which is another contender; None without a candidate.
        elsewhere: the fastest proven candidate for sizes of the bucket that were not measured: one
            that cannot hang there, where ``candidate`` itself was only tried in a process that
            could be spared.
        elsewhere_us: of pack, its product and finish.
        bounded: the search tried a few candidates only; ``sdgp tune`` searches again.
        predicted: nothing was tried, because it cannot win by what is published of this GPU.
        transient: the reason may pass (no memory, a busy lock), so nothing is stored on disk.
        valid_s: seconds for which this process remembers a transient decision.
        conditions: how the times were taken.
    """

    gemm: Gemm
    method: str
    transpose: bool
    rival: str
    use: Literal["sparse", "dense"]
    candidate: Candidate | None
    reason: str
    sparse_us: float | None = None
    pack_us: float | None = None
    matmul_us: float | None = None
    dense_us: float | None = None
    rejected: tuple[tuple[Candidate, str], ...] = ()
    packer: Packer | None = None
    elsewhere: Candidate | None = None
    elsewhere_us: float | None = None
    bounded: bool = False
    predicted: bool = False
    transient: bool = False
    valid_s: float = math.inf
    conditions: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def chosen(self) -> bool:
        """Whether ``use`` is the faster way, measured or predicted, and no fallback."""
        return self.sparse_us is not None or self.predicted

    @property
    def key(self) -> Key:
        """What this decision is for."""
        return Key(self.gemm, self.method, self.transpose, self.rival)

    @property
    def speedup(self) -> float | None:
        """Time of dense over time of the sparse path with its pack; None where not timed."""
        if self.sparse_us is None or self.dense_us is None:
            return None
        return self.dense_us / self.sparse_us

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        gemm = self.gemm
        return {
            "m": gemm.m,
            "n": gemm.n,
            "k": gemm.k,
            "dtype": str(gemm.dtype).removeprefix("torch."),
            "dense_order": gemm.dense_order,
            **result_as_dict(gemm),
            "method": self.method,
            "transpose": self.transpose,
            "rival": self.rival,
            "use": self.use,
            "candidate": None if self.candidate is None else asdict(self.candidate),
            "reason": self.reason,
            "sparse_us": self.sparse_us,
            "pack_us": self.pack_us,
            "matmul_us": self.matmul_us,
            "dense_us": self.dense_us,
            "rejected": rejected_as_list(self.rejected),
            "packer": self.packer,
            "elsewhere": None if self.elsewhere is None else asdict(self.elsewhere),
            "elsewhere_us": self.elsewhere_us,
            "bounded": self.bounded,
            "conditions": self.conditions,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], device: torch.device) -> "Decision":
        """Return what ``as_dict`` wrote, for a device of the machine that it was measured on.

        Raises:
            KeyError, TypeError, ValueError: data is not what ``as_dict`` writes.
        """
        candidate, elsewhere = _candidate(data["candidate"]), _candidate(data["elsewhere"])
        decision = cls(
            gemm_from_dict(data, device),
            str(data["method"]),
            bool(data["transpose"]),
            str(data["rival"]),
            Uses[data["use"]],
            candidate,
            str(data["reason"]),
            _time(data["sparse_us"]),
            _time(data["pack_us"]),
            _time(data["matmul_us"]),
            _time(data["dense_us"]),
            rejected=rejected_from_list(data["rejected"]),
            packer=None if data["packer"] is None else Packers[data["packer"]],
            elsewhere=elsewhere,
            elsewhere_us=_time(data["elsewhere_us"]),
            bounded=bool(data["bounded"]),
            conditions=dict(data["conditions"]),
        )
        if decision.use == "sparse" and candidate is None:
            raise ValueError("a sparse decision names no candidate")
        return decision


def dense_decision(
    key: Key,
    reason: str,
    *,
    rejected: tuple[tuple[Candidate, str], ...] = (),
    transient: bool = False,
    valid_s: float = math.inf,
) -> Decision:
    """Return the decision that nothing sparse runs this product."""
    about: dict[str, Any] = {"rejected": rejected, "transient": transient, "valid_s": valid_s}
    return Decision(*key, "dense", None, reason, **about)


def gemm_from_dict(data: Mapping[str, Any], device: torch.device) -> Gemm:
    """Return the product that m, n, k, dtype and dense_order name.

    Raises:
        KeyError, TypeError, ValueError: one is missing, or no size, dtype or order.
    """
    m, n, k = (_int(data[name]) for name in ("m", "n", "k"))
    result = data.get("result_dtype")
    return Gemm(
        m,
        n,
        k,
        dtype_from_name(data["dtype"]),
        Orders[data["dense_order"]],
        device,
        Orders[data.get("result_order", "row")],
        None if result is None else dtype_from_name(result),
    )


def result_as_dict(gemm: Gemm) -> dict[str, str]:
    """Return what is unusual of a product's result as plain JSON types; mostly nothing."""
    found: dict[str, str] = {}
    if gemm.result_order != "row":
        found["result_order"] = gemm.result_order
    if gemm.result_dtype is not None:
        found["result_dtype"] = str(gemm.result_dtype).removeprefix("torch.")
    return found


def dtype_from_name(name: str) -> torch.dtype:
    """Return the dtype that torch calls ``name``.

    Raises:
        ValueError: there is none.
    """
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype_from_name: name must be a dtype of torch, got {name!r}")
    return dtype


def describe_candidate(candidate: Candidate) -> str:
    """Return a short form such as ``alg 3 split_k 4``."""
    parts = [f"alg {candidate.alg_id}"]
    if candidate.split_k != 1:
        parts.append(f"split_k {candidate.split_k}")
    if candidate.split_k_mode is not None:
        parts.append(f"mode {candidate.split_k_mode}")
    if candidate.split_k_buffers:
        parts.append(f"buffers {candidate.split_k_buffers}")
    return " ".join(parts)


def rejected_as_list(rejected: Iterable[tuple[Candidate, str]]) -> list[dict[str, Any]]:
    """Return rejected candidates, and why, as plain JSON types."""
    return [{**asdict(candidate), "reason": reason} for candidate, reason in rejected]


def rejected_from_list(entries: Iterable[dict[str, Any]]) -> tuple[tuple[Candidate, str], ...]:
    """Return what ``rejected_as_list`` wrote.

    Raises:
        KeyError, TypeError: an entry has no reason, or other fields than a candidate.
    """
    return tuple(_rejection(entry) for entry in entries)


def _candidate(data: dict[str, Any] | None) -> Candidate | None:
    return None if data is None else Candidate(**data)


def _rejection(entry: dict[str, Any]) -> tuple[Candidate, str]:
    fields = {name: value for name, value in entry.items() if name != "reason"}
    return Candidate(**fields), str(entry["reason"])


def _int(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"a size must be an int, got {value!r}")
    return value


def _time(value: object) -> float | None:
    if value is None or isinstance(value, float):
        return value
    raise TypeError(f"a time must be a number, got {value!r}")
