"""Slices of a vocabulary: together all of it, whole blocks wherever a gradient is packed."""

import itertools

import pytest
import torch

from sdgp_cusparselt.products.cross_entropy import Head, Objective


def slices(classes: int, classes_a_slice: int, smoothing: float, packed: bool) -> list[slice]:
    tokens = 16
    objective = Objective(smoothing, 0.0, -100)
    input, weight = torch.empty(tokens, 1), torch.empty(classes, 1)
    target = torch.zeros(tokens, dtype=torch.int64)
    head = Head(input, weight, None, target, objective, tokens * classes_a_slice)
    return list(head.slices(packed))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [1, 63, 64, 256, 300, 1000, 1024])
@pytest.mark.parametrize("classes_a_slice", [1, 300, 10**6])
def test_slices_are_the_vocabulary_in_order(
    classes: int, classes_a_slice: int, smoothing: float, packed: bool
) -> None:
    found = slices(classes, classes_a_slice, smoothing, packed)
    assert [c for part in found for c in range(part.start, part.stop)] == list(range(classes))
    edge = 256 if packed and smoothing else 64
    longest = max(edge, classes_a_slice)
    assert all(part.start % edge == 0 and part.stop - part.start <= longest for part in found)


def test_only_what_is_beyond_whole_blocks_is_packed_apart() -> None:
    for smoothing, edge in ((0.0, 64), (0.1, 256)):
        found = slices(50257, 4096, smoothing, packed=True)
        assert all((part.stop - part.start) % edge == 0 for part in found[:-1])
        assert (found[-1].start, found[-1].stop) == (50257 // edge * edge, 50257)
        # Nothing is packed, nothing is apart: no product of a few columns.
        plain = slices(50257, 4096, smoothing, packed=False)
        assert len(plain) == len(found) - 1 == 13
    for one, two in itertools.pairwise(slices(128256, 4096, 0.1, packed=True)):
        assert one.stop == two.start
