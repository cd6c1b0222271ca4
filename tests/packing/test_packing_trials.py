"""The operands that packers and products are proven on are what they say, block by block."""

import pytest
import torch

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.packing import trials

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture(autouse=True, params=[1 << 6, 1 << 22], ids=["many blocks", "one block"])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "BLOCK", request.param)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_blocks_cover_every_row_once() -> None:
    for rows, cols in ((1, 1), (7, 100), (100, 7), (65, 0)):
        parts = [i for part in trials.row_blocks(rows, cols) for i in range(rows)[part]]
        assert parts == list(range(rows))


@pytest.mark.parametrize("cols", [64, 62])
def test_two_of_four_keeps_every_pair_and_every_value(
    generator: torch.Generator, cols: int
) -> None:
    made = trials.two_of_four(96, cols, BF16, CPU, generator)
    assert made.shape == (96, cols) and set(made.unique().tolist()) == {-2, -1, 0, 1, 2}
    groups = (made[:, : cols // 4 * 4] != 0).view(-1, 4)
    assert (groups.sum(-1) == 2).all() and len(groups.unique(dim=0)) == 6


def test_few_integers_has_its_share(generator: torch.Generator) -> None:
    made = trials.few_integers(128, 128, BF16, CPU, generator, share=0.25)
    assert set(made.unique().tolist()) == {-1, 0, 1}
    # Five standard deviations of a binomial share.
    assert abs((made != 0).float().mean() - 0.25) < 5 * (0.25 * 0.75 / 128**2) ** 0.5


@pytest.mark.parametrize("k", [16, 1024, 65536])
def test_results_of_the_integers_are_nearly_all_exact(k: int) -> None:
    share = trials.share_of_nonzeros(k, BF16)
    assert 0 < share <= 1 and 6 * (1.25 * k * share) ** 0.5 <= 256.001


def test_the_blocked_product_is_the_product(generator: torch.Generator) -> None:
    left = trials.two_of_four(48, 64, BF16, CPU, generator)
    right = trials.few_integers(40, 64, BF16, CPU, generator).t()
    want = left.double() @ right.double()
    assert torch.equal(trials.wide_product(left, right, torch.float32).double(), want)
    assert torch.equal(trials.wide_product(left, right, BF16), want.to(BF16))


def test_pruned_as_by_prune_with_positive_zeros(generator: torch.Generator) -> None:
    x = trials.normal(64, 48, BF16, CPU, generator)
    x[:, ::3] = -0.0
    for given in (x, x.t()):
        pruned = trials.pruned_24(given)
        assert torch.equal(pruned, sdgp.prune(given.contiguous()))
        assert not bool((pruned.view(torch.int16) == -0x8000).any())


def test_trial_matrices_hold_what_packers_get_wrong() -> None:
    made = dict(trials.unpruned(64, 64, BF16, CPU))
    assert list(made) == ["random", "sparse", "special"]
    kept = (made["sparse"].view(-1, 4) != 0).sum(-1)
    assert set(kept.tolist()) == {0, 1, 2, 3, 4}
    special = made["special"]
    assert torch.isinf(special).any() and (special == torch.finfo(BF16).max).any()
    assert (special.view(torch.int16) == -0x8000).any()


def test_large_results_are_compared_in_some_rows(generator: torch.Generator) -> None:
    rows = trials.some_rows(1 << 20, 1 << 17, CPU, generator)
    assert rows is not None and len(rows) == len(rows.unique()) == 256
    assert trials.some_rows(200, 1 << 17, CPU, generator) is None
