"""Cross-entropy of a linear head, and its gradients, a slice of the vocabulary at a time.

logits = input @ weight.T + bias                                 [tokens, vocabulary], never whole
loss   = lse - (1 - s) logits[target] - s mean(logits) + z lse^2        lse = logsumexp(logits)
grad   = u ((1 + 2 z lse) exp(logits - lse) - (1 - s) [target] - s / vocabulary)

with label smoothing s, z-loss z, and u the gradient of a token's loss. ``losses`` goes over the
slices once, for lse; ``gradients`` computes each slice of the logits again. A slice holds all
tokens, so that its part of grad_weight is complete: no sum over slices is as large as the weight,
and the products with the gradient reduce over all tokens, or over thousands of classes.

Chunks of tokens, with their gradients made in the forward, would save that fourth product but sum
grad_weight in memory: 12 bytes for each of its elements and each chunk (a partial result written
and read, a float32 sum read and written) against 2 operations for each token. Below 6 tokens a
chunk for each operation that the card makes in the time of a byte (920 on an A100, 1,770 on an
H100) the sums alone take longer than the product.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sdgp_cusparselt.backends.dense import dense_linear_grad_input
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import message
from sdgp_cusparselt.packing.producing import WHOLE_BLOCKS
from sdgp_cusparselt.products.produced import (
    FusedLinear,
    LayerGradients,
    Needs,
    produced_grads,
)
from sdgp_cusparselt.pruning.producers import CrossEntropyBackward
from sdgp_cusparselt.recording.records import LayerRecord

#: Slices begin at multiples of this, so that they cut no group and stay aligned.
_EDGE = 64
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, slots=True)
class Objective:
    """What the loss of a token is; see the module.

    Attributes:
        label_smoothing: s, in 0..1.
        z_loss: z, at least 0.
        ignore_index: target of the tokens whose loss is 0.
    """

    label_smoothing: float
    z_loss: float
    ignore_index: int


@dataclass(slots=True, eq=False)
class Head:
    """The operands of a head with its loss.

    Attributes:
        input: [N, in_features].
        weight: [vocabulary, in_features] of input's dtype.
        bias: [vocabulary] of input's dtype, or None.
        target: [N] int64.
        objective: of each token.
        chunk: elements of a tile, about.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    objective: Objective
    chunk: int

    @property
    def wide(self) -> torch.dtype:
        """Dtype of every sum."""
        return sum_dtype(self.input.dtype)

    @property
    def counted(self) -> Tensor:
        """[N] bool: whose loss counts."""
        return self.target != self.objective.ignore_index

    def slices(self, packed: bool = False) -> Iterator[slice]:
        """Cut the vocabulary into slices of about ``chunk`` elements of logits.

        Args:
            packed: whether the gradient of the logits will be. What the vocabulary has beyond whole
                blocks is then a slice of its own, so that no other is packed apart because of it.
        """
        size, step = self.weight.shape[0], self.chunk // max(1, self.input.shape[0])
        edge = WHOLE_BLOCKS if packed and self.objective.label_smoothing else _EDGE
        whole = size // edge * edge if packed else size
        return itertools.chain(_spans(0, whole, step, edge), _spans(whole, size, step, edge))

    def logits(self, span: slice) -> Tensor:
        """Return the logits of a slice of the vocabulary."""
        return F.linear(
            self.input, self.weight[span], None if self.bias is None else self.bias[span]
        )

    def check_targets(self) -> None:
        """Raise IndexError where a target that counts is no class; on CUDA an assertion there."""
        size, fits = self.weight.shape[0], None
        if self.target.device.type != "meta":
            fits = ((self.target >= 0) & (self.target < size)) | ~self.counted
        if fits is None:
            return
        if fits.is_cuda:  # as torch does: without waiting for the device
            torch._assert_async(fits.all(), "linear_cross_entropy: a target is no class")
        elif not bool(fits.all()):
            worst = int(self.target[~fits][0])
            rule = f"in 0..{size - 1} or {self.objective.ignore_index}"
            fix = "Pass the index of a class, or ignore_index."
            raise IndexError(message("linear_cross_entropy", "target", rule, worst, fix))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the losses of operands of ``dtype`` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def losses(head: Head) -> tuple[Tensor, Tensor]:
    """Return the loss of each token and lse: [N], [N] float32 (float64 for float64).

    Raises:
        IndexError: a target is no class (a device-side assertion on CUDA).
    """
    head.check_targets()
    sums = _RowSums(head)
    for span in head.slices():
        sums.add(head.logits(span), span.start)
    return sums.losses(), sums.lse


def gradients(
    head: Head,
    lse: Tensor,
    scale: Tensor,
    needs: tuple[bool, bool, bool],
    weight_dtype: torch.dtype,
    config: SDGPConfig,
    record: LayerRecord,
) -> Gradients:
    """Return the gradients of ``scale @ losses``; computes the logits again.

    Args:
        head: its operands.
        lse: [N], what ``losses`` returned.
        scale: [N] of lse's dtype: gradient of each token's loss, 0 where ignored.
        needs: which are asked for.
        weight_dtype: of grad_weight and grad_bias.
        config: how the gradient of the logits is pruned.
        record: of the layer.

    Returns:
        grad_input [N, in_features] of input's dtype, summed over tiles in lse's dtype; grad_weight
        [vocabulary, in_features]; grad_bias [vocabulary]; None where not asked for.
    """
    x, w = head.input, head.weight
    total = torch.zeros(x.shape, dtype=head.wide, device=x.device) if needs[0] else None
    grad_weight = torch.empty_like(w, dtype=weight_dtype) if needs[1] else None
    grad_bias = w.new_empty(w.shape[0], dtype=weight_dtype) if needs[2] else None
    for span in head.slices(_packs(config)):
        found = _of_slice(head, span, lse, scale, Needs(*needs), config, record)
        if total is not None and found.input is not None:
            total += found.input
        if grad_weight is not None and found.weight is not None:
            grad_weight[span] = found.weight
        if grad_bias is not None and found.bias is not None:
            grad_bias[span] = found.bias
        del found  # before the next slice is made
    return None if total is None else total.to(x.dtype), grad_weight, grad_bias


class _RowSums:
    """What the losses need of all logits, added up tile by tile.

    Attributes:
        lse: [N] logsumexp of the logits so far.
        hit: [N] logit of the target, 0 as long as it was not there.
        total: [N] sum of the logits; 0 unless labels are smoothed.
    """

    def __init__(self, head: Head) -> None:
        count, device = head.input.shape[0], head.input.device
        self.head = head
        self.lse = torch.full((count,), -torch.inf, dtype=head.wide, device=device)
        self.hit = torch.zeros_like(self.lse)
        self.total = torch.zeros_like(self.lse)

    def add(self, logits: Tensor, start: int) -> None:
        """Add a tile whose first column is the class ``start``."""
        x = logits.to(self.head.wide, copy=True)
        place, inside = _places(self.head.target, start, x.shape[1])
        self.hit += torch.where(inside, x.gather(1, place[:, None])[:, 0], 0.0)
        if self.head.objective.label_smoothing:
            self.total += x.sum(1)
        top = x.amax(1)
        top = torch.where(top.isinf(), 0.0, top)  # Inf - Inf is no number
        found = x.sub_(top[:, None]).exp_().sum(1).log_().add_(top)
        self.lse = torch.logaddexp(self.lse, found)

    def losses(self) -> Tensor:
        """Return the loss of each token; 0 where it is ignored."""
        objective, lse = self.head.objective, self.lse
        found = lse - (1 - objective.label_smoothing) * self.hit
        if objective.label_smoothing:
            found -= objective.label_smoothing / self.head.weight.shape[0] * self.total
        if objective.z_loss:
            found += objective.z_loss * lse.square()
        return torch.where(self.head.counted, found, 0.0)


def _of_slice(
    head: Head,
    span: slice,
    lse: Tensor,
    scale: Tensor,
    needs: Needs,
    config: SDGPConfig,
    record: LayerRecord,
) -> LayerGradients:
    """Return what a slice of the vocabulary adds to grad_input, and its grad_weight and grad_bias.

    Where something is pruned the gradient of the logits is packed as it is made, if a kernel can.
    """
    objective, x, w = head.objective, head.input, head.weight[span]
    producer = CrossEntropyBackward(
        head.logits(span),
        lse,
        head.target,
        scale,
        objective.label_smoothing,
        objective.z_loss,
        span.start,
        head.weight.shape[0],
    )
    if _packs(config):
        held = w if needs.input else None, x if needs.weight else None
        layer = FusedLinear(*held, needs, w.stride() == (w.shape[1], 1), config, record)
        return produced_grads(producer, (layer,))[0]
    (g,) = producer.gradients()
    return LayerGradients(
        dense_linear_grad_input(g, w) if needs.input else None,
        g.t().mm(x) if needs.weight else None,
        g.sum(0, dtype=head.wide) if needs.bias else None,
    )


def _places(target: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the column of each target in a tile, 0 if it is not there, and whether it is."""
    place = target - start
    inside = (place >= 0) & (place < columns)
    return torch.where(inside, place, 0), inside


def _packs(config: SDGPConfig) -> bool:
    return config.prunes or config.grad_weight == "sparse"


def _spans(first: int, last: int, step: int, edge: int) -> Iterator[slice]:
    """Cut first..last into slices of about ``step``, of whole ``edge`` but for the last."""
    step = max(edge, step // edge * edge)
    for start in range(first, last, step):
        yield slice(start, min(last, start + step))
