"""N:M pruning in plain torch: the truth that every kernel is tested against.

A group is m consecutive elements along ``dim``; a short last group behaves as if padded with
zeros. Magnitudes are compared as bits with the sign cleared, so NaN > Inf > finite, and on a tie
the lowest index wins. What is not kept becomes +0.0. A group that holds an Inf or a NaN is pruned
by magnitude under every method, so that an overflow stays visible.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from sdgp_cusparselt.config.patterns import check_pattern, checked_int
from sdgp_cusparselt.errors import type_error, value_error
from sdgp_cusparselt.pruning import cpu

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FNUZ = tuple(
    getattr(torch, name) for name in ("float8_e4m3fnuz", "float8_e5m2fnuz") if hasattr(torch, name)
)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, *_FNUZ)
# n -> (every 4-bit mask with n bits set, one per hex digit; how many there are). An integer
# constant and not a tensor: a table would have to be copied to the device on every call.
_SUBSETS_OF_FOUR = {1: (0x8421, 4), 2: (0xCA9653, 6), 3: (0xEDB7, 4)}
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *_FP8)
# dtype -> the magnitude_bits of its largest finite number: Inf and NaN alone lie above. int8 is for
# packing, where it is a dtype without either.
_LARGEST_FINITE = {
    torch.float64: 0x7FEF_FFFF_FFFF_FFFF,
    torch.float32: 0x7F7F_FFFF,
    torch.float16: 0x7BFF,
    torch.bfloat16: 0x7F7F,
    torch.float8_e4m3fn: 0x7E,
    torch.float8_e5m2: 0x7B,
    **dict.fromkeys(_FNUZ, 0x7F),
    torch.int8: 0x80,
}


def prune(
    x: Tensor,
    *,
    method: str = "magnitude",
    n: int = 2,
    m: int = 4,
    dim: int = -1,
    scale_dims: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep at most n of every m consecutive elements of x along dim; the rest becomes zero.

    magnitude:          y = x where |x| is among the n largest of its group, else 0
    rescaled_magnitude: y * sum|x| / sum|y|, sums over ``scale_dims``
    random:             a uniform subset of n per group, values as they are
    mvue:               y[i] = x[i] / p[i] with probability p[i] = min(1, c * abs(x[i])), sum p = n

    Args:
        x: [...] any float dtype, any device, any strides. Not differentiated through.
        method: one of none, random, magnitude, rescaled_magnitude, mvue. Under random and mvue a
            group that holds Inf or NaN is pruned by magnitude, so that an overflow stays visible;
            the other groups draw what they would draw without it.
        n: kept elements per group, 1 <= n <= m.
        m: group size, at most 32.
        dim: dimension along which groups run: the reduction dimension of the product.
        scale_dims: dimensions that rescaled_magnitude sums over. By default every dimension but
            the first and ``dim`` (per sample and channel), and the tokens of a 2-D x.
        generator: source of random numbers for random and mvue; torch's own if None.

    Returns:
        Tensor of x's shape, dtype, device and memory format. x itself where nothing is pruned
        (method none, or n == m).

    Raises:
        ValueError: unknown method, n or m out of range, dim or scale_dims outside x.
        TypeError: x is not a float tensor, or n, m, dim are not integers.

    Source:
        SDGP (arXiv 2202.00774) for random, magnitude and rescaled_magnitude; Chmiel et al.
        (arXiv 2203.10991) for mvue, here for every n:m by systematic sampling.
    """
    check_tensor("prune", x)
    check_pattern("prune", method, n, m)
    dim = _checked_dim(x, dim)
    if method == "none" or n == m or x.numel() == 0:
        return x
    with torch.no_grad():
        if method == "rescaled_magnitude":
            return _rescaled(x, n, m, dim, _checked_scale_dims(x, dim, scale_dims))
        return _on_groups(x, m, dim, lambda g, at: _prune_groups(g, at, method, n, m, generator))


def check_tensor(function: str, x: object) -> None:
    """Raise TypeError unless x is a tensor of a float dtype that has a zero and a sign."""
    if not isinstance(x, Tensor):
        raise type_error(function, "x", "a torch.Tensor", type(x).__name__, "Convert it first.")
    if x.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise type_error(function, "x", f"of a dtype in ({names})", x.dtype, "Cast it first.")


def _checked_dim(x: Tensor, dim: int) -> int:
    checked_int("prune", "dim", dim)
    if not -x.ndim <= dim < x.ndim:
        rule = f"in {-x.ndim}..{x.ndim - 1} for a {x.ndim}-D x"
        raise value_error("prune", "dim", rule, dim, "Name one dimension of x.")
    return dim % x.ndim


def _checked_scale_dims(x: Tensor, dim: int, scale_dims: Sequence[int] | None) -> list[int]:
    if scale_dims is None:
        return default_scale_dims(x.ndim, dim)
    for d in scale_dims:
        if not -x.ndim <= checked_int("prune", "scale_dims", d) < x.ndim:
            rule = f"dimensions in {-x.ndim}..{x.ndim - 1}"
            raise value_error("prune", "scale_dims", rule, tuple(scale_dims), "See prune.")
    return sorted({d % x.ndim for d in scale_dims})


def default_scale_dims(ndim: int, dim: int) -> list[int]:
    """Return what the rescale ratio sums over: space or sequence, or the tokens of a 2-D x."""
    others = [d for d in range(ndim) if d != dim]
    return others if ndim <= 2 else others[1:] if dim != 0 else others


def _on_groups(x: Tensor, m: int, dim: int, fn: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Apply fn(groups, at) to x seen as [..., G, m, ...] with m at ``at``; keep x's strides."""
    order = _memory_order(x)
    inverse = [order.index(d) for d in range(x.ndim)]
    physical, at = x.permute(order).contiguous(), order.index(dim)
    size = physical.shape[at]
    missing = -size % m
    if missing:
        pad = [0, 0] * (x.ndim - 1 - at) + [0, missing]
        physical = torch.nn.functional.pad(physical.view(_BITS[x.element_size()]), pad)
        physical = physical.view(x.dtype)
    groups = torch.unflatten(physical, at, (-1, m))
    out = fn(groups, at + 1).flatten(at, at + 1)
    if missing:
        out = out.narrow(at, 0, size).contiguous()
    return out.permute(inverse)


def _memory_order(x: Tensor) -> list[int]:
    """Return the dimensions from the outermost in memory to the innermost."""
    strides = x.stride()
    if x.is_contiguous() or any(s == 0 for s in strides):
        return list(range(x.ndim))
    return sorted(range(x.ndim), key=lambda d: (-strides[d], d))


def _prune_groups(
    groups: Tensor, at: int, method: str, n: int, m: int, generator: torch.Generator | None
) -> Tensor:
    if method == "random":
        return _select(groups, _random_mask(groups, at, n, m, generator))
    if method == "mvue":
        return _mvue(groups, at, n, generator)
    return _by_magnitude(groups, at, n)


def _by_magnitude(groups: Tensor, at: int, n: int) -> Tensor:
    if groups.shape[at] == 4 and groups.dtype not in _FNUZ and cpu.usable(groups, at):
        bits = groups.view(_BITS[groups.element_size()])
        return cpu.top_of_four(bits, n).view(groups.dtype)
    return _select(groups, _magnitude_mask(groups, at, n))


def _rescaled(x: Tensor, n: int, m: int, dim: int, scale_dims: list[int]) -> Tensor:
    kept = _on_groups(x, m, dim, lambda g, at: _by_magnitude(g, at, n))
    if not scale_dims:
        return kept
    total, kept_sum = (_abs_sum(t, scale_dims) for t in (x, kept))
    ratio = total / kept_sum
    ratio = torch.where(torch.isfinite(ratio) & (kept_sum > 0), ratio, torch.ones_like(ratio))
    if kept.dtype == ratio.dtype:
        return kept.mul_(ratio)
    return (kept.to(ratio.dtype) * ratio).to(x.dtype)


def _abs_sum(x: Tensor, dims: list[int]) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    magnitude = x.abs() if x.element_size() > 1 else x.to(wide).abs()
    return magnitude.sum(dims, keepdim=True, dtype=wide)


def magnitude_bits(x: Tensor) -> Tensor:
    """Return integers that order like |x| with NaN on top: the bits with the sign cleared."""
    size = x.element_size()
    bits = x.view(_BITS[size])
    cleared: Tensor = bits & (2 ** (8 * size - 1) - 1)
    if x.dtype in _FNUZ:  # NaN is what would be -0.0 elsewhere
        return cleared.to(torch.int16).masked_fill(bits == -128, 128)
    return cleared


def _select(x: Tensor, mask: Tensor) -> Tensor:
    """Return x where mask else +0.0, on the bits: twice as fast as torch.where on a CPU."""
    bits = x.view(_BITS[x.element_size()])
    # True is 1; its negative has every bit set, and widening keeps it so. A cast and no view:
    # the compiler of torch before 2.12 reads a bool seen as int8 wrongly.
    kept: Tensor = mask.to(torch.int8).neg_().to(bits.dtype).bitwise_and_(bits)
    return kept.view(x.dtype)


def _magnitude_mask(groups: Tensor, at: int, n: int) -> Tensor:
    keys = magnitude_bits(groups)
    return _top_of_four(keys, at, n) if groups.shape[at] == 4 else _top(keys, at, n)


def _top_of_four(keys: Tensor, at: int, n: int) -> Tensor:
    """Return the mask of the n largest of four by the six comparisons between them."""
    k = keys.unbind(at)
    # beats[i][j]: member i goes before member j; on a tie the lower index does.
    beats: list[list[Tensor]] = [[k[0]] * 4 for _ in range(4)]
    for i in range(4):
        for j in range(i + 1, 4):
            beats[i][j] = k[i] >= k[j]
            beats[j][i] = ~beats[i][j]
    masks = []
    for i in range(4):
        a, b, c = (beats[i][j] for j in range(4) if j != i)
        masks.append(a & b & c if n == 1 else a | b | c if n == 3 else (a & b) | (c & (a | b)))
    return torch.stack(masks, at)


def _top(keys: Tensor, at: int, n: int) -> Tensor:
    """Return the mask of the n largest along ``at``: above the n-th value, then the first ties."""
    threshold = keys.topk(n, dim=at, sorted=False).values.amin(at, keepdim=True)
    above, tied = keys > threshold, keys == threshold
    room = n - above.sum(at, keepdim=True)
    return above | (tied & (tied.cumsum(at) <= room))


def overflows(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return where keys, the ``magnitude_bits`` of numbers of dtype, stand for an Inf or NaN."""
    return keys > _LARGEST_FINITE[dtype]


def _random_mask(
    groups: Tensor, at: int, n: int, m: int, generator: torch.Generator | None
) -> Tensor:
    """Return the mask of n drawn elements, but of the n largest where one is Inf or NaN."""
    shape = list(groups.shape)
    size = magnitude_bits(groups)
    overflow = overflows(size.amax(at, keepdim=True), groups.dtype)
    if m == 4:
        codes, count = _SUBSETS_OF_FOUR[n]
        del shape[at]
        pick = torch.randint(count, shape, device=groups.device, generator=generator)
        code = codes >> (4 * pick) & 15
        drawn = torch.stack([(code >> i & 1).bool() for i in range(4)], at)
        return torch.where(overflow, _top_of_four(size, at, n), drawn)
    keys = torch.randint(
        2**31 - 1, shape, dtype=torch.int32, device=groups.device, generator=generator
    )
    return _top(torch.where(overflow, size, keys), at, n)


def _mvue(groups: Tensor, at: int, n: int, generator: torch.Generator | None) -> Tensor:
    """Return the minimum-variance unbiased estimate of groups with n elements kept.

    Any sampling of exactly n elements with inclusion probabilities p is unbiased for x / p, and
    its variance sum x^2 (1/p - 1) depends on p alone; p proportional to |x|, capped at 1, is the
    minimum. Systematic sampling (one uniform number per group) has exactly these p.
    """
    wide = torch.float64 if groups.dtype == torch.float64 else torch.float32
    x = groups.to(wide)
    largest = x.abs().amax(at, keepdim=True)
    size = x.abs() / torch.where(largest > 0, largest, torch.ones_like(largest))
    p = _inclusion_probabilities(size, at, n)
    u = torch.rand(largest.shape, dtype=wide, device=groups.device, generator=generator)
    # points(c) = how many of u, u + 1, ..., u + n - 1 lie below c; one in (c[i-1], c[i]] keeps i
    points = torch.ceil(p.cumsum(at) - u).clamp_(0, n)
    before = torch.cat((torch.zeros_like(u), points.narrow(at, 0, p.shape[at] - 1)), at)
    estimate = torch.where((points > before) & (p > 0), x / p, torch.zeros_like(x))
    estimate = torch.where(p == 1, x, estimate).to(groups.dtype)
    finite = torch.isfinite(largest)
    by_magnitude = _by_magnitude(groups, at, n)
    if groups.element_size() == 1:  # torch.where knows no fp8
        bits = torch.where(finite, estimate.view(torch.int8), by_magnitude.view(torch.int8))
        return bits.view(groups.dtype)
    return torch.where(finite, estimate, by_magnitude)


def _inclusion_probabilities(size: Tensor, at: int, n: int) -> Tensor:
    """Return p = min(1, c * size) with sum p = n, c per group; zero where size is zero."""

    def step(sure: Tensor, _: int) -> Tensor:
        return sure | (_shares(size, sure, at, n) >= 1)

    none_sure = torch.zeros_like(size, dtype=torch.bool)
    # Each round can only add sure elements, and n rounds reach the fixed point: a round that adds
    # none ends it, and once n are sure nothing is left to share.
    sure = reduce(step, range(n), none_sure)
    return torch.where(sure, torch.ones_like(size), _shares(size, sure, at, n).clamp(max=1))


def _shares(size: Tensor, sure: Tensor, at: int, n: int) -> Tensor:
    rest = size.masked_fill(sure, 0)
    total = rest.sum(at, keepdim=True)
    left = n - sure.sum(at, keepdim=True)
    return torch.where(total > 0, rest * left / total, torch.zeros_like(rest))
