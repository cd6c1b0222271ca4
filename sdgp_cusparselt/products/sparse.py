"""The straight line: a sparse product with everything resolved. Two allocations, pack, multiply."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor

from sdgp_cusparselt.backends import emulation
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend, pruned_operand
from sdgp_cusparselt.backends.gemm import Candidate
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.devices import device_calls
from sdgp_cusparselt.errors import NotSupportedError
from sdgp_cusparselt.products.heavy import HeavyPacker, heavy_packer_for
from sdgp_cusparselt.products.operands import GradientOperands as Operands
from sdgp_cusparselt.products.operands import LinearGradInput, LinearGradWeight
from sdgp_cusparselt.products.packers import (
    KernelPacker,
    LibraryPacker,
    Packer,
    Wanted,
    packer_for,
    slots,
)
from sdgp_cusparselt.recording.spans import is_traced, span

Reads = Callable[[Operands], tuple[Tensor, Tensor]]


class SparseProduct:
    """A product whose plan, order and packer are known.

    Args:
        operands: of the call that it is prepared for; none of them is kept.
        config: what the user chose.
        library: what multiplies.
        candidate: how it multiplies; its first algorithm if None.

    Raises:
        CusparseLtError: the library refused the plan.
        NotSupportedError: heavy tokens are wanted where our packer is not proven.
    """

    def __init__(
        self,
        operands: Operands,
        config: SDGPConfig,
        library: CusparseLtBackend,
        candidate: Candidate | None = None,
    ) -> None:
        problem = operands.problem(config)
        gemm = library.gemm_of(problem)
        candidate = library.candidates(gemm)[0] if candidate is None else candidate
        self.config, self.library, self.gemm, self.candidate = config, library, gemm, candidate
        self.planned = library.plans.get(gemm, candidate)
        self.tail = problem.k - gemm.k
        #: Rows of the gradient that are packed: grad_weight's tokens come in multiples of 16.
        self.rows = gemm.k if operands.product == "grad_weight" else None
        self.method = problem.method
        self.heavy: HeavyPacker | None = None
        self.wanted = self._wanted(operands)
        self.pack = self._packer(operands)
        self.reads = self._reads(operands)
        self.matmul = self.planned.plan.matmul
        self.workspace_at = slots(max(self.pack.nbytes, self.planned.compressed_size))
        self.nbytes = self.workspace_at + self.planned.workspace_size
        self.device, self.dtype = gemm.device, gemm.dtype
        self.index, self.current_device, self.stream = device_calls(gemm.device)
        # Where no row is padded and none is extra, the product is written as the result.
        whole = self.planned.rows == gemm.m and self.heavy is None
        result = operands.result_shape if whole else None
        self.shape = (self.planned.rows, gemm.n) if result is None else result
        self.exact = result is not None

    def __call__(self, operands: Operands) -> Tensor:
        """Return the product of other operands of the same kind.

        Raises:
            CusparseLtError: the library refused to multiply.
            PlanStateError: the plan was evicted.
        """
        if self.current_device() != self.index:
            with torch.cuda.device(self.index):
                return self(operands)
        x, right = self.reads(operands)
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        packed, product, stream = buffer.data_ptr(), out.data_ptr(), self.stream()
        workspace = packed + self.workspace_at
        given = (1.0, packed, right.data_ptr(), 0.0, product, product, workspace, stream)
        if is_traced():
            with span("pack", self.device):
                self.pack(x, packed, stream)
            with span("matmul", self.device):
                self.matmul(*given)
        else:
            self.pack(x, packed, stream)
            self.matmul(*given)
        if self.tail:
            self._add_tail(out, operands)
        if self.heavy is not None:
            return operands.finish(self.heavy.add(out, packed, stream))
        return out if self.exact else operands.finish(out[: self.gemm.m])

    def _wanted(self, operands: Operands) -> Wanted | None:
        """Return what our packer is asked for, or None where its order is not proven."""
        layout = self.library.certificate(self.gemm, self.candidate).layout
        if layout is None:
            return None
        common = (self.config.n, operands.rows_per_sample)
        if self.rows is not None:
            return Wanted(*common, tokens=self.method, tokens_layout=layout)
        return Wanted(*common, features=self.method, features_layout=layout)

    def _packer(self, operands: Operands) -> Packer:
        left, _ = _matrices(operands, self.rows)
        if isinstance(operands, LinearGradInput) and self.config.heavy_tokens:
            layout = None if self.wanted is None else self.wanted.features_layout
            self.wanted = None  # no packer of ours writes both directions with heavy tokens
            share = self.config.heavy_tokens
            self.heavy = heavy_packer_for(left, share, layout, self.planned)
            return self.heavy
        found = None if self.wanted is None else packer_for(left, self.wanted)
        if found is not None:
            return found
        self.wanted = None
        prune = partial(
            pruned_operand,
            method=self.method,
            transpose=self.rows is not None,
            rows_per_sample=operands.rows_per_sample if self.rows is None else None,
            n=self.config.n,
            m=self.config.m,
        )
        return LibraryPacker(self.planned, prune)

    def _reads(self, operands: Operands) -> Reads:
        """Return what gives the packer and the library their memory."""
        reads: Reads = partial(_matrices, rows=self.rows)
        if not isinstance(self.pack, KernelPacker) or not self.pack.by_address:
            return reads
        direct: Reads = attrgetter(*operands.memory)
        pairs = zip(reads(operands), direct(operands), strict=True)
        same = all(matrix.data_ptr() == given.data_ptr() for matrix, given in pairs)
        return direct if same else reads

    def _add_tail(self, product: Tensor, operands: Operands) -> None:
        """Add what the tokens past the last multiple of 16 give, pruned like the rest."""
        left, right = operands.matrices()
        pruned = emulation.prune_tokens(left[self.gemm.k :], self.config)
        product.view(self.gemm.m, self.gemm.n).addmm_(pruned.t(), right[self.gemm.k :])


class SparsePair:
    """Both products of a linear layer from one read of the gradient: three allocations.

    Args:
        grad_input: the straight line of one.
        grad_weight: that of the other.
        pack: writes the operands of both.
    """

    def __init__(self, grad_input: SparseProduct, grad_weight: SparseProduct, pack: Packer) -> None:
        self.first, self.second, self.pack = grad_input, grad_weight, pack
        lines = (grad_input, grad_weight)
        sizes = [line.planned.compressed_size for line in lines]
        self.workspace_at = slots(max(pack.nbytes, sizes[0], pack.tokens_at + sizes[1]))
        self.nbytes = self.workspace_at + max(line.planned.workspace_size for line in lines)
        self.device, self.index = grad_input.device, grad_input.index
        self.current_device, self.stream = grad_input.current_device, grad_input.stream

    @classmethod
    def of(
        cls, second: LinearGradWeight, grad_input: SparseProduct, grad_weight: SparseProduct
    ) -> "SparsePair | None":
        """Return both in one, or None: a tail of tokens, an order or a kernel that is not proven.

        Args:
            second: operands of grad_weight of the first call; not kept.
            grad_input: the straight line of one.
            grad_weight: that of the other.
        """
        one, other = grad_input.wanted, grad_weight.wanted
        if one is None or other is None or grad_weight.tail:
            return None
        both = replace(one, tokens=other.tokens, tokens_layout=other.tokens_layout)
        pack = packer_for(second.grad_output, both)
        return None if pack is None else cls(grad_input, grad_weight, pack)

    def __call__(self, first: LinearGradInput, second: LinearGradWeight) -> tuple[Tensor, Tensor]:
        """Return grad_input and grad_weight of other operands of the same kinds.

        Raises:
            CusparseLtError, PlanStateError: see ``SparseProduct``.
        """
        if self.current_device() != self.index:
            with torch.cuda.device(self.index):
                return self(first, second)
        one, other = self.first, self.second
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        grad_input = torch.empty(one.shape, dtype=one.dtype, device=self.device)
        grad_weight = torch.empty(other.shape, dtype=other.dtype, device=self.device)
        packed, stream = buffer.data_ptr(), self.stream()
        out, space = grad_input.data_ptr(), packed + self.workspace_at
        of_input = (1.0, packed, first.weight.data_ptr(), 0.0, out, out, space, stream)
        out, turned = grad_weight.data_ptr(), packed + self.pack.tokens_at
        of_weight = (1.0, turned, second.input.data_ptr(), 0.0, out, out, space, stream)
        if is_traced():
            with span("pack", self.device):
                self.pack(second.grad_output, packed, stream)
            with span("matmul", self.device):
                one.matmul(*of_input)
                other.matmul(*of_weight)
        else:
            self.pack(second.grad_output, packed, stream)
            one.matmul(*of_input)
            other.matmul(*of_weight)
        if not one.exact:
            grad_input = first.finish(grad_input[: one.gemm.m])
        return grad_input, grad_weight


def sparse_product(
    library: CusparseLtBackend,
    operands: Operands,
    config: SDGPConfig,
    candidate: Candidate | None = None,
) -> Tensor:
    """Return one product by the sparse way, whatever tuning would say.

    Raises:
        NotSupportedError: it breaks a rule; every one is named.
        CusparseLtError: the library refused.
    """
    if reasons := library.not_supported_reasons(operands.problem(config)):
        raise NotSupportedError(f"sparse_product: {'; '.join(reasons)}")
    return SparseProduct(operands, config, library, candidate)(operands)


def _matrices(operands: Operands, rows: int | None) -> tuple[Tensor, Tensor]:
    """Return the matrices of a product, the gradient cut to its first rows."""
    left, right = operands.matrices()
    return left[:rows], right
