"""The Triton kernels against the reference, bit for bit, on outputs that start as garbage."""

import packing_cases as cases
import packing_oracle as oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdgp_cusparselt.config.patterns import METHODS
from sdgp_cusparselt.devices import current_stream, on_device
from sdgp_cusparselt.packing import launch, starting, variants
from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing import ratios as ratios_of
from sdgp_cusparselt.packing.layout import MetadataLayout, padded_shape
from sdgp_cusparselt.packing.pack import PackedGradient, pack_gradient
from sdgp_cusparselt.packing.packed import Packed24
from sdgp_cusparselt.packing.reference import Draws, pack_operand

SEEDS = torch.tensor([0x1234_5678_9ABC_DEF0, -(2**62) + 12345])
# Three bits of a word are at home in a block of the first, one in a block of the second; in the
# third, the two nibbles of a byte are 32 rows apart, further than a block is high by itself.
SCATTERED = MetadataLayout(
    "scattered", (2, 4, 8, 16, 32, 1), (64, 128), "groups", region=((64, 16),)
)
ODD_LAYOUTS = (
    cases.random_layout(3, 5, 3, "groups"),
    cases.random_layout(5, 1, 2),
    SCATTERED,
    MetadataLayout("padded with 5", (1, 8, 16, 32), (2, 4), padding=5),
)
LAYOUTS = (*layouts.NAMED.values(), *ODD_LAYOUTS)
WAYS = {"features": (False,), "tokens": (True,), "both": (False, True)}
# Ratios of each way: [samples, K] along features, [M] along tokens.
Ratios = dict[bool, Tensor]


def run_kernel(
    x: Tensor,
    method: str,
    layout: MetadataLayout,
    directions: str,
    *,
    ratios: Ratios | None = None,
    rows_per_ratio: int | None = None,
    poison: int = 0x5A,
    n: int = 2,
    in_memory: bool = False,
) -> tuple[dict[bool, Packed24], Tensor | None]:
    """Launch on outputs filled with a byte that packing does not write by chance alone."""
    read, ways = launch.aligned(x), WAYS[directions]
    rows, cols = x.shape
    prepared = launch.prepare_pack(
        (rows, cols),
        read.stride(0),
        x.dtype,
        x.device,
        features=method if False in ways else None,
        tokens=method if True in ways else None,
        features_layout=layout,
        tokens_layout=layout,
        n=n,
        column_sums=directions == "both",
        rows_per_ratio=rows_per_ratio,
        seeds_in_memory=in_memory,
    )
    sizes = (prepared.features_nbytes, prepared.tokens_nbytes)
    buffers = [torch.full((size,), poison, dtype=torch.uint8, device=x.device) for size in sizes]
    sums = None
    if prepared.sums_shape is not None:
        sums = torch.full(prepared.sums_shape, torch.nan, device=x.device)
    given = {way: ratio.to(x.device) for way, ratio in (ratios or {}).items()}
    if False in given and prepared.width != cols:
        pad = (0, prepared.width - cols)
        given[False] = torch.nn.functional.pad(given[False], pad).contiguous()
    seeds = SEEDS.to(x.device)
    seed, offset = (0, 0) if in_memory else SEEDS.tolist()
    with on_device(x.device):
        prepared(
            read.data_ptr(),
            buffers[0].data_ptr(),
            buffers[1].data_ptr(),
            seed,
            offset,
            current_stream(x.device),
            seeds=seeds.data_ptr() if in_memory else 0,
            features_ratio=given[False].data_ptr() if False in given else 0,
            tokens_ratio=given[True].data_ptr() if True in given else 0,
            sums=0 if sums is None else sums.data_ptr(),
        )
    shapes = {False: (rows, cols), True: (cols, rows)}
    packed = {way: Packed24(buffers[way], shapes[way], x.dtype, layout, way) for way in ways}
    return packed, None if sums is None else sums[:, :cols]


def expected(
    x: Tensor, method: str, layout: MetadataLayout, transposed: bool, ratios: Ratios, n: int = 2
) -> Packed24:
    operand = x.cpu().t() if transposed else x.cpu()
    draws = Draws(SEEDS, int(transposed))
    ratio = ratios.get(transposed)
    return pack_operand(operand, layout, method=method, n=n, ratio=ratio, draws=draws)


def some_ratios(rows: int, cols: int, seed: int = 0) -> Ratios:
    generator = torch.Generator().manual_seed(seed)
    return {
        False: torch.rand((1, cols), generator=generator) + 0.5,
        True: torch.rand((rows,), generator=generator) + 0.5,
    }


def fits(layout: MetadataLayout, rows: int, cols: int) -> bool:
    shapes = (padded_shape(rows, cols, torch.half), padded_shape(cols, rows, torch.half))
    return all(layout.misfit(*shape) is None for shape in shapes)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 100),
    groups=st.integers(1, 24),
    extra=st.integers(0, 9),
    method=st.sampled_from([m for m in METHODS if m != "none"]),
    n=st.sampled_from([2, 2, 1]),
    dtype=st.sampled_from(cases.FLOAT_DTYPES),
    layout=st.sampled_from(LAYOUTS),
    directions=st.sampled_from(["features", "tokens", "both"]),
)
def test_bytes_equal_the_reference(
    device: str,
    seed: int,
    rows: int,
    groups: int,
    extra: int,
    method: str,
    n: int,
    dtype: torch.dtype,
    layout: MetadataLayout,
    directions: str,
) -> None:
    cols = 4 * groups
    if not fits(layout, rows, cols):
        layout = layouts.PLAIN
    wide = cases.adversarial(rows, cols + extra, dtype, seed).to(device)
    x = wide[:, :cols]  # rows lie further apart than they are wide
    ratios = some_ratios(rows, cols, seed)
    got, sums = run_kernel(x, method, layout, directions, ratios=ratios, n=n)
    for transposed, packed in got.items():
        want = expected(x, method, layout, transposed, ratios, n)
        assert cases.same_bits(packed.values.cpu(), want.values)
        assert cases.same_bits(packed.metadata.cpu(), want.metadata)
    if sums is not None:
        exact, size = x.double().sum(0), x.double().abs().sum(0)
        finite = size < torch.finfo(torch.float32).max
        # A sum of n terms in fp32, in any order: n eps times the sum of magnitudes.
        bound = rows * torch.finfo(torch.float32).eps * size
        assert (sums.double().sum(0) - exact)[finite].abs().le(bound[finite]).all()


@pytest.mark.parametrize(
    "layout, method",
    [(layout, "magnitude") for layout in LAYOUTS]
    + [(layout, "random") for layout in ODD_LAYOUTS]
    + [(layouts.PLAIN, m) for m in METHODS],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_byte_is_written(device: str, layout: MetadataLayout, method: str) -> None:
    """Of outputs that start as a byte that no packing is full of."""
    x = cases.adversarial(100, 60, torch.bfloat16).to(device)
    if method == "none":
        x = oracle.prune_magnitude(x.cpu()).to(device)
    ratios = some_ratios(100, 60)
    directions = "both" if fits(layout, 100, 60) and method != "none" else "features"
    made = run_kernel(x, method, layout, directions, ratios=ratios, poison=0x5A)[0]
    for transposed, packed in made.items():
        want = expected(x, method, layout, transposed, ratios)
        assert cases.same_bits(packed.buffer.cpu(), want.buffer)


def test_a_block_grows_until_it_holds_whole_words_of_the_layout() -> None:
    scattered = variants.Target("magnitude", SCATTERED)
    assert variants.choose_tile(4096, 4096, scattered, None).block_m == 64
    assert variants.choose_tile(4096, 4096, None, scattered).block_k == 64
    far = MetadataLayout("far", (*(2 << i for i in range(9)), 1), (1024, 2048))
    assert "512 rows apart" in str(variants.layout_obstacle(far))
    assert all(variants.layout_obstacle(layout) is None for layout in LAYOUTS)


@pytest.mark.parametrize("method", ["random", "mvue"])
@pytest.mark.parametrize("dtype", cases.FLOAT_DTYPES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_overflow_stays_visible_in_both_directions(
    device: str, method: str, dtype: torch.dtype, value: float
) -> None:
    """One to four of them in a group, at every place: what is kept of it is NaN; others are not."""
    x = torch.randn(64, 64).to(dtype)
    rows, cols = torch.arange(64)[:, None], torch.arange(64)[None, :]
    x[(rows * 7 + cols * 3) % 5 == 0] = value
    x[(rows + cols) % 11 == 3] = torch.finfo(dtype).max / 4
    got, _ = run_kernel(x.to(device), method, layouts.PLAIN, "both")
    for transposed, packed in got.items():
        operand = x.t().contiguous() if transposed else x
        overflow = (~operand.isfinite()).view(64, 16, 4).any(-1)
        result = packed.unpack().cpu().view(64, 16, 4)
        assert 0 < overflow.sum() < overflow.numel()
        assert (result[overflow].isnan().sum(-1) == 2).all()
        assert result[~overflow].isfinite().all()


@pytest.mark.parametrize("rows, rows_per_ratio", [(64, 8), (64, 32), (64, 64), (99, 33), (96, 32)])
def test_ratios_per_sample_and_column(device: str, rows: int, rows_per_ratio: int) -> None:
    """Blocks that straddle samples (8, 33) and blocks that do not take different loads.

    With samples of 32 a block of 64 rows, half of it padding, starts in the last sample.
    """
    x = cases.adversarial(rows, 64, torch.float16).to(device)
    ratio = torch.rand(rows // rows_per_ratio, 64) + 0.5
    got, _ = run_kernel(
        x,
        "rescaled_magnitude",
        layouts.PLAIN,
        "features",
        ratios={False: ratio},
        rows_per_ratio=rows_per_ratio,
    )
    ratios = {False: ratio.repeat_interleave(rows_per_ratio, 0)}
    want = expected(x, "rescaled_magnitude", layouts.PLAIN, False, ratios)
    assert cases.same_bits(got[False].buffer.cpu(), want.buffer)


@pytest.mark.parametrize("tile", [variants.Tile(16, 16, 1), variants.Tile(128, 32, 4)])
@pytest.mark.parametrize("method", ["random", "mvue"])
def test_draws_do_not_depend_on_the_tile(
    device: str, method: str, tile: variants.Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = cases.adversarial(32, 32, torch.float16).to(device)
    usual, _ = run_kernel(x, method, layouts.PLAIN, "both")
    monkeypatch.setattr(launch, "choose_tile", lambda *_: tile)
    launch.prepare_pack.cache_clear()
    other, _ = run_kernel(x, method, layouts.PLAIN, "both")
    launch.prepare_pack.cache_clear()
    for transposed in (False, True):
        assert cases.same_bits(usual[transposed].buffer, other[transposed].buffer)


@pytest.mark.parametrize("method", ["random", "mvue"])
def test_seeds_in_memory_draw_as_the_same_seeds_given(device: str, method: str) -> None:
    x = cases.adversarial(48, 64, torch.float16).to(device)
    given, _ = run_kernel(x, method, layouts.PLAIN, "both")
    read, _ = run_kernel(x, method, layouts.PLAIN, "both", in_memory=True)
    for transposed in (False, True):
        assert cases.same_bits(given[transposed].buffer, read[transposed].buffer)


@pytest.mark.parametrize("rows, cols", [(33, 44), (48, 36)])
@pytest.mark.parametrize("where", ["width", "stride", "address"])
def test_what_is_not_whole_octets_is_copied_once(
    device: str, rows: int, cols: int, where: str
) -> None:
    base = cases.adversarial(rows, 80, torch.bfloat16).to(device)
    x = {
        "width": base[:, :cols],
        "stride": base.flatten()[: rows * (cols + 3)].view(rows, -1)[:, :40],
        "address": base[:, 2:42],
    }[where]
    assert not launch.is_aligned(x)
    copy = launch.aligned(x)
    assert launch.is_aligned(copy) and launch.aligned(copy) is copy
    assert cases.same_bits(copy[:, : x.shape[1]], x)
    assert not copy[:, x.shape[1] :].any()
    got, _ = run_kernel(x, "mvue", layouts.PLAIN, "both")
    for transposed, packed in got.items():
        want = expected(x, "mvue", layouts.PLAIN, transposed, {})
        assert cases.same_bits(packed.buffer.cpu(), want.buffer)


def test_row_blocks_are_split_over_two_axes_and_those_beyond_the_end_do_nothing(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert starting.grid_of((70_000 * 64, 100), 64, 64) == (2, 35_000, 2)
    monkeypatch.setattr(starting, "_MAX_GRID", 2)
    launch.prepare_pack.cache_clear()
    x = cases.adversarial(150, 64, torch.float16).to(device)
    ratios = some_ratios(150, 64)
    got, sums = run_kernel(x, "rescaled_magnitude", layouts.PLAIN, "both", ratios=ratios)
    total, _ = ratios_of.abs_sums(x, False, 30)
    launch.prepare_pack.cache_clear()
    for transposed, packed in got.items():
        want = expected(x, "rescaled_magnitude", layouts.PLAIN, transposed, ratios)
        assert cases.same_bits(packed.buffer.cpu(), want.buffer)
    assert sums is not None and sums.shape[0] == 4
    assert total.shape == (5, 64)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("n", [2, 1])
@pytest.mark.parametrize("dtype", cases.FLOAT_DTYPES)
def test_abs_sums(device: str, transpose: bool, samples: int, n: int, dtype: torch.dtype) -> None:
    x = torch.randn(80, 72).to(dtype).to(device)
    x[:, 8:16] = x[:, 8:16].sign()  # ties
    per_sample = 80 if transpose else 80 // samples
    total, kept = ratios_of.abs_sums(x, transpose, per_sample, n)
    operand = x.cpu().t() if transpose else x.cpu()
    pruned = pack_operand(operand, layouts.PLAIN, n=n).unpack()
    groups = 1 if transpose else samples
    for got, source in ((total, operand), (kept, pruned)):
        want = source.double().abs().view(groups, -1, operand.shape[1]).sum(1)
        bound = operand.shape[0] * torch.finfo(torch.float32).eps * want
        assert (got.cpu().double().view_as(want) - want).abs().le(bound).all()


@pytest.mark.parametrize("features", [None, "magnitude", "rescaled_magnitude"])
@pytest.mark.parametrize("tokens", [None, "mvue", "rescaled_magnitude"])
def test_pack_gradient_runs_the_same_through_kernel_and_reference(
    device: str, features: str | None, tokens: str | None
) -> None:
    x = torch.randn(96, 80).half().to(device)

    def run(backend: str) -> PackedGradient:
        torch.manual_seed(11)
        return pack_gradient(
            x,
            features=features,
            tokens=tokens,
            column_sums=True,
            tokens_per_sample=32,
            backend=backend,
        )

    kernel, reference = run("triton"), run("reference")
    assert kernel.column_sums is not None and reference.column_sums is not None
    torch.testing.assert_close(kernel.column_sums, reference.column_sums)
    for a, b in ((kernel.features, reference.features), (kernel.tokens, reference.tokens)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            # Ratios are sums in different orders: an ulp of the dtype apart at most.
            torch.testing.assert_close(a.unpack(), b.unpack(), rtol=2**-10, atol=0)
            assert cases.same_bits(a.metadata, b.metadata)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31(device: str) -> None:
    if device != "cuda":
        pytest.skip("four gigabytes are for a GPU")
    x = torch.randn(2**16 + 16, 2**15, device=device, dtype=torch.bfloat16)
    got, _ = run_kernel(x, "magnitude", layouts.BLOCKED, "features")
    dense = got[False].unpack()
    tail = slice(-64, None)
    assert torch.equal(dense[tail].cpu(), oracle.prune_magnitude(x[tail].cpu()))


@pytest.mark.gpu
def test_a_cuda_graph_draws_anew_at_each_replay(device: str) -> None:
    if device != "cuda":
        pytest.skip("graphs are captured on a GPU")
    from sdgp_cusparselt.packing.pack import pack

    x = torch.randn(256, 256, device=device).bfloat16()
    pack(x, method="random")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = pack(x, method="random")
    graph.replay()
    first = packed.buffer.clone()
    graph.replay()
    assert not torch.equal(first, packed.buffer)
