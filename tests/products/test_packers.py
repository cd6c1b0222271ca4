"""The kernel's packer, under Triton's interpreter, against the reference's: the same bytes."""

import pytest
import torch

from sdgp_cusparselt.packing import launch
from sdgp_cusparselt.packing.layout import PLAIN
from sdgp_cusparselt.products.packers import SLOT, KernelPacker, ReferencePacker, Wanted

pytestmark = pytest.mark.skipif(
    not launch.interpreted(), reason="needs Triton's interpreter: TRITON_INTERPRET=1 and no GPU"
)
CASES = {
    "features": Wanted(2, 32, features="magnitude", features_layout=PLAIN),
    "tokens, drawn": Wanted(2, 32, tokens="mvue", tokens_layout=PLAIN),
    "one of four": Wanted(1, 32, features="random", features_layout=PLAIN),
    "both": Wanted(
        2, 16, features="mvue", tokens="mvue", features_layout=PLAIN, tokens_layout=PLAIN
    ),
    "both, rescaled by sample": Wanted(
        2,
        16,
        features="rescaled_magnitude",
        tokens="rescaled_magnitude",
        features_layout=PLAIN,
        tokens_layout=PLAIN,
    ),
}


@pytest.mark.parametrize("name, strided", [*((name, False) for name in CASES), ("both", True)])
def test_the_kernel_packs_what_the_reference_packs(name: str, strided: bool) -> None:
    wanted = CASES[name]
    x = torch.randn(32, 64).mul(4).round().bfloat16()  # sums of integers are exact in any order
    x = torch.cat([x, x], 1)[:, 1:65] if strided else x
    made = []
    for kind in (KernelPacker, ReferencePacker):
        packer = kind(x, wanted)
        buffer = torch.full((packer.nbytes,), 0xAA, dtype=torch.uint8)
        torch.manual_seed(5)
        packer(x, buffer.data_ptr(), 0)
        made.append((packer, buffer))
    (kernel, ours), (reference, truth) = made
    assert kernel.tokens_at == reference.tokens_at and kernel.tokens_at % SLOT == 0
    assert kernel.by_address == (not strided and "rescaled" not in name)
    assert torch.equal(ours, truth) and (truth != 0xAA).any()


def test_draws_follow_the_generator_and_move_it() -> None:
    packer = ReferencePacker(torch.empty(32, 64).bfloat16(), CASES["tokens, drawn"])
    x = torch.randn(32, 64).bfloat16()

    def packed() -> torch.Tensor:
        buffer = torch.zeros(packer.nbytes, dtype=torch.uint8)
        packer(x, buffer.data_ptr(), 0)
        return buffer

    torch.manual_seed(1)
    first, second = packed(), packed()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        assert torch.equal(packed(), first)
    assert torch.equal(packed(), first), "fork_rng gave the state back"
