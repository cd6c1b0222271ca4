"""Buckets of token counts: few, close, and the same for every count of one."""

import pytest
import torch

from sdgp_cusparselt.backends.gemm import Gemm
from sdgp_cusparselt.tuning.buckets import SMALLEST, bucket, bucket_of
from tests.tuning.fakes import CPU


def test_a_bucket_holds_what_falls_into_it_and_ends_close_above() -> None:
    tops = set()
    for tokens in range(1, 5000):
        top = bucket(tokens)
        assert top >= tokens and bucket(top) == top
        assert tokens <= SMALLEST or tokens > top * 2 / 3, (tokens, top)
        tops.add(top)
    assert sorted(tops)[:6] == [64, 96, 128, 192, 256, 384] and len(tops) == 14
    assert bucket(0) == 0, "an empty product is no small one"


@pytest.mark.parametrize("usual", [64, 1024, 1536, 2048, 3072, 4096, 8192, 12288, 65536])
def test_usual_batches_are_measured_as_they_are(usual: int) -> None:
    assert bucket(usual) == usual


def test_tokens_are_rows_for_grad_input_and_reduced_for_grad_weight() -> None:
    gemm = Gemm(1000, 24, 700, torch.bfloat16, "row", CPU)
    rows, reduced = bucket_of(gemm, False), bucket_of(gemm, True)
    assert (rows.m, rows.n, rows.k) == (1024, 24, 700)
    assert (reduced.m, reduced.n, reduced.k) == (1000, 24, 768)


def test_no_bucket_that_the_library_could_not_count() -> None:
    gemm = Gemm(66_000, 64, 32_000, torch.bfloat16, "row", CPU)
    assert 98_304 * 32_000 > 2**31
    assert bucket_of(gemm, False) == gemm
