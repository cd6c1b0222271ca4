"""The cuSPARSELt backend: products of a packed gradient on sparse tensor cores."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt.backends import convolution
from sdgp_cusparselt.backends.base import Backend, ConvGeometry, Problem
from sdgp_cusparselt.backends.float16 import float16_fault
from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.backends.plans import (
    DATA_TYPES,
    DENSE_MULTIPLE,
    STRUCTURED_MULTIPLE,
    PlanCache,
    current_stream,
    dense_order,
    is_capturing,
    on_device,
)
from sdgp_cusparselt.config import SDGPConfig
from sdgp_cusparselt.errors import NotSupportedError, SDGPError
from sdgp_cusparselt.packing.certify import Certificate, certify, plan_compress
from sdgp_cusparselt.packing.pack import pack_gradient
from sdgp_cusparselt.patterns import HARDWARE_PATTERNS
from sdgp_cusparselt.pruning import prune
from sdgp_cusparselt.spans import span

#: Segment-K (split_k = -1) may hang on sm90 with fewer sparse rows than about 400.
SEGMENT_K_ROWS = 1024
#: The library counts the elements of a matrix in 32 bits.
MAX_ELEMENTS = 2**31 - 1
HEURISTIC, DATA_PARALLEL, STREAM_K = 3, 4, 6  # SplitKMode, sm100 and later


class CusparseLtBackend(Backend):
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
        self.certificates: dict[Hashable, Certificate] = {}

    @property
    def plans(self) -> PlanCache:
        """The plan cache; the library is opened by the first access."""
        if self._plans is None:
            self._plans = PlanCache(self.machine.library(), self.plan_limit)
        return self._plans

    def machine_reasons(self) -> list[str]:
        """Return why no device of this machine can run sparse products; see ``Backend``."""
        return self.machine.reasons()

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Return every rule that ``problem`` breaks; see ``Backend``."""
        machine = self.machine_reasons()
        if machine:
            return machine
        if problem.device.type != self.machine.device_type:
            return [f"the tensors are on {problem.device}, not on {self.machine.device_type}"]
        return [*_pattern_reasons(problem), *_shape_reasons(problem)]

    def gemm_of(self, problem: Problem) -> Gemm:
        """Return the sparse product that ``problem`` becomes."""
        m, n, k = problem.m, problem.n, problem.k
        if problem.product == "grad_weight":
            k -= k % STRUCTURED_MULTIPLE
        return Gemm(m, n, k, problem.dtype, problem.dense_order, problem.device)

    def candidates(self, gemm: Gemm) -> list[Candidate]:
        """Return every way of running gemm that cannot hang; see ``SparseExecutor``.

        Raises:
            NotSupportedError: float16 on sm90 failed its self-test, which runs once per machine.
        """
        reasons = self.float16_reasons(gemm.device) if gemm.dtype == torch.float16 else []
        if reasons:
            raise NotSupportedError(reasons[0])
        return self.offered(gemm)

    def float16_reasons(self, device: torch.device) -> list[str]:
        """Return why float16 is not used on ``device``; may run a self-test of some seconds."""
        if self.machine.capability(device)[0] != 9:
            return []
        found = float16_fault(self.machine, device)
        return [] if found is None else [f"float16 failed its self-test on this GPU: {found}"]

    def offered(self, gemm: Gemm) -> list[Candidate]:
        """Return what ``candidates`` does, without the self-test."""
        ids = range(self.plans.max_alg_id(gemm))
        major = self.machine.capability(gemm.device)[0]
        if major >= 10:
            modes = (HEURISTIC, DATA_PARALLEL, STREAM_K)
            return [Candidate(i, split_k_mode=mode) for i in ids for mode in modes]
        splits = [1]
        if major == 9 and gemm.m >= SEGMENT_K_ROWS:
            splits.append(-1)
        if major < 9 and gemm.k >= 4 * max(gemm.m, gemm.n):
            splits += [2, 4]
        return [Candidate(i, split) for split in splits for i in ids]

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
        if layout is None:
            pruned = _pruned(x, method, transpose, rows_per_sample)
            return self.compress(pruned, gemm, candidate)
        packed = pack_gradient(
            x,
            features=None if transpose else method,
            tokens=method if transpose else None,
            features_layout=layout,
            tokens_layout=layout,
            tokens_per_sample=rows_per_sample,
        )
        operand = packed.tokens if transpose else packed.features
        if operand is None:
            raise SDGPError("pack: the packing layer left out the operand that was asked for")
        return operand.buffer

    def certificate(self, gemm: Gemm, candidate: Candidate) -> Certificate:
        """Return whether our packing is proven to be the library's for a plan, and in what order.

        The first call for a shape compares the two on the device; under graph capture, where that
        cannot be done, the library's own Compress is used.
        """
        planned = self.plans.get(gemm, candidate)
        key = (planned.rows, gemm.k, gemm.dtype, gemm.device, candidate.alg_id)
        found = self.certificates.get(key)
        if found is None:
            if is_capturing(gemm.device):
                return Certificate(None, "not proven before the graph was captured")
            identity = {**self.machine.key(gemm.device), "alg_id": candidate.alg_id, "order": "row"}
            with on_device(gemm.device):
                compress = plan_compress(planned.plan)
                arguments = (planned.rows, gemm.k, gemm.dtype, gemm.device, identity)
                found = self.certificates[key] = certify(compress, *arguments)
        return found

    def matmul(
        self,
        packed: Tensor,
        dense: Tensor,
        gemm: Gemm,
        candidate: Candidate,
    ) -> Tensor:
        """Return packed @ dense: [M, K] @ [K, N] -> [M, N]; see ``SparseExecutor``."""
        planned = self.plans.get(gemm, candidate)
        out = torch.empty((planned.rows, gemm.n), dtype=gemm.dtype, device=gemm.device)
        size = planned.workspace_size
        workspace = torch.empty(size, dtype=torch.uint8, device=gemm.device) if size else None
        with on_device(gemm.device):
            planned.plan.matmul(
                1.0,
                packed.data_ptr(),
                dense.data_ptr(),
                0.0,
                out.data_ptr(),
                out.data_ptr(),
                0 if workspace is None else workspace.data_ptr(),
                current_stream(gemm.device),
            )
        return out[: gemm.m]

    def operand(self, x: Tensor) -> Tensor:
        """Return a dense operand as it is where the library can read it, else a copy."""
        return _aligned(x) if dense_order(x) is None else x

    def compress(self, pruned: Tensor, gemm: Gemm, candidate: Candidate) -> Tensor:
        """Return pruned [M, K], which is 2:4, as the library itself packs it for a plan."""
        planned = self.plans.get(gemm, candidate)
        missing = planned.rows - pruned.shape[0]
        padded = torch.nn.functional.pad(pruned, (0, 0, 0, missing)) if missing else pruned
        padded = padded.contiguous()
        device = padded.device
        packed = torch.empty(planned.compressed_size, dtype=torch.uint8, device=device)
        scratch = torch.empty(max(planned.buffer_size, 16), dtype=torch.uint8, device=device)
        with on_device(device):
            planned.plan.compress(
                padded.data_ptr(), packed.data_ptr(), scratch.data_ptr(), current_stream(device)
            )
        return packed

    def linear_grad_input(
        self,
        grad_output: Tensor,
        weight: Tensor,
        config: SDGPConfig,
        candidate: Candidate | None = None,
    ) -> Tensor:
        """Return prune(grad_output) @ weight; see ``Backend``."""
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        samples = grad_output.shape[0] if grad_output.ndim > 2 else 1
        result = self._grad_input(flat, weight, config, candidate, flat.shape[0] // samples)
        return result.view(*grad_output.shape[:-1], weight.shape[1])

    def linear_grad_weight(
        self,
        grad_output: Tensor,
        input: Tensor,
        config: SDGPConfig,
        candidate: Candidate | None = None,
    ) -> Tensor:
        """Return prune(grad_output along tokens).T @ input; see ``Backend``.

        Tokens past the last multiple of 16 are multiplied densely, pruned like the rest.
        """
        tokens, features = grad_output.shape
        body = tokens - tokens % STRUCTURED_MULTIPLE
        input = input if dense_order(input[:body]) == "row" else _aligned(input)
        gemm = Gemm(features, input.shape[1], body, input.dtype, "row", input.device)
        candidate = self._first(gemm) if candidate is None else candidate
        method, head = config.grad_weight_prune, grad_output[:body]
        if (config.n, config.m) != (2, 4):
            head, method = prune(head, method=method, n=config.n, m=config.m, dim=0), "none"
        with span("pack", gemm.device):
            packed = self.pack(head, gemm, candidate, method=method, transpose=True)
        with span("matmul", gemm.device):
            grad_weight = self.matmul(packed, input[:body], gemm, candidate)
        if body == tokens:
            return grad_weight
        pattern: dict[str, Any] = {"n": config.n, "m": config.m, "dim": 0}
        tail = prune(grad_output[body:], method=config.grad_weight_prune, **pattern)
        return grad_weight.addmm_(tail.t(), input[body:])

    def conv2d_grad_input(
        self,
        grad_output: Tensor,
        weight: Tensor,
        input_like: Tensor,
        conv: ConvGeometry,
        config: SDGPConfig,
        candidate: Candidate | None = None,
    ) -> Tensor:
        """Return the transposed convolution as one product and a scatter; see ``Backend``."""
        flat = convolution.pixels(grad_output)
        columns = convolution.weight_columns(weight)
        rows_per_sample = flat.shape[0] // grad_output.shape[0]
        result = self._grad_input(flat, columns, config, candidate, rows_per_sample)
        return convolution.scatter_columns(
            result, grad_output.shape, input_like.shape, weight.shape, conv
        )

    def conv2d_grad_weight(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        conv: ConvGeometry,
        config: SDGPConfig,
        candidate: Candidate | None = None,
    ) -> Tensor:
        """Return the weight gradient of a 1x1 convolution; see ``Backend``."""
        read = convolution.strided_input(input, grad_output, conv)
        flat, tokens = convolution.pixels(grad_output), convolution.pixels(read)
        return self.linear_grad_weight(flat, tokens, config, candidate).view(weight.shape)

    def _grad_input(
        self,
        flat: Tensor,
        dense: Tensor,
        config: SDGPConfig,
        candidate: Candidate | None,
        rows_per_sample: int,
    ) -> Tensor:
        order = dense_order(dense)
        if order is None:
            dense, order = _aligned(dense), "row"
        (m, k), n = flat.shape, dense.shape[1]
        gemm = Gemm(m, n, k, flat.dtype, order, flat.device)
        candidate = self._first(gemm) if candidate is None else candidate
        method = config.prune
        if (config.n, config.m) != (2, 4):
            flat = _pruned(flat, method, False, rows_per_sample, config.n, config.m)
            method = "none"
        with span("pack", gemm.device):
            packed = self.pack(
                flat, gemm, candidate, method=method, rows_per_sample=rows_per_sample
            )
        with span("matmul", gemm.device):
            return self.matmul(packed, dense, gemm, candidate)

    def _first(self, gemm: Gemm) -> Candidate:
        return self.candidates(gemm)[0]


def _pruned(
    x: Tensor,
    method: str,
    transpose: bool,
    rows_per_sample: int | None,
    n: int = 2,
    m: int = 4,
) -> Tensor:
    """Return x, or x.T, pruned along its columns in plain torch."""
    operand = x.t().contiguous() if transpose else x
    if method != "rescaled_magnitude" or rows_per_sample is None:
        return prune(operand, method=method, n=n, m=m)
    samples = operand.view(-1, rows_per_sample, operand.shape[1])
    return prune(samples, method=method, n=n, m=m, scale_dims=(1,)).view(operand.shape)


def _aligned(x: Tensor) -> Tensor:
    """Return a row-major copy; torch's allocators align every new tensor to 64 bytes or more."""
    return x.clone(memory_format=torch.contiguous_format)


def _pattern_reasons(problem: Problem) -> list[str]:
    config, reasons = problem.config, []
    if problem.dtype == torch.float32:
        reasons.append("float32 runs 1:2 on sparse tensor cores, not 2:4; use bfloat16 autocast")
    elif problem.dtype not in DATA_TYPES:
        reasons.append(f"{problem.dtype} is neither bfloat16 nor float16")
    if (config.n, config.m) not in HARDWARE_PATTERNS:
        reasons.append(f"{config.n}:{config.m} does not fit the 2:4 format; it is emulated")
    if config.decays and problem.product == "grad_input":
        reasons.append("mask decay (0 < beta < 1) leaves no zeros to skip; it is emulated")
    return reasons


def _shape_reasons(problem: Problem) -> list[str]:
    m, n, k, reasons = problem.m, problem.n, problem.k, []
    if problem.product == "grad_input":
        rules = (("K (outputs)", k, STRUCTURED_MULTIPLE), ("N (inputs)", n, DENSE_MULTIPLE))
    else:
        rules = (("M (outputs)", m, STRUCTURED_MULTIPLE), ("N (inputs)", n, DENSE_MULTIPLE))
        if k < STRUCTURED_MULTIPLE:
            reasons.append(f"K (tokens) is {k}, fewer than {STRUCTURED_MULTIPLE}")
    for name, value, multiple in rules:
        if value % multiple:
            reasons.append(f"{name} is {value}, no multiple of {multiple}")
    if 0 in (m, n, k):
        reasons.append("the product is empty")
    if max(m * k, k * n, m * n) > MAX_ELEMENTS:
        reasons.append(f"a matrix has more than {MAX_ELEMENTS} elements")
    return reasons + (_conv_reasons(problem, problem.conv) if problem.conv else [])


def _conv_reasons(problem: Problem, conv: ConvGeometry) -> list[str]:
    reasons = []
    if conv.groups != 1:
        reasons.append(f"the convolution has {conv.groups} groups")
    if not problem.channels_last:
        reasons.append(
            "grad_output is not channels_last; use model.to(memory_format=torch.channels_last)"
        )
    if problem.product == "grad_weight" and (
        problem.kernel_size != (1, 1) or conv.padding != (0, 0)
    ):
        reasons.append("only an unpadded 1x1 convolution has grad_weight as one product")
    return reasons
