"""The straight line behind a producer: one kernel makes and packs, then the products follow.

For each layer a buffer as ``sparse`` has one; the dense gradients where something still needs
them; the bias gradients from the kernel's own sums.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from sdgp_cusparselt.devices import device_calls
from sdgp_cusparselt.products.makers import Asked, Maker, Output
from sdgp_cusparselt.products.packers import Wanted, slots
from sdgp_cusparselt.products.sparse import SparseProduct
from sdgp_cusparselt.pruning.producers import Producer
from sdgp_cusparselt.recording.spans import is_traced, span

#: (grad_input, grad_weight) of one layer from its dense gradient [M, K]: whatever is not sparse.
Rest = Callable[[int, Tensor], tuple[Tensor | None, Tensor | None]]


def asked_of(
    pairs: Sequence[tuple[SparseProduct | None, SparseProduct | None]],
    rows: int,
    dense: bool,
    sums: bool,
) -> Asked | None:
    """Return what one kernel can write for all layers, or None if they want different things.

    Args:
        pairs: the lines of grad_input and grad_weight of each layer, where they run sparse.
        rows: of the gradient.
        dense: whether the gradients themselves are needed.
        sums: whether bias gradients are.
    """
    found = set()
    for first, second in pairs:
        one, other = (None if line is None else line.wanted for line in (first, second))
        some = one or other
        found.add(
            Wanted(
                2 if some is None else some.n,
                rows,
                None if one is None else one.features,
                None if other is None else other.tokens,
                None if one is None else one.features_layout,
                None if other is None else other.tokens_layout,
            )
        )
    return Asked(found.pop(), dense, sums) if len(found) == 1 else None


def usable(line: object) -> SparseProduct | None:
    """Return a sparse product's line if its operand is one that a maker can write, else None."""
    if not isinstance(line, SparseProduct) or line.wanted is None or line.tail:
        return None
    return line


class ProducedLine:
    """What a kind of call behind a producer does, resolved.

    Args:
        maker: what makes the gradients.
        asked: what it writes.
        pairs: see ``asked_of``.
        shape: [M, K] of each gradient.
        dtype: of each gradient.
        device: on which all happens.
    """

    def __init__(
        self,
        maker: Maker,
        asked: Asked,
        pairs: Sequence[tuple[SparseProduct | None, SparseProduct | None]],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.maker, self.asked, self.pairs = maker, asked, tuple(pairs)
        self.shape, self.dtype, self.device = shape, dtype, device
        self.index, self.current_device, self.stream = device_calls(device)
        lines = [line for pair in pairs for line in pair if line is not None]
        # The library's own size may be larger than ours.
        sizes = [line.planned.compressed_size for line in lines]
        self.workspace_at = slots(max(maker.nbytes, maker.tokens_at + max(sizes, default=0)))
        self.nbytes = self.workspace_at + max(
            (line.planned.workspace_size for line in lines), default=0
        )

    def __call__(
        self,
        producer: Producer,
        operands: Sequence[tuple[Tensor | None, Tensor | None]],
        rest: Rest,
    ) -> list[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Return grad_input [M, N], grad_weight and grad_bias of each layer.

        Args:
            producer: of the kind that this was made for.
            operands: weight and input [M, N] of each layer, or None.
            rest: what computes the products that do not run sparse from a dense gradient.

        Raises:
            CusparseLtError, PlanStateError: see ``sparse.SparseProduct``.
        """
        if self.current_device() != self.index:
            with torch.cuda.device(self.index):
                return self(producer, operands, rest)
        stream, outputs, buffers = self.stream(), [], []
        for _ in self.pairs:
            buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
            dense = sums = None
            if self.asked.dense:
                dense = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            if self.asked.sums:
                sums = torch.empty(self.maker.sums_shape, device=self.device)
            buffers.append(buffer)
            outputs.append(Output(dense, buffer.data_ptr(), sums))
        with span("pack", self.device) if is_traced() else nullcontext():
            self.maker(producer, outputs, stream)
        found = []
        for number, (pair, given, output) in enumerate(
            zip(self.pairs, operands, outputs, strict=True)
        ):
            with span("matmul", self.device) if is_traced() else nullcontext():
                sparse = self._products(pair, given, output.operands, stream)
            plain: tuple[Tensor | None, Tensor | None] = (None, None)
            if output.dense is not None:
                plain = rest(number, output.dense)
            bias = None if output.sums is None else output.sums.sum(0).to(self.dtype)
            grad_input, grad_weight = (
                one if other is None else other for one, other in zip(plain, sparse, strict=True)
            )
            found.append((grad_input, grad_weight, bias))
        return found

    def _products(
        self,
        pair: tuple[SparseProduct | None, SparseProduct | None],
        given: tuple[Tensor | None, Tensor | None],
        address: int,
        stream: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Multiply the packed operands of one layer that there are."""
        found: list[Tensor | None] = []
        places = (address, address + self.maker.tokens_at)
        for line, right, place in zip(pair, given, places, strict=True):
            if line is None or right is None:
                found.append(None)
                continue
            out = torch.empty(
                (line.planned.rows, line.gemm.n), dtype=line.dtype, device=self.device
            )
            to, space = out.data_ptr(), address + self.workspace_at
            line.matmul(1.0, place, right.data_ptr(), 0.0, to, to, space, stream)
            found.append(out[: line.gemm.m])
        return found[0], found[1]
