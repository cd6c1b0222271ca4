"""What is not searched for: only what is far behind by published speeds, on a known card."""

import pytest
import torch

from sdgp_cusparselt.backends.gemm import Gemm
from sdgp_cusparselt.cards.gpus import GPUS, gpu_of
from sdgp_cusparselt.planner.roofline import gemm_time, square_layer
from sdgp_cusparselt.tuning.filter import HOPELESS, cannot_win
from tests.tuning.fakes import CPU

NAMES = {
    "A100": "NVIDIA A100-SXM4-80GB",
    "H100": "NVIDIA H100 80GB HBM3",
    "RTX4090": "NVIDIA GeForce RTX 4090",
    "B200": "NVIDIA B200",
}


def reason(card: str, m: int, n: int, k: int, rival: str = "mm") -> str:
    return cannot_win(Gemm(m, n, k, torch.bfloat16, "row", CPU), card, rival)


@pytest.mark.parametrize("card", NAMES.values())
def test_wide_layers_are_searched_for_and_narrow_ones_are_not(card: str) -> None:
    assert not reason(card, 8192, 4096, 14336) and not reason(card, 8192, 4096, 4096)
    narrow = reason(card, 8192, 128, 512)
    assert "cannot win on" in narrow and "predicted" in narrow


@pytest.mark.parametrize("card", ["A100", "H100", "B200"])
def test_few_tokens_read_the_weight_and_nothing_saves_that(card: str) -> None:
    assert reason(NAMES[card], 64, 1024, 1024)


def test_a_sparse_product_that_is_slower_by_itself_is_ruled_out_however_small_its_pack() -> None:
    """As many multiply-adds as 2048^3, where an H100's sparse product was seen to lose."""
    assert reason(NAMES["H100"], 2048, 8192, 512) and not reason(NAMES["A100"], 2048, 8192, 512)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens, width", [(8192, 4096), (8192, 1024), (2048, 2048), (512, 512)])
def test_it_is_the_planners_prediction(name: str, tokens: int, width: int) -> None:
    gpu = GPUS[name]
    time = gemm_time(square_layer(tokens, width), gpu, gpu.published)
    hopeless = time.path >= HOPELESS * time.dense or time.sparse >= time.dense
    assert bool(reason(NAMES[name], tokens, width, width)) == hopeless


@pytest.mark.parametrize("card", ["a GPU", "NVIDIA GB10", "NVIDIA RTX A1000", "NVIDIA L40S"])
def test_nothing_is_ruled_out_where_nothing_is_published(card: str) -> None:
    assert not reason(card, 64, 16, 64)


def test_a_convolution_that_must_be_folded_is_ruled_out_anywhere() -> None:
    assert "k x k convolution" in reason("a GPU", 8192, 4096, 4096, rival="conv 3x3")


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_known_by_the_names_that_drivers_give(name: str) -> None:
    found = gpu_of(NAMES[name])
    assert found is not None and found.name == name


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000 6GB Laptop GPU", "NVIDIA L40", "x86_64", ""])
def test_a_name_that_contains_another_is_not_it(name: str) -> None:
    assert gpu_of(name) is None
