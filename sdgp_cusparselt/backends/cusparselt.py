"""The cuSPARSELt backend: products of a packed gradient on sparse tensor cores."""

from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt.backends.base import Problem
from sdgp_cusparselt.backends.candidates import offered
from sdgp_cusparselt.backends.certificates import Certificates
from sdgp_cusparselt.backends.float16 import float16_fault
from sdgp_cusparselt.backends.gemm import Candidate, Gemm, Packer
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.backends.plans import (
    RESULT_TYPES,
    STRUCTURED_MULTIPLE,
    PlanCache,
    padded_columns,
)
from sdgp_cusparselt.backends.reasons import memory_reasons, pattern_reasons, size_reasons
from sdgp_cusparselt.devices import current_stream, on_device
from sdgp_cusparselt.errors import NotSupportedError, SDGPError
from sdgp_cusparselt.packing.agreement import packer_fault
from sdgp_cusparselt.packing.pack import pack_gradient
from sdgp_cusparselt.packing.proofs import Certificate
from sdgp_cusparselt.pruning.methods import prune


class CusparseLtBackend:
    """Packs grad_output 2:4 and multiplies it through cuSPARSELt.

    Args:
        machine: where it runs; the CUDA devices and the installed library if None.
        plan_limit: plans kept per thread and device.
    """

    name = "cusparselt"

    def __init__(self, machine: Machine | None = None, plan_limit: int = 512) -> None:
        self.machine = Machine() if machine is None else machine
        self.plan_limit = plan_limit
        self._plans: PlanCache | None = None
        self.certificates = Certificates(self.machine, lambda: self.plans)

    @property
    def plans(self) -> PlanCache:
        """The plan cache; the library is opened by the first access."""
        if self._plans is None:
            self._plans = PlanCache(self.machine.library(), self.plan_limit)
        return self._plans

    def machine_reasons(self, device: torch.device | None = None) -> list[str]:
        """Return why ``device``, or every device of this machine, runs nothing sparse."""
        return self.machine.reasons(device)

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Return every rule that ``problem`` breaks; empty if it can run sparse."""
        rules = (pattern_reasons, size_reasons, memory_reasons)
        broken = [reason for rule in rules for reason in rule(problem)]
        return self.machine_reasons(problem.device) or broken

    def gemm_of(self, problem: Problem) -> Gemm:
        """Return the sparse product that ``problem`` becomes."""
        m, n, k = problem.m, problem.n, problem.k
        if problem.structured == "weight":
            columns, order = padded_columns(n, problem.dtype), problem.dense_order or "col"
            result = RESULT_TYPES.get(problem.dtype)
            return Gemm(m, columns, k, problem.dtype, order, problem.device, "col", result)
        if problem.product == "grad_weight":
            k -= k % STRUCTURED_MULTIPLE
        return Gemm(m, n, k, problem.dtype, problem.dense_order or "row", problem.device)

    def candidates(self, gemm: Gemm, *, safe: bool = True) -> list[Candidate]:
        """Return ways of running gemm; see ``SparseExecutor`` and ``offered``.

        Raises:
            NotSupportedError: float16 on sm90 failed its self-test, which runs once per machine.
        """
        reasons = self.float16_reasons(gemm.device) if gemm.dtype == torch.float16 else []
        if reasons:
            raise NotSupportedError(reasons[0])
        return self.offered(gemm, safe=safe)

    def float16_reasons(self, device: torch.device) -> list[str]:
        """Return why float16 is not used on ``device``; may run a self-test of some seconds."""
        if self.machine.capability(device)[0] != 9:
            return []
        found = float16_fault(self.machine, device)
        return [] if found is None else [f"float16 failed its self-test on this GPU: {found}"]

    def offered(self, gemm: Gemm, *, safe: bool = True) -> list[Candidate]:
        """Return what ``candidates`` does, without the self-test.

        Args:
            gemm: the product.
            safe: only what cannot hang or end the CUDA context, as far as is known; with False
                also segment-K and algorithms that nobody was seen to run, for a child process.
        """
        major = self.machine.capability(gemm.device)[0]
        return offered(gemm, self.plans.max_alg_id(gemm), major, safe=safe)

    def machine_key(self, device: torch.device) -> dict[str, str]:
        """Return what a measurement on ``device`` depends on; see ``SparseExecutor``."""
        return self.machine.key(device)

    def pack(
        self,
        x: Tensor,
        gemm: Gemm,
        candidate: Candidate,
        *,
        method: str,
        transpose: bool = False,
        rows_per_sample: int | None = None,
    ) -> Tensor:
        """Return x pruned and packed as candidate's plan reads it; see ``SparseExecutor``.

        Args:
            x: [M, K], or [K, M] with ``transpose``; columns adjacent in memory.
            gemm: the product that x is packed for.
            candidate: how it will be multiplied.
            method: how to prune 2:4; "none" if x is 2:4 already.
            transpose: pack x.T.
            rows_per_sample: rows of x over which rescaled_magnitude sums; all if None.

        Returns:
            uint8 buffer of values and metadata.
        """
        layout = self.certificate(gemm, candidate).layout
        wanted: dict[str, Any] = {
            "features": None if transpose else method,
            "tokens": method if transpose else None,
            "features_layout": layout,
            "tokens_layout": layout,
            "tokens_per_sample": rows_per_sample,
        }
        if layout is None or packer_fault(x, **wanted) is not None:
            pruned = pruned_operand(x, method, transpose, rows_per_sample)
            return self.compress(pruned, gemm, candidate)
        packed = pack_gradient(x, **wanted)
        operand = packed.tokens if transpose else packed.features
        if operand is None:
            raise SDGPError("pack: the packing layer left out the operand that was asked for")
        return operand.buffer

    def certificate(self, gemm: Gemm, candidate: Candidate) -> Certificate:
        """Return whether our packing is proven for a plan, and in what order."""
        return self.certificates(gemm, candidate)

    def packer(self, gemm: Gemm, candidate: Candidate) -> Packer:
        """Return what packs for a plan; see ``SparseExecutor``."""
        return self.certificate(gemm, candidate).packer

    def matmul(
        self,
        packed: Tensor,
        dense: Tensor,
        gemm: Gemm,
        candidate: Candidate,
    ) -> Tensor:
        """Return packed @ dense: [M, K] @ [K, N] -> [M, N]; see ``SparseExecutor``."""
        planned = self.plans.get(gemm, candidate)
        with on_device(gemm.device):
            return planned.product(packed, dense)[: gemm.m]

    def compress(self, pruned: Tensor, gemm: Gemm, candidate: Candidate) -> Tensor:
        """Return pruned [M, K], which is 2:4, as the library itself packs it for a plan."""
        planned, device = self.plans.get(gemm, candidate), pruned.device
        packed = torch.empty(planned.compressed_size, dtype=torch.uint8, device=device)
        with on_device(device):
            planned.compress(pruned, packed.data_ptr(), current_stream(device))
        return packed


def pruned_operand(
    x: Tensor,
    method: str,
    transpose: bool,
    rows_per_sample: int | None,
    n: int = 2,
    m: int = 4,
) -> Tensor:
    """Return x, or x.T, pruned along its columns in plain torch.

    Args:
        x: [M, K], or [K, M] with ``transpose``.
        method: how to prune.
        transpose: whether the operand is x.T.
        rows_per_sample: rows of it over which rescaled_magnitude sums; all if None.
        n: values kept of each group.
        m: size of a group.
    """
    operand = x.t().contiguous() if transpose else x
    if method == "none":  # of any dtype
        return operand
    if method != "rescaled_magnitude" or rows_per_sample is None:
        return prune(operand, method=method, n=n, m=m)
    samples = operand.view(-1, rows_per_sample, operand.shape[1])
    return prune(samples, method=method, n=n, m=m, scale_dims=(1,)).view(operand.shape)
