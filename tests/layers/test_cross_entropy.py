"""linear_cross_entropy against float64 autograd of torch's own two, and what it refuses."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sdgp_cusparselt as sdgp
from bench import head_cost
from sdgp_cusparselt.equivalence import product_bound
from sdgp_cusparselt.functional import linear_cross_entropy
from sdgp_cusparselt.recording.records import LayerRecord
from tests.helpers import oracle_magnitude

#: Small enough that the vocabulary is cut into slices of 64.
CHUNK = 64
#: (tokens, vocabulary, in_features): one slice, ragged ones, fewer classes than a group, one token.
SIZES = [(37, 203, 24), (8, 64, 16), (5, 3, 2), (1, 130, 8)]


def reference(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """Return torch's own, plus z lse^2 for every token that counts."""
    logits = F.linear(input, weight, bias)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    plain = F.cross_entropy(logits, target, reduction=reduction, **options)
    if not z_loss:
        return plain
    counts = target != ignore_index
    extra = torch.where(counts, z_loss * logits.logsumexp(1).square(), 0.0)
    if reduction == "none":
        return plain + extra
    return plain + extra.sum() / (counts.sum() if reduction == "mean" else 1)


def operands(
    tokens: int, vocabulary: int, width: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return input, weight, bias and target."""
    tensors = [torch.randn(s).to(dtype) for s in ((tokens, width), (vocabulary, width))]
    return *tensors, torch.randn(vocabulary).to(dtype), torch.randint(vocabulary, (tokens,))


def run(
    loss: Callable[..., Tensor], leaves: Sequence[Tensor], target: Tensor, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a loss and the gradients of leaves: input, weight and, if there is a third, bias."""
    input, weight, *bias = (t.detach().requires_grad_() for t in leaves)
    found = loss(input, weight, target, bias=bias[0] if bias else None, **options)
    upstream = torch.linspace(0.5, 2, found.numel(), dtype=found.dtype).view(found.shape)
    return found.detach(), torch.autograd.grad(found, [input, weight, *bias], upstream)


def assert_near(found: Tensor, expected: Tensor, terms: int) -> None:
    """Assert equality up to float64's rounding of sums of so many terms, about 10 in size."""
    scale = 10 * terms * torch.finfo(torch.float64).eps
    torch.testing.assert_close(found, expected, rtol=scale, atol=scale, equal_nan=True)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_values_and_gradients(sizes: tuple[int, int, int], reduction: str, bias: bool) -> None:
    for smoothing, z_loss, ignored in itertools.product((0, 0.1, 1), (0, 0.01), (0, 0.4)):
        input, weight, b, target = operands(*sizes)
        target[torch.rand(target.shape) < ignored] = -100
        target[0] = 1
        leaves = [input, weight, *([b] if bias else [])]
        options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss": z_loss}
        loss, grads = run(linear_cross_entropy, leaves, target, **options, chunk=CHUNK)
        exact, exact_grads = run(reference, leaves, target, **options)
        assert_near(loss, exact, sum(sizes))
        for found, expected in zip(grads, exact_grads, strict=True):
            assert_near(found, expected, sum(sizes))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 2])
def test_where_every_token_is_ignored_the_loss_is_torchs_and_gradients_are_zero(
    reduction: str, ignore_index: int
) -> None:
    input, weight, b, target = operands(6, 70, 8)
    target.fill_(ignore_index)
    options = {"reduction": reduction, "ignore_index": ignore_index}
    loss, grads = run(linear_cross_entropy, [input, weight, b], target, **options)
    expected, _ = run(reference, [input, weight, b], target, **options)
    assert torch.equal(loss.isnan(), expected.isnan()) and loss.isnan().any() == (
        reduction == "mean"
    )
    assert torch.equal(loss.nan_to_num(), torch.zeros_like(loss))
    assert not any(g.any() for g in grads)


def test_without_tokens_it_is_torchs() -> None:
    input, weight, b, target = operands(0, 70, 8)
    for reduction in ("mean", "sum", "none"):
        loss, grads = run(linear_cross_entropy, [input, weight, b], target, reduction=reduction)
        expected, _ = run(reference, [input, weight, b], target, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        assert grads[0].shape == (0, 8) and not any(g.any() for g in grads)


def test_tokens_may_have_any_shape_and_operands_any_strides() -> None:
    input, weight, _, target = operands(24, 100, 8)
    batch = input.view(4, 6, 8).transpose(0, 1)
    loss, grads = run(
        linear_cross_entropy,
        [batch, weight.t().contiguous().t()],
        target.view(6, 4),
        reduction="none",
        chunk=CHUNK,
    )
    flat = batch.reshape(24, 8)
    expected, exact = run(reference, [flat, weight], target, reduction="none")
    assert loss.shape == (6, 4)
    assert_near(loss.flatten(), expected, 100)
    assert_near(grads[0].reshape(24, 8), exact[0], 100)
    assert_near(grads[1], exact[1], 100)


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_what_takes_no_gradient_gets_none(frozen: str) -> None:
    input, weight, _, target = operands(9, 70, 8)
    leaves = {"input": input, "weight": weight}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    linear_cross_entropy(input, weight, target).backward()
    _, exact = run(reference, [input, weight], target, reduction="sum")
    assert leaves[frozen].grad is None
    other = 1 - list(leaves).index(frozen)
    # The loss of ``run`` weighs 0.5, that of ``backward`` 1; a mean of 9.
    assert_near(list(leaves.values())[other].grad, exact[other] / 4.5, 70)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_operands_stay_within_their_bound(dtype: torch.dtype) -> None:
    """Sums are float32: what is left are the roundings of logits, of their gradient, of results."""
    tokens, vocabulary, width = 96, 500, 48
    input, weight, b, target = operands(tokens, vocabulary, width, dtype)
    input, weight = input / 4, weight / 4
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "reduction": "sum"}
    loss, grads = run(linear_cross_entropy, [input, weight, b], target, **options, chunk=6400)
    x, w, c = (t.double() for t in (input, weight, b))
    exact, exact_grads = run(reference, [x, w, c], target, **options)
    assert loss.dtype == torch.float32 and {g.dtype for g in grads} == {dtype}

    eps = torch.finfo(dtype).eps
    logits = x @ w.t() + c
    size = x.abs() @ w.t().abs() + c.abs()
    # A sum and a rounded sum, each to the dtype; then float32's own.
    off = eps * (logits.abs() + size.abs()) / 2 + width * torch.finfo(torch.float32).eps * size
    row = off.amax(1, keepdim=True)
    lse = logits.logsumexp(1, keepdim=True)
    slope = 1 + 2 * options["z_loss"] * lse
    bound = (row * (2 + 2 * options["z_loss"] * lse)).sum() + 1e-5 * exact.abs()
    assert (loss - exact).abs() <= bound

    p = (logits - lse).exp()
    g = p * slope - 0.1 / vocabulary
    g[torch.arange(tokens), target] -= 0.9
    wrong = p * slope * ((off + row).exp() - 1) + p * 2 * options["z_loss"] * row
    wrong += eps * g.abs() + 1e-6 * p + torch.finfo(dtype).tiny
    slices = -(-vocabulary // 64)
    for found, expected, left, right, bad in (
        (grads[0], exact_grads[0], g, w, wrong),
        (grads[1], exact_grads[1], g.t(), x, wrong.t()),
    ):
        reach = left.abs() @ right.abs() + bad @ right.abs()
        limit = bad @ right.abs()
        limit = limit + product_bound(reach, expected, left.shape[1], dtype, roundings=slices)
        assert ((found.double() - expected).abs() <= limit).all()
    limit = wrong.sum(0) + eps * exact_grads[2].abs() + 1e-5
    assert ((grads[2].double() - exact_grads[2]).abs() <= limit).all()


def logits_gradient(input: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Return autograd's gradient of the logits: of the head whose weight is the identity."""
    logits = (input @ weight.t()).detach()
    identity = torch.eye(weight.shape[0], dtype=logits.dtype)
    return run(reference, [logits, identity], target, **options)[1][0]


@pytest.mark.parametrize("sizes", [(37, 603, 24), (64, 256, 16)], ids=str)
@pytest.mark.parametrize(
    "grad_weight, pattern", [("dense", (2, 4)), ("dense", (4, 8)), ("sparse", (2, 4))], ids=str
)
def test_a_pruned_head_multiplies_the_pruned_gradient(
    sizes: tuple[int, int, int], grad_weight: str, pattern: tuple[int, int]
) -> None:
    n, m = pattern
    input, weight, _, target = operands(*sizes)
    config = sdgp.SDGPConfig(
        prune="magnitude", n=n, m=m, grad_weight=grad_weight, grad_weight_prune="magnitude"
    )
    record = LayerRecord()
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    _, grads = run(
        linear_cross_entropy, [input, weight], target, config=config, chunk=CHUNK, record=record,
        **options,
    )  # fmt: skip
    g = logits_gradient(input, weight, target, **options)
    over_tokens = oracle_magnitude(g, n, m, 0) if grad_weight == "sparse" else g
    assert_near(grads[0], oracle_magnitude(g, n, m, 1) @ weight, sum(sizes))
    assert_near(grads[1], over_tokens.t() @ input, sum(sizes))
    slices = -(-sizes[1] // 256)  # where labels are smoothed
    assert record.calls["grad_input", "emulated"] == slices
    assert record.calls["grad_weight", "emulated"] == (slices if grad_weight == "sparse" else 0)


@pytest.mark.parametrize("method", ["rescaled_magnitude", "mvue", "random"])
def test_a_slice_draws_as_prune_draws(method: str) -> None:
    input, weight, _, target = operands(32, 64, 16)
    torch.manual_seed(3)
    config = sdgp.SDGPConfig(prune=method)
    _, grads = run(linear_cross_entropy, [input, weight], target, config=config)
    g = logits_gradient(input, weight, target)
    torch.manual_seed(3)
    assert_near(grads[0], sdgp.prune(g, method=method) @ weight, 64)


def test_rescaled_magnitude_sums_over_all_tokens_whatever_the_slices() -> None:
    input, weight, _, target = operands(32, 200, 16)
    config = sdgp.SDGPConfig(prune="rescaled_magnitude")
    _, grads = run(linear_cross_entropy, [input, weight], target, config=config, chunk=CHUNK)
    g = logits_gradient(input, weight, target)
    assert_near(grads[0], sdgp.prune(g, method="rescaled_magnitude") @ weight, 200)


@pytest.mark.parametrize("head_bias", [True, False])
def test_autocast_casts_as_linear_does(head_bias: bool) -> None:
    input, weight, b, target = operands(33, 150, 16, torch.float32)
    leaves = [input, weight, *([b] if head_bias else [])]

    def autocast(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(*args, **kwargs)

    loss, grads = run(autocast, leaves, target, chunk=CHUNK)
    low, low_grads = run(linear_cross_entropy, [t.bfloat16() for t in leaves], target, chunk=CHUNK)
    assert torch.equal(loss, low)
    assert all(g.dtype == torch.float32 for g in grads)
    for found, expected in zip(grads, low_grads, strict=True):
        assert torch.equal(found.bfloat16(), expected)


def test_an_upstream_factor_reaches_the_gradient_before_it_is_rounded() -> None:
    """As GradScaler needs it: float16 would lose a mean's gradient without its factor."""
    input, weight, _, target = operands(512, 4096, 16, torch.float16)
    factor = 2.0**16
    leaves = [t.detach().requires_grad_() for t in (input / 16, weight / 16)]
    (factor * linear_cross_entropy(*leaves, target)).backward()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    (factor * reference(*exact, target)).backward()
    for leaf, expected in zip(leaves, exact, strict=True):
        error = (leaf.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert error < 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("prune", ["none", "magnitude"])
def test_compiled_it_is_the_same(reduction: str, prune: str) -> None:
    input, weight, b, target = operands(33, 150, 16)
    target[3] = -100
    config = sdgp.SDGPConfig(prune=prune, grad_weight="sparse", grad_weight_prune="magnitude")
    options = {"reduction": reduction, "config": config, "chunk": CHUNK, "z_loss": 0.01}
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    loss, grads = run(compiled, [input, weight, b], target, **options)
    eager, eager_grads = run(linear_cross_entropy, [input, weight, b], target, **options)
    assert torch.equal(loss, eager)
    for found, expected in zip(grads, eager_grads, strict=True):
        assert_near(found, expected, 150)


def test_checkpointing_changes_nothing() -> None:
    input, weight, _, target = operands(33, 150, 16)

    def checkpointed(*args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(linear_cross_entropy, *args, use_reentrant=False, **kwargs)

    plain = run(linear_cross_entropy, [input, weight], target)
    found = run(checkpointed, [input, weight], target)
    assert torch.equal(plain[0], found[0])
    assert all(map(torch.equal, plain[1], found[1]))


def test_a_second_backward_pass_is_the_first_one_again() -> None:
    input, weight, _, target = operands(9, 70, 8)
    input.requires_grad_()
    loss = linear_cross_entropy(input, weight, target)
    first = torch.autograd.grad(loss, input, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, input)[0])


def test_second_derivatives_batched_gradients_and_transforms_are_refused() -> None:
    input, weight, _, target = operands(9, 70, 8)
    input.requires_grad_()
    loss = linear_cross_entropy(input, weight, target, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), input, create_graph=True)
    with pytest.raises(sdgp.SDGPError, match="no second derivative"):
        grad.sum().backward()
    loss = linear_cross_entropy(input, weight, target, reduction="none")
    with pytest.raises(sdgp.SDGPError, match="one gradient at a time"):
        torch.autograd.grad(loss, input, torch.eye(9).double(), is_grads_batched=True)
    with pytest.raises(sdgp.SDGPError, match=r"transforms of torch\.func"):
        torch.func.grad(lambda x: linear_cross_entropy(x, weight, target))(input.detach())


@pytest.mark.parametrize("bad", [70, -1, -99])
def test_a_target_that_is_no_class_is_refused_as_torch_refuses_it(bad: int) -> None:
    input, weight, _, target = operands(9, 70, 8)
    target[4] = bad
    with pytest.raises(IndexError, match="out of bounds"):
        reference(input, weight, target)
    with pytest.raises(IndexError, match=rf"target must be in 0\.\.69 or -100, got {bad}\."):
        linear_cross_entropy(input, weight, target)


RESCALED = sdgp.SDGPConfig(grad_weight="sparse", grad_weight_prune="rescaled_magnitude")
X, W, T = torch.zeros(4, 8), torch.zeros(10, 8), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"target": T[:3]}, ValueError, r"target must be \[4\] as input's tokens, got \[3\]"),
        ({"target": torch.zeros(4, 10)}, ValueError, "probabilities of classes are not taken"),
        ({"target": T.int()}, TypeError, r"target must be torch.int64, got torch.int32"),
        ({"weight": torch.zeros(10, 9)}, ValueError, "weight must be"),
        ({"weight": torch.zeros(10, 8).double()}, TypeError, "weight must be torch.float32 as"),
        ({"weight": torch.zeros(10, 8, dtype=torch.int)}, sdgp.NotSupportedError, "int32"),
        ({"bias": torch.zeros(9)}, ValueError, r"bias must be \[10\], got \[9\]"),
        ({"bias": torch.zeros(10).half()}, TypeError, "bias must be torch.float32 as input"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in 0\.\.1, got 1.5"),
        ({"label_smoothing": "0"}, TypeError, "label_smoothing must be a number"),
        ({"z_loss": -1}, ValueError, "z_loss must be >= 0, got -1"),
        ({"z_loss": float("nan")}, ValueError, "z_loss must be >= 0, got nan"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        (
            {"config": sdgp.SDGPConfig(prune="none", forward="sparse_weight")},
            ValueError,
            'config.forward must be "dense"',
        ),
        ({"config": "mvue"}, TypeError, "config must be an SDGPConfig"),
        (
            {"config": sdgp.SDGPConfig(schedule=sdgp.Schedule(warmup=1))},
            ValueError,
            "config must be one without a schedule",
        ),
        (
            {"config": RESCALED},
            ValueError,
            "config.grad_weight_prune must be any method but rescaled_magnitude",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_say_what_would_be_right(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    arguments = {"input": X, "weight": W, "target": T, **change}
    with pytest.raises(error, match=words):
        linear_cross_entropy(**arguments)


def test_the_peak_of_memory_counts_what_is_alive() -> None:
    with head_cost.Peak() as memory:
        a = torch.zeros(100)
        b = a.view(10, 10) + 1
        del a
        c = torch.zeros(50)
        del b, c
    assert (memory.peak, memory.now) == (800, 0)


@pytest.mark.parametrize("width", head_cost.WIDTHS)
def test_its_peak_is_an_eighth_of_plain_torchs_at_most(width: int) -> None:
    """8,192 tokens, 128,256 classes, bf16, on meta tensors."""
    needed, ours = head_cost.gradients(width), head_cost.counted(head_cost.ours, width)
    plain = head_cost.counted(head_cost.plain, width)
    logits = 2 * head_cost.TOKENS * head_cost.VOCABULARY
    assert plain.peak >= 3 * logits  # of logits, log-probabilities and two gradients
    assert ours.peak - needed <= plain.peak / 8
    assert ours.peak <= head_cost.counted(head_cost.plain_float32, width).peak / 8
    assert (plain.products, ours.products) == (3, 4)
