"""Which weights are kept: N:M, unstructured and transposable masks, from any scores.

A mask is a bool tensor of the weight's shape, True where a weight is kept. Larger scores are kept;
on a tie the lower index is, so that a mask is a pure function of its scores on every device.
Groups of N:M run along the dimension that the forward product reduces over.
"""

import torch
from torch import Tensor

from sdgp_cusparselt.config.patterns import check_pattern
from sdgp_cusparselt.errors import type_error, value_error
from sdgp_cusparselt.pruning.bits import magnitude_bits
from sdgp_cusparselt.pruning.plain import largest_mask
from sdgp_cusparselt.weights.patterns import SIDE
from sdgp_cusparselt.weights.transposable import best_of_blocks


def magnitude_scores(weight: Tensor) -> Tensor:
    """Return |weight| as integers of the same order, NaN on top.

    Args:
        weight: [...] any float dtype.

    Source: Mishra et al. (arXiv 2104.08378), section 3: prune the smallest magnitudes.
    """
    return magnitude_bits(weight.detach())


def nm_mask(scores: Tensor, n: int, m: int, *, dim: int = -1) -> Tensor:
    """Return the mask of the n largest scores of every m consecutive ones along dim.

    mask[i] = scores[i] is among the n largest of its group; on a tie the lower index is

    Args:
        scores: [...] integers or floats, larger is kept; NaN counts as largest.
        n: kept per group, 1 <= n <= m.
        m: group size, at most 32; divides the size of ``dim``.
        dim: dimension that groups run along, the one that the forward product reduces over.

    Returns:
        Bool tensor of the shape of scores, with exactly n of every group.

    Raises:
        ValueError: n, m or dim out of range, or m does not divide the dimension.
        TypeError: scores is no tensor of numbers, or n or m no int.
    """
    _check_scores("nm_mask", scores)
    check_pattern("nm_mask", "magnitude", n, m)
    dim = _checked_dim("nm_mask", scores, dim)
    if scores.shape[dim] % m:
        rule, got = f"a multiple of m = {m} in dimension {dim}", tuple(scores.shape)
        raise value_error("nm_mask", "scores", rule, got, "Leave such layers dense.")
    if n == m or not scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    groups = torch.unflatten(_ordered(scores), dim, (-1, m))
    return largest_mask(groups, dim + 1, n).flatten(dim, dim + 1)


def unstructured_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Return the mask of the largest scores of the whole tensor.

    mask[i] = scores[i] is among the round((1 - sparsity) * numel) largest

    Args:
        scores: [...] integers or floats, larger is kept; NaN counts as largest.
        sparsity: share that is removed, in [0, 1).

    Returns:
        Bool tensor of the shape of scores.

    Raises:
        ValueError: sparsity lies outside its range.
        TypeError: scores is no tensor of numbers.

    Source: Pietron and Zurek (arXiv 2112.15445), magnitude pruning layer by layer.
    """
    _check_scores("unstructured_mask", scores)
    if not 0 <= sparsity < 1:
        raise value_error("unstructured_mask", "sparsity", "in [0, 1)", sparsity, "0 keeps all.")
    flat = _ordered(scores).flatten()
    kept = round((1 - sparsity) * flat.numel())
    # A stable order: of equal scores the lower index goes first.
    order = flat.argsort(descending=True, stable=True)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order[:kept]] = True
    return mask.view(scores.shape)


def transposable_mask(
    scores: Tensor, *, rows: int = 0, cols: int = 1, absolute: bool = False
) -> Tensor:
    """Return the mask that is 2:4 along rows and columns and keeps the largest sum of scores.

    mask of a 4 x 4 block = argmax over the 90 patterns with two of four in each row and column of
    sum(scores where pattern)

    With it the weight is 2:4 in ``input @ weight.T`` and in ``grad_output @ weight`` alike.

    Args:
        scores: [...] float, such as |weight|, larger is kept; no NaN.
        rows: one of the two dimensions, a multiple of 4.
        cols: the other one, a multiple of 4.
        absolute: take |scores|, so that a weight needs no pass of its own for that.

    Returns:
        Bool tensor of the shape of scores.

    Raises:
        ValueError: a dimension is no multiple of 4, or both are the same.
        TypeError: scores is no float tensor.

    Note:
        One Triton kernel where Triton can run, else plain torch with the same bits. Sums are of
        float32 (float64 for float64 scores), so the kept sum is within 8 roundings of the largest.

    Source: Hu et al. (arXiv 2404.01847), section 4.1, there a convolution with all patterns.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise type_error("transposable_mask", "scores", "a float tensor", got, "Pass |weight|.")
    rows = _checked_dim("transposable_mask", scores, rows)
    cols = _checked_dim("transposable_mask", scores, cols)
    shape = tuple(scores.shape)
    if rows == cols or scores.shape[rows] % SIDE or scores.shape[cols] % SIDE:
        rule = f"multiples of {SIDE} in two different dimensions"
        sizes = f"{shape} with rows={rows}, cols={cols}"
        raise value_error("transposable_mask", "scores", rule, sizes, "Leave such layers dense.")
    last = scores.detach().movedim((rows, cols), (-2, -1))
    if not scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    blocks = last.reshape(-1, scores.shape[rows], scores.shape[cols])
    found = best_of_blocks(blocks, absolute=absolute)
    return found.view(last.shape).movedim((-2, -1), (rows, cols))


def _ordered(scores: Tensor) -> Tensor:
    """Return detached scores that compare as they should: NaN above all."""
    scores = scores.detach()
    return (
        scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if (scores.is_floating_point())
        else scores
    )


def _check_scores(function: str, scores: object) -> None:
    if not isinstance(scores, Tensor) or scores.is_complex() or scores.dtype == torch.bool:
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise type_error(function, "scores", "a tensor of integers or floats", got, "Convert it.")


def _checked_dim(function: str, scores: Tensor, dim: int) -> int:
    if not -scores.ndim <= dim < scores.ndim:
        rule = f"in {-scores.ndim}..{scores.ndim - 1} for {scores.ndim}-D scores"
        raise value_error(function, "dim", rule, dim, "Name a dimension of scores.")
    return dim % scores.ndim
