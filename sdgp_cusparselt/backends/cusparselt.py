"""The cuSPARSELt backend: products of a packed gradient on sparse tensor cores."""

from typing import Any

import torch
from torch import Tensor

from sdgp_cusparselt.backends import convolution
from sdgp_cusparselt.backends.base import Backend, ConvGeometry, Problem
from sdgp_cusparselt.backends.candidates import offered
from sdgp_cusparselt.backends.certificates import Certificates
from sdgp_cusparselt.backends.float16 import float16_fault
from sdgp_cusparselt.backends.gemm import Candidate, Gemm
from sdgp_cusparselt.backends.machine import Machine
from sdgp_cusparselt.backends.plans import (
    STRUCTURED_MULTIPLE,
    PlanCache,
    current_stream,
    dense_order,
    on_device,
    readable,
    row_major,
)
from sdgp_cusparselt.backends.reasons import pattern_reasons, shape_reasons
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import NotSupportedError, SDGPError
from sdgp_cusparselt.packing.agreement import packer_fault
from sdgp_cusparselt.packing.pack import pack_gradient
from sdgp_cusparselt.packing.proofs import Certificate
from sdgp_cusparselt.pruning.methods import prune
from sdgp_cusparselt.recording.spans import span


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
        self.certificates = Certificates(self.machine, lambda: self.plans)

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
        return [*pattern_reasons(problem), *shape_reasons(problem)]

    def gemm_of(self, problem: Problem) -> Gemm:
        """Return the sparse product that ``problem`` becomes."""
        m, n, k = problem.m, problem.n, problem.k
        if problem.product == "grad_weight":
            k -= k % STRUCTURED_MULTIPLE
        return Gemm(m, n, k, problem.dtype, problem.dense_order, problem.device)

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
            pruned = _pruned(x, method, transpose, rows_per_sample)
            return self.compress(pruned, gemm, candidate)
        packed = pack_gradient(x, **wanted)
        operand = packed.tokens if transpose else packed.features
        if operand is None:
            raise SDGPError("pack: the packing layer left out the operand that was asked for")
        return operand.buffer

    def certificate(self, gemm: Gemm, candidate: Candidate) -> Certificate:
        """Return whether our packing is proven for a plan, and in what order.

        ``packer`` of it tells "ours" from "library": two contenders, of which a decision names
        the one that was timed.
        """
        return self.certificates(gemm, candidate)

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
        return readable(x)

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
        rows_per_sample = _rows_per_sample(grad_output)
        result = self._grad_input(flat, weight, config, candidate, rows_per_sample)
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
        input = row_major(input)
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

    def linear_grads(
        self,
        grad_output: Tensor,
        weight: Tensor,
        input: Tensor,
        config: SDGPConfig,
        candidates: tuple[Candidate, Candidate],
    ) -> tuple[Tensor, Tensor]:
        """Return grad_input and grad_weight, both packed from one read of grad_output.

        grad_input = prune(grad_output) @ weight;  grad_weight = prune(grad_output.T) @ input

        Args:
            grad_output: [..., out_features].
            weight: [out_features, in_features].
            input: [tokens, in_features].
            config: how to prune for each.
            candidates: how to multiply for each.

        Returns:
            [..., in_features] and [out_features, in_features].

        Note:
            Where one read cannot serve both (tokens no multiple of 16, 1:4, an unproven order)
            there are two.
        """
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        (tokens, k), n = flat.shape, weight.shape[1]
        right, read = self.operand(weight), row_major(input)
        for_input = Gemm(tokens, n, k, flat.dtype, dense_order(right) or "row", flat.device)
        for_weight = Gemm(k, n, tokens, flat.dtype, "row", flat.device)
        if tokens % STRUCTURED_MULTIPLE == 0 and (config.n, config.m) == (2, 4):
            proofs = map(self.certificate, (for_input, for_weight), candidates)
            features_layout, tokens_layout = (proof.layout for proof in proofs)
            wanted: dict[str, Any] = {
                "features": config.prune,
                "tokens": config.grad_weight_prune,
                "features_layout": features_layout,
                "tokens_layout": tokens_layout,
                "tokens_per_sample": _rows_per_sample(grad_output),
            }
            proven = features_layout is not None and tokens_layout is not None
            if proven and packer_fault(flat, **wanted) is None:
                with span("pack", flat.device):
                    packed = pack_gradient(flat, **wanted)
                if packed.features is not None and packed.tokens is not None:
                    buffers = (packed.features.buffer, packed.tokens.buffer)
                    with span("matmul", flat.device):
                        grad_input = self.matmul(buffers[0], right, for_input, candidates[0])
                        grad_weight = self.matmul(buffers[1], read, for_weight, candidates[1])
                    return grad_input.view(*grad_output.shape[:-1], n), grad_weight
        return (
            self.linear_grad_input(grad_output, right, config, candidates[0]),
            self.linear_grad_weight(flat, read, config, candidates[1]),
        )

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
        dense = readable(dense)
        (m, k), n = flat.shape, dense.shape[1]
        gemm = Gemm(m, n, k, flat.dtype, dense_order(dense) or "row", flat.device)
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


def _rows_per_sample(grad_output: Tensor) -> int:
    """Return the tokens of one sample: those of a 2-D gradient are all of one."""
    tokens = grad_output.numel() // max(1, grad_output.shape[-1])
    return tokens if grad_output.ndim <= 2 else tokens // max(1, grad_output.shape[0])
