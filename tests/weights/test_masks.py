"""Masks against loops and brute force: N:M, unstructured, transposable, and scores of one's own."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sdgp_cusparselt.weights import (
    InputNorms,
    magnitude_scores,
    nm_mask,
    transposable_mask,
    unstructured_mask,
)
from sdgp_cusparselt.weights.patterns import PATTERNS, pattern_code
from sdgp_cusparselt.weights.transposable import best_in_torch
from tests.helpers import kept_of_line

ROOT = Path(__file__).parents[2]


def every_pattern() -> Tensor:
    """Return [90, 4, 4] from all 0/1 matrices: the definition, and not the table's way."""
    rows = [row for row in itertools.product((0, 1), repeat=4) if sum(row) == 2]
    found = [
        block
        for block in itertools.product(rows, repeat=4)
        if all(sum(column) == 2 for column in zip(*block, strict=True))
    ]
    return torch.tensor(found)


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 4), (4, 8), (1, 16), (16, 32)])
@pytest.mark.parametrize("dim", [0, 1])
def test_nm_masks_are_those_of_a_plain_loop(n: int, m: int, dim: int) -> None:
    torch.manual_seed(0)
    # Few values, so that ties are common: the lower index wins.
    weight = torch.randint(-3, 4, (32, 64)).float()
    weight[0, 0] = torch.nan
    moved = weight.movedim(dim, -1)
    expected = torch.tensor([kept_of_line(line, n, m) for line in moved.tolist()])
    for scores in (magnitude_scores(weight), weight.abs()):
        mask = nm_mask(scores, n, m, dim=dim)
        assert torch.equal(mask.movedim(dim, -1), expected)
        assert (mask.movedim(dim, -1).unflatten(-1, (-1, m)).sum(-1) == n).all()


def test_scores_may_be_negative_and_of_any_dtype() -> None:
    scores = torch.tensor([[-4, -1, -3, -2, 5, 0, -7, 1]])
    expected = [[False, True, False, True, True, False, False, True]]
    for dtype in (torch.int32, torch.float16, torch.bfloat16, torch.float64):
        assert nm_mask(scores.to(dtype), 2, 4).tolist() == expected


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.95])
def test_an_unstructured_mask_keeps_the_largest_of_the_layer(sparsity: float) -> None:
    torch.manual_seed(0)
    scores = torch.randperm(40 * 50).view(40, 50).float()
    mask = unstructured_mask(scores, sparsity)
    kept = round((1 - sparsity) * scores.numel())
    assert torch.equal(mask, scores >= scores.numel() - kept)
    ties = unstructured_mask(torch.ones(10), 0.7)
    assert ties.tolist() == [True] * 3 + [False] * 7


def test_there_are_ninety_patterns_and_the_table_has_them_all() -> None:
    codes = (every_pattern().flatten(1) << torch.arange(16)).sum(1)
    assert len(PATTERNS) == 90
    assert sorted(pattern_code(rows) for rows in PATTERNS) == sorted(codes.tolist())


def adversarial(kind: str, count: int) -> Tensor:
    """Return [count, 4, 4] of exact integers, whose sums no rounding touches."""
    generator = torch.Generator().manual_seed(count)
    if kind == "ties":
        return torch.randint(0, 3, (count, 4, 4), generator=generator).float()
    if kind == "greedy misleads":
        # One row and one column far above the rest: what is largest cannot all be kept.
        blocks = torch.randint(0, 8, (count, 4, 4), generator=generator)
        row, column = (torch.randint(0, 4, (count,), generator=generator) for _ in range(2))
        blocks[torch.arange(count), row] += 1000
        blocks[torch.arange(count), :, column] += 999
        return blocks.float()
    if kind == "magnitudes apart":
        return 2.0 ** torch.randint(0, 19, (count, 4, 4), generator=generator)
    return torch.randint(-(2**18), 2**18, (count, 4, 4), generator=generator).float()


@pytest.mark.parametrize("kind", ["random", "ties", "greedy misleads", "magnitudes apart"])
def test_a_transposable_mask_keeps_what_brute_force_keeps(kind: str) -> None:
    blocks = adversarial(kind, 100_000 if kind == "random" else 25_000)
    weight = blocks.view(50, -1, 4, 4).transpose(1, 2).reshape(200, -1)
    mask = transposable_mask(weight, absolute=True)
    tiles = mask.view(50, 4, -1, 4).transpose(1, 2)
    assert (tiles.sum(-1) == 2).all() and (tiles.sum(-2) == 2).all()
    kept = (blocks.abs() * tiles.reshape(-1, 4, 4)).sum((1, 2))
    every = every_pattern().float()
    best = (blocks.abs().flatten(1) @ every.flatten(1).t()).amax(1)
    # Sums of eight integers below 2**19 are exact in float32 in any order.
    assert torch.equal(kept, best)


def test_rounding_loses_no_more_than_its_bound() -> None:
    torch.manual_seed(0)
    blocks = torch.randn(4000, 4, 4)
    mask = transposable_mask(blocks.reshape(-1, 4), absolute=True).view(-1, 4, 4)
    exact = blocks.abs().double()
    kept = (exact * mask).sum((1, 2))
    best = (exact.flatten(1) @ every_pattern().double().flatten(1).t()).amax(1)
    # Either sum is off by at most three additions' rounding; both, by twice that.
    assert (best - kept <= 6 * 2**-24 * best).all()


@pytest.mark.parametrize("rows, cols", [(0, 1), (1, 0), (-2, -1)])
def test_transposable_masks_of_convolutions_run_along_channels(rows: int, cols: int) -> None:
    torch.manual_seed(0)
    shape = (8, 12, 3, 3) if rows >= 0 else (3, 3, 8, 12)
    weight = torch.randn(shape)
    mask = transposable_mask(weight.abs(), rows=rows, cols=cols)
    for dim in (rows, cols):
        assert (mask.unflatten(dim, (-1, 4)).sum(dim + 1 if dim >= 0 else dim) == 2).all()
    if rows == 0:
        one = transposable_mask(weight[:, :, 1, 2].abs())
        assert torch.equal(mask[:, :, 1, 2], one)


def test_the_kernel_finds_what_plain_torch_finds() -> None:
    pytest.importorskip("triton", reason="the kernel needs Triton")
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernel is compiled for it: see the next test")
    from sdgp_cusparselt.weights.transposable_kernel import launch

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # Not whole programs of 128 blocks, and values with many equal sums.
        for scores in (torch.randn(3, 20, 44), torch.randint(-2, 3, (1, 4, 520)).float()):
            weight = scores.to(dtype)
            assert torch.equal(launch(weight, absolute=True), best_in_torch(weight.abs()))
            assert torch.equal(launch(weight), best_in_torch(weight))


@pytest.mark.gpu
def test_the_compiled_kernel_finds_what_plain_torch_finds() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    weight = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)
    found = transposable_mask(weight, absolute=True)
    assert torch.equal(found.cpu(), best_in_torch(weight.abs().cpu()[None])[0])


COMPILE = """
import re
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.pack_budget import TARGETS
from sdgp_cusparselt.weights import transposable_kernel as k

names = k.mask_kernel.arg_names
constants = {"ABSOLUTE": True, "TABLE": k.TABLE, "BLOCKS": k.BLOCKS}
few = ("*fp32",), ("*bf16", "*fp16"), ("*bf16",), ("*bf16",)
every = [("*fp32", "*bf16", "*fp16")] * len(TARGETS)
for target, dtypes in zip(TARGETS, every if sys.argv[1] == "every" else few, strict=True):
    for dtype in dtypes:
        types = {"scores_ptr": dtype, "mask_ptr": "*i8", **dict.fromkeys(constants, "constexpr")}
        signature = {name: types.get(name, "i32") for name in names}
        source = ASTSource(
            k.mask_kernel, signature, {(names.index(n),): v for n, v in constants.items()},
            {(i,): [["tt.divisibility", 16]] for i in range(2)},
        )
        made = compile(source, target=GPUTarget("cuda", target, 32), options=k.OPTIONS)
        ptx = made.asm["ptx"]
        counts = [len(re.findall(op, ptx)) for op in ("ld.global", "st.global", "bar.sync")]
        print(target, dtype, made.metadata.shared, *counts, len(re.findall(r"add.rn.f32", ptx)))
"""


@pytest.mark.parametrize(
    "which, count", [("few", 5), pytest.param("every", 12, marks=pytest.mark.slow)]
)
def test_the_kernel_compiles_for_every_target_and_reads_once(which: str, count: int) -> None:
    pytest.importorskip("triton", reason="there is nothing to compile without Triton")
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'bindings'}")
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, which], env=environment, capture_output=True, text=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == count, done.stderr[-2000:]
    for _, _, shared, loads, stores, barriers, additions in lines:
        # One access for each of a block's rows, nothing through shared memory, and no sum twice:
        # 24 of pairs, 36 and 36 of two rows, 90 of four.
        assert (shared, loads, stores, barriers, additions) == ("0", "4", "4", "0", "186")


def test_wanda_scores_are_weights_times_the_norms_of_their_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 9, 6), nn.Linear(6, 4)
    ).double()
    batches = [torch.randn(2, 4, 5, 5, dtype=torch.float64) for _ in range(3)]
    with InputNorms(model) as norms:
        for batch in batches:
            model(batch)
    model(batches[0])  # outside: not counted
    found, images = norms.scores(), torch.cat(batches)
    assert list(found) == ["0", "2", "3"]
    hidden = model[1](model[0](images))
    linear = model[2].weight.abs() * hidden.square().sum(0).sqrt()
    assert torch.allclose(found["2"].double(), linear, rtol=1e-5)
    norm = images.square().sum((0, 2, 3)).sqrt()
    for row in range(8):
        channels = norm[:2] if row < 4 else norm[2:]
        expected = model[0].weight[row].abs() * channels[:, None, None]
        assert torch.allclose(found["0"][row].double(), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="name must be of a layer that ran"):
        norms.norm("5")


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: nm_mask(torch.ones(3, 6), 2, 4), "a multiple of m = 4 in dimension 1"),
        (lambda: nm_mask(torch.ones(4), 5, 4), "n must be in 1..m"),
        (lambda: nm_mask(torch.ones(4), 2, 4, dim=1), "dim must be in -1..0"),
        (lambda: unstructured_mask(torch.ones(4), 1.0), r"sparsity must be in \[0, 1\)"),
        (lambda: transposable_mask(torch.ones(4, 6)), "multiples of 4"),
        (lambda: transposable_mask(torch.ones(4, 4), rows=1), "two different dimensions"),
    ],
)
def test_wrong_values_are_named(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match="scores must be a tensor of integers or floats"):
        nm_mask(torch.ones(4, dtype=torch.bool), 2, 4)
    with pytest.raises(TypeError, match="scores must be a float tensor"):
        transposable_mask(torch.ones(4, 4, dtype=torch.int64))
