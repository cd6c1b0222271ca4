"""An executor in plain torch whose algorithms misbehave as told, and a timer with given times."""

import time
from collections import Counter
from collections.abc import Callable

import torch
from pycusparselt.errors import CusparseLtError
from torch import Tensor

from sdgp_cusparselt.backends.gemm import Candidate, Gemm, Packer
from sdgp_cusparselt.pruning.methods import prune

CPU = torch.device("cpu")
GEMM = Gemm(32, 24, 48, torch.bfloat16, "row", CPU)
#: What is measured in its place: the top of its bucket of token counts.
TOP = Gemm(64, 24, 48, torch.bfloat16, "row", CPU)


def refusal() -> CusparseLtError:
    return CusparseLtError(10, "CUSPARSE_STATUS_NOT_SUPPORTED", "cusparseLtMatmul")


class FakeExecutor:
    """Algorithms by number; ``kinds[i]`` says how algorithm i misbehaves, "good" if it does not."""

    def __init__(self, *kinds: str, machine: str = "a GPU", unsafe: tuple[str, ...] = ()) -> None:
        self.kinds = kinds + unsafe
        self.safe = len(kinds)
        self.machine = machine
        self.calls: Counter[str] = Counter()

    def candidates(self, gemm: Gemm, *, safe: bool = True) -> list[Candidate]:
        self.calls["candidates"] += 1
        if self.kinds == ("refuses",):
            raise refusal()
        return [Candidate(i) for i in range(self.safe if safe else len(self.kinds))]

    def packer(self, gemm: Gemm, candidate: Candidate) -> Packer:
        return "library" if self.kinds[candidate.alg_id] == "no layout" else "ours"

    def pack(
        self, x: Tensor, gemm: Gemm, candidate: Candidate, *, method: str, transpose: bool = False
    ) -> Tensor:
        self.calls["pack"] += 1
        kind = self.kinds[candidate.alg_id]
        if kind == "no plan":
            raise refusal()
        if kind == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        operand = (x.t() if transpose else x).contiguous()
        assert operand.shape == (gemm.m, gemm.k)
        if kind == "packs the wrong two" and method != "none":
            operand = prune(-operand.abs().neg(), method="magnitude").neg()
        pruned = prune(operand, method=method)
        groups = pruned.float().view(gemm.m, -1, 4)
        assert ((groups != 0).sum(-1) <= 2).all(), "given as 2:4, but it is not"
        return pruned.clone().view(torch.uint8).view(-1)

    def matmul(self, packed: Tensor, dense: Tensor, gemm: Gemm, candidate: Candidate) -> Tensor:
        self.calls["matmul"] += 1
        assert dense.shape == (gemm.k, gemm.n)
        assert dense.stride(1 if gemm.dense_order == "row" else 0) == 1
        left = packed.view(gemm.dtype).view(gemm.m, gemm.k)
        return self._spoilt(self.kinds[candidate.alg_id], left, dense)

    def _spoilt(self, kind: str, left: Tensor, dense: Tensor) -> Tensor:
        if kind == "writes nothing":
            return torch.empty(left.shape[0], dense.shape[1], dtype=left.dtype)
        result = (left.float() @ dense.float()).to(left.dtype)
        if kind == "refuses matmul":
            raise refusal()
        if kind == "sleeps":
            time.sleep(60)
        if kind == "broken":
            raise TypeError("a programming error")
        if kind == "one element":
            result[-1, -1] += 1
        if kind == "flickers" and self.calls["matmul"] % 3 == 0:
            result[0, 3] = -result[0, 3] - 1
        if kind == "last group":
            result = (left[:, :-4].float() @ dense[:-4].float()).to(left.dtype)
        if kind == "nan":
            result.fill_(torch.nan)
        return result

    def machine_key(self, device: torch.device) -> dict[str, str]:
        return {"device": self.machine, "library": "0.8.1"}


class FakeTimer:
    """Runs what it is given and answers with the microseconds that ``times`` has for its label."""

    def __init__(self, times: dict[str, float] | Callable[[str, int], float]) -> None:
        self.times = times
        self.labels: list[str] = []

    def __call__(self, run: Callable[[], object], label: str) -> float:
        run()
        self.labels.append(label)
        if callable(self.times):
            return self.times(label, self.labels.count(label))
        return self.times[label]


def fixed(dense: float = 100.0, pack: float = 5.0, **algorithms: float) -> FakeTimer:
    """Times by keyword: a0=40.0 is the time of algorithm 0, screened or with its pack."""

    def time(label: str, count: int) -> float:
        if label == "dense":
            return dense
        if label.startswith("pack for"):
            return pack
        return algorithms["a" + label.removeprefix("alg ")]

    return FakeTimer(time)
