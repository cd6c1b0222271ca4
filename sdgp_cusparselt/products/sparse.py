"""The straight line: one sparse product with everything resolved, pack and multiply."""

from dataclasses import replace

from torch import Tensor

from sdgp_cusparselt.backends import dense
from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.gemm import Candidate
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import SDGPError
from sdgp_cusparselt.packing.pack import pack_gradient
from sdgp_cusparselt.products.operands import LinearGradInput, LinearGradWeight, Operands
from sdgp_cusparselt.recording.spans import span


class SparseProduct:
    """A product whose plan, layout and packer are known.

    Args:
        operands: of the call that it is prepared for; none of them is kept.
        config: what the user chose.
        library: what multiplies.
        candidate: how it multiplies; its first algorithm if None.

    Raises:
        CusparseLtError: the library refused the plan.
    """

    def __init__(
        self,
        operands: Operands,
        config: SDGPConfig,
        library: CusparseLtBackend,
        candidate: Candidate | None = None,
    ) -> None:
        self.problem = operands.problem(config)
        self.config, self.library = config, library
        self.gemm = library.gemm_of(self.problem)
        self.candidate = library.candidates(self.gemm)[0] if candidate is None else candidate
        self.method = self.problem.packed_method
        self.tail = self.problem.k - self.gemm.k

    def __call__(self, operands: Operands) -> Tensor:
        """Return the product of other operands of the same kind."""
        if self.method != self.problem.method:
            operands = replace(operands, grad_output=operands.pruned(self.config))
        transpose = operands.product == "grad_weight"
        left, right = operands.matrices()
        body = slice(self.gemm.k) if transpose else slice(None)
        with span("pack", self.gemm.device):
            packed = self.library.pack(
                left[body],
                self.gemm,
                self.candidate,
                method=self.method,
                transpose=transpose,
                rows_per_sample=None if transpose else operands.rows_per_sample,
            )
        with span("matmul", self.gemm.device):
            product = self.library.matmul(packed, right[body], self.gemm, self.candidate)
        if transpose and self.tail:
            self._add_tail(product, left[self.gemm.k :], right[self.gemm.k :])
        return operands.finish(product)

    def _add_tail(self, product: Tensor, left: Tensor, right: Tensor) -> None:
        """Add what the tokens past the last multiple of 16 give, pruned like the rest."""
        pruned = left if self.method == "none" else dense.prune_tokens(left, self.config)
        product.addmm_(pruned.t(), right)


class SparsePair:
    """Both products of a linear layer from one read of the gradient.

    Args:
        first: operands of grad_input.
        grad_input: its straight line.
        grad_weight: that of the other product.
    """

    def __init__(
        self, first: LinearGradInput, grad_input: SparseProduct, grad_weight: SparseProduct
    ) -> None:
        self.grad_input, self.grad_weight = grad_input, grad_weight
        self.layouts = [
            line.library.certificate(line.gemm, line.candidate).layout
            for line in (grad_input, grad_weight)
        ]

    @staticmethod
    def can_join(grad_input: SparseProduct, grad_weight: SparseProduct) -> bool:
        """Whether one read can serve both: 2:4, no tail of tokens, orders that are proven."""
        lines = (grad_input, grad_weight)
        whole = all(not line.tail and line.method == line.problem.method for line in lines)
        return whole and all(
            line.library.certificate(line.gemm, line.candidate).layout is not None for line in lines
        )

    def __call__(self, first: LinearGradInput, second: LinearGradWeight) -> tuple[Tensor, Tensor]:
        """Return grad_input and grad_weight."""
        one, other = self.grad_input, self.grad_weight
        library, device = one.library, one.gemm.device
        with span("pack", device):
            packed = pack_gradient(
                second.grad_output,
                features=one.method,
                tokens=other.method,
                features_layout=self.layouts[0],
                tokens_layout=self.layouts[1],
                tokens_per_sample=first.rows_per_sample,
            )
        if packed.features is None or packed.tokens is None:
            raise SDGPError("pack: the packing layer left out an operand that was asked for")
        with span("matmul", device):
            grad_input = library.matmul(
                packed.features.buffer, first.weight, one.gemm, one.candidate
            )
            grad_weight = library.matmul(
                packed.tokens.buffer, second.input, other.gemm, other.candidate
            )
        return first.finish(grad_input), second.finish(grad_weight)


def sparse_product(
    library: CusparseLtBackend,
    operands: Operands,
    config: SDGPConfig,
    candidate: Candidate | None = None,
) -> Tensor:
    """Return one product by the sparse way, whatever tuning would say.

    Raises:
        CusparseLtError: the library refused.
    """
    return SparseProduct(operands, config, library, candidate)(operands)
