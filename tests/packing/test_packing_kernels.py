"""The Triton kernels against the reference, bit for bit, on outputs that start as garbage."""

import packing_cases as cases
import packing_oracle as oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdgp_cusparselt.packing import launch
from sdgp_cusparselt.packing import layout as layouts
from sdgp_cusparselt.packing.layout import MetadataLayout, padded_shape
from sdgp_cusparselt.packing.pack import METHODS, PackedGradient, pack_gradient
from sdgp_cusparselt.packing.packed import Packed24
from sdgp_cusparselt.packing.reference import Draws, pack_operand

SEEDS = torch.tensor([0x1234_5678_9ABC_DEF0, -(2**62) + 12345])
# Three bits of a word are at home in a block of the first. In the second, the two nibbles of a
# byte are 32 rows apart, further than a block of the one-direction kernel is high.
SCATTERED = MetadataLayout(
    "scattered", (2, 4, 8, 16, 32, 1), (64, 128), "groups", region=((64, 16),)
)
ODD_LAYOUTS = (cases.random_layout(3, 5, 3, "groups"), SCATTERED)
LAYOUTS = (*layouts.NAMED.values(), *ODD_LAYOUTS)


def run_kernel(
    x: torch.Tensor,
    method: str,
    layout: MetadataLayout,
    directions: str,
    ratio: torch.Tensor | None = None,
    rows_per_ratio: int | None = None,
    poison: int = 0x5A,
    n: int = 2,
    in_memory: bool = False,
) -> tuple[dict[bool, Packed24], torch.Tensor | None]:
    """Launch on outputs filled with a byte that packing does not write by chance alone.

    ratio: [samples, K] along features, [M] along tokens.
    """
    read = launch.aligned(x)
    ways = {False: directions != "tokens", True: directions != "features"}
    prepared = launch.prepare_pack(
        (x.shape[0], x.shape[1]),
        read.stride(0),
        x.dtype,
        x.device,
        features=method if ways[False] else None,
        tokens=method if ways[True] else None,
        features_layout=layout,
        tokens_layout=layout,
        n=n,
        column_sums=directions == "both",
        rows_per_ratio=rows_per_ratio,
        seeds_in_memory=in_memory,
    )
    sizes = {False: prepared.features_nbytes, True: prepared.tokens_nbytes}
    buffers = {
        way: torch.full((sizes[way],), poison, dtype=torch.uint8, device=x.device)
        for way in ways
    }
    sums = None
    if prepared.sums_shape is not None:
        sums = torch.full(prepared.sums_shape, torch.nan, device=x.device)
    seeds = SEEDS.to(x.device)
    # Beyond the width of x the ratio is never used, and is not there.
    wide = torch.nn.functional.pad(ratio, (0, prepared.width - x.shape[1])) if ratio is not None and ratio.ndim == 2 else None
    if wide is not None:
        wide = wide.contiguous()
    with launch.on_device(x.device):
        prepared(
            read.data_ptr(),
            buffers[False].data_ptr(),
            buffers[True].data_ptr(),
            0 if in_memory else int(SEEDS[0]),
            0 if in_memory else int(SEEDS[1]),
            launch.current_stream(x.device),
            seeds=seeds.data_ptr() if in_memory else 0,
            features_ratio=0 if wide is None else wide.data_ptr(),
            tokens_ratio=0 if ratio is None or ratio.ndim == 2 else ratio.data_ptr(),
            sums=0 if sums is None else sums.data_ptr(),
        )
    shape = (x.shape[0], x.shape[1])
    return {
        way: Packed24(buffers[way], shape[::-1] if way else shape, x.dtype, layout, way)
        for way in ways
        if ways[way]
    }, None if sums is None else sums[:, : x.shape[1]]


def expected(
    x: torch.Tensor,
    method: str,
    layout: MetadataLayout,
    transposed: bool,
    ratio: torch.Tensor | None,
) -> Packed24:
    operand = x.cpu().t() if transposed else x.cpu()
    if ratio is not None:
        ratio = ratio.t() if transposed else ratio
    draws = Draws(SEEDS, int(transposed))
    return pack_operand(operand, layout, method=method, ratio=ratio, draws=draws)


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
    dtype: torch.dtype,
    layout: MetadataLayout,
    directions: str,
) -> None:
    cols = 4 * groups
    if not fits(layout, rows, cols):
        layout = layouts.PLAIN
    wide = cases.adversarial(rows, cols + extra, dtype, seed).to(device)
    x = wide[:, :cols]  # rows lie further apart than they are wide
    ratio = None
    if method == "rescaled_magnitude":
        ratio = torch.rand(1, cols, generator=torch.Generator().manual_seed(seed)) + 0.5
    placed = None if ratio is None else ratio.to(device)
    got, sums = run_kernel(x, method, layout, directions, placed, rows)
    for transposed, packed in got.items():
        want = expected(x, method, layout, transposed, ratio)
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
    [(layout, "magnitude") for layout in LAYOUTS] + [(layouts.PLAIN, m) for m in METHODS],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_byte_is_written(device: str, layout: MetadataLayout, method: str) -> None:
    """Whatever the outputs held before makes no difference."""
    x = cases.adversarial(100, 60, torch.bfloat16).to(device)
    if method == "none":
        x = oracle.prune_magnitude(x.cpu()).to(device)
    ratio = torch.rand(1, 60, device=device) + 0.5 if method == "rescaled_magnitude" else None
    directions = "features" if method == "none" else "both"
    if not fits(layout, 100, 60):
        directions = "features"
    if layout is SCATTERED:
        table = launch.layout_table(layout, 32, 16, 512)
        assert table[1] == 0  # or this layout would not test the atomic path
        directions = "features"
    first, second = (
        run_kernel(x, method, layout, directions, ratio, 100, poison)[0] for poison in (0, 255)
    )
    for transposed, packed in first.items():
        assert cases.same_bits(packed.buffer, second[transposed].buffer)
        want = expected(x, method, layout, transposed, None if ratio is None else ratio.cpu())
        assert cases.same_bits(packed.buffer.cpu(), want.buffer)


@pytest.mark.parametrize("method", ["random", "mvue"])
@pytest.mark.parametrize("dtype", cases.FLOAT_DTYPES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_overflow_is_kept_in_both_directions(
    device: str, method: str, dtype: torch.dtype, value: float
) -> None:
    """One to four of them in a group, at every place: the first two stay, with their bits."""
    x = torch.randn(64, 64).to(dtype)
    rows, cols = torch.arange(64)[:, None], torch.arange(64)[None, :]
    x[(rows * 7 + cols * 3) % 5 == 0] = value
    largest = torch.finfo(dtype).max
    x[(rows + cols) % 11 == 3] = largest
    got, _ = run_kernel(x.to(device), method, layouts.PLAIN, "both")
    for transposed, packed in got.items():
        operand = x.t().contiguous() if transposed else x
        overflow = (~operand.isfinite()).view(64, 16, 4).any(-1)
        want = oracle.prune_magnitude(operand).view(64, 16, 4)
        result = packed.unpack().cpu().view(64, 16, 4)
        assert 0 < overflow.sum() < overflow.numel()
        assert cases.same_bits(result[overflow], want[overflow])
        assert not cases.same_bits(result[~overflow], want[~overflow])


@pytest.mark.parametrize("rows_per_ratio", [8, 32, 64])
def test_ratios_per_sample_and_column(device: str, rows_per_ratio: int) -> None:
    """Blocks that straddle samples (8) and blocks that do not take different loads."""
    x = cases.adversarial(64, 96, torch.float16).to(device)
    ratio = torch.rand(64 // rows_per_ratio, 96) + 0.5
    got, _ = run_kernel(
        x, "rescaled_magnitude", layouts.PLAIN, "features", ratio.to(device), rows_per_ratio
    )
    want = expected(
        x, "rescaled_magnitude", layouts.PLAIN, False, ratio.repeat_interleave(rows_per_ratio, 0)
    )
    assert cases.same_bits(got[False].buffer.cpu(), want.buffer)


@pytest.mark.parametrize("tile", [launch.Tile(16, 16, 1), launch.Tile(64, 32, 4)])
@pytest.mark.parametrize("method", ["random", "mvue"])
def test_draws_do_not_depend_on_the_tile(
    device: str, method: str, tile: launch.Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = cases.adversarial(64, 64, torch.float16).to(device)
    usual, _ = run_kernel(x, method, layouts.PLAIN, "both")
    monkeypatch.setattr(launch, "choose_tile", lambda *_: tile)
    other, _ = run_kernel(x, method, layouts.PLAIN, "both")
    for transposed in (False, True):
        assert cases.same_bits(usual[transposed].buffer, other[transposed].buffer)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("samples", [1, 4])
def test_abs_sums(device: str, transpose: bool, samples: int) -> None:
    x = torch.randn(80, 72).bfloat16().to(device)
    per_sample = 80 if transpose else 80 // samples
    total, kept = launch.launch_abs_sums(x, transpose, per_sample)
    operand = x.cpu().t() if transpose else x.cpu()
    pruned = oracle.prune_magnitude(operand)
    groups = 1 if transpose else samples
    for got, source in ((total, operand), (kept, pruned)):
        want = source.double().abs().view(groups, -1, operand.shape[1]).sum(1)
        bound = operand.shape[0] * torch.finfo(torch.float32).eps * want
        assert got.shape == want.shape
        assert (got.cpu().double() - want).abs().le(bound).all()


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
