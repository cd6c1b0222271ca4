"""The straight line of a product with a packed weight: look the weight up, allocate, multiply."""

from collections.abc import Hashable
from functools import partial

import torch
from torch import Tensor

from sdgp_cusparselt.backends.cusparselt import CusparseLtBackend
from sdgp_cusparselt.backends.gemm import Candidate
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.devices import device_calls
from sdgp_cusparselt.products.weight_operands import WeightOperands
from sdgp_cusparselt.recording.spans import is_traced, span


class WeightProduct:
    """A product whose plan and order are known; the weight is packed when its version is new.

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
        operands: WeightOperands,
        config: SDGPConfig,
        library: CusparseLtBackend,
        candidate: Candidate | None = None,
    ) -> None:
        self.gemm = gemm = library.gemm_of(operands.problem(config))
        candidate = library.candidates(gemm)[0] if candidate is None else candidate
        self.library, self.candidate, self.along = library, candidate, operands.along
        self.planned = library.plans.get(gemm, candidate)
        layout = library.certificate(gemm, candidate).layout
        # What the library packed is one plan's own.
        self.order: Hashable = (gemm, candidate) if layout is None else layout
        self.pack = partial(library.pack, gemm=gemm, candidate=candidate)
        self.matmul = self.planned.plan.matmul
        self.columns = gemm.n
        self.index, self.current_device, self.stream = device_calls(gemm.device)

    def __call__(self, operands: WeightOperands) -> Tensor:
        """Return the product of other operands of the same kind.

        Raises:
            CusparseLtError: the library refused to multiply.
            PlanStateError: the plan was evicted.
        """
        return operands.finish(self.multiplied(operands))

    def multiplied(self, operands: WeightOperands) -> Tensor:
        """Return [tokens, M], which for the library is [M, tokens] column by column."""
        if self.current_device() != self.index:
            with torch.cuda.device(self.index):
                return self.multiplied(operands)
        x, device = operands.tokens(), self.gemm.device
        missing = self.columns - x.shape[0]
        if missing:
            x = torch.nn.functional.pad(x, (0, 0, 0, missing))
        if is_traced():
            with span("pack", device):
                packed = self._packed(operands)
            with span("matmul", device):
                out = self._product(packed, x)
        else:
            out = self._product(self._packed(operands), x)
        return out[:-missing] if missing else out

    def _packed(self, operands: WeightOperands) -> Tensor:
        return operands.pruned_weight.packed(self.along, self.order, self.pack)

    def _product(self, packed: Tensor, x: Tensor) -> Tensor:
        size, device = self.planned.workspace_size, self.gemm.device
        out = torch.empty((self.columns, self.gemm.m), dtype=self.gemm.out_dtype, device=device)
        workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
        product = out.data_ptr()
        self.matmul(
            1.0,
            packed.data_ptr(),
            x.data_ptr(),
            0.0,
            product,
            product,
            0 if workspace is None else workspace.data_ptr(),
            self.stream(),
        )
        return out
