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

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sdgp_cusparselt.backends.dense import dense_linear_grad_input
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import message
from sdgp_cusparselt.products import backward
from sdgp_cusparselt.recording.records import LayerRecord

#: Tiles begin at multiples of this, so that they cut no group and stay aligned.
_EDGE = 64
#: grad_input, grad_weight, grad_bias: which are asked for, or they themselves.
Needs = tuple[bool, bool, bool]
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
    for span in _spans(head.weight.shape[0], head.chunk // max(1, head.input.shape[0])):
        sums.add(head.logits(span), span.start)
    return sums.losses(), sums.lse


def gradients(
    head: Head,
    lse: Tensor,
    scale: Tensor,
    needs: Needs,
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
    for span in _spans(w.shape[0], head.chunk // max(1, x.shape[0])):
        g = logits_gradient(head.logits(span), span.start, head, lse, scale)
        part, whole = _products(g, w[span], x, needs, config, record)
        if total is not None and part is not None:
            total += part
        if grad_weight is not None and whole is not None:
            grad_weight[span] = whole
        if grad_bias is not None:
            grad_bias[span] = g.sum(0, dtype=head.wide)
        del g, part, whole  # before the next slice is made
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


def logits_gradient(logits: Tensor, start: int, head: Head, lse: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of a tile of the logits, rounded once to their dtype; see the module.

    Args:
        logits: [N, columns], classes ``start`` and on.
        start: first class of the tile.
        head: whose tokens the rows are.
        lse: [N] logsumexp of all logits of each.
        scale: [N] gradient of each token's loss; where it is 0 so is the row, whatever its logits.
    """
    objective, counts = head.objective, scale != 0
    lse = torch.where(counts, lse, 0.0)
    g = logits.to(head.wide, copy=True).masked_fill_(~counts[:, None], -torch.inf)
    g.sub_(lse[:, None]).exp_().mul_((scale * (1 + 2 * objective.z_loss * lse))[:, None])
    if objective.label_smoothing:
        g.sub_((scale * (objective.label_smoothing / head.weight.shape[0]))[:, None])
    place, inside = _places(head.target, start, g.shape[1])
    hit = torch.where(inside, scale * (objective.label_smoothing - 1), 0.0)
    return g.scatter_add_(1, place[:, None], hit[:, None]).to(logits.dtype)


def _places(target: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the column of each target in a tile, 0 if it is not there, and whether it is."""
    place = target - start
    inside = (place >= 0) & (place < columns)
    return torch.where(inside, place, 0), inside


def _products(
    grad_output: Tensor,
    weight: Tensor,
    input: Tensor,
    needs: Needs,
    config: SDGPConfig,
    record: LayerRecord,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the products of a tile of grad_output with its slice of weight and its tokens."""
    sparse = config.grad_weight == "sparse"
    if needs[0] and needs[1] and config.prunes and sparse:
        return backward.linear_grads(grad_output, weight, input, config, record)
    of_input: Tensor | None = None
    of_weight: Tensor | None = None
    if needs[0]:
        of_input = (
            backward.linear_grad_input(grad_output, weight, config, record)
            if config.prunes
            else dense_linear_grad_input(grad_output, weight)
        )
    if needs[1]:
        of_weight = (
            backward.linear_grad_weight(grad_output, input, True, config, record)
            if sparse
            else grad_output.t().mm(input)
        )
    return of_input, of_weight


def _spans(length: int, step: int) -> Iterator[slice]:
    """Cut 0..length into slices of about ``step`` that begin at multiples of ``_EDGE``."""
    step = max(_EDGE, step // _EDGE * _EDGE)
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))
