"""Through the binding, the emulator multiplies right, and only with metadata in its order."""

import itertools

import pycusparselt as cslt
import pytest
import torch
from pycusparselt import ComputeType, DataType, MatmulDescAttribute, Operation, Order
from pycusparselt import cusparselt as capi

from tests.bindings.problem import TORCH, Case, Problem, random_matrix
from tests.emulator.control import LAYOUTS, Emulator

OPS = (Operation.N, Operation.T)
ORDERS = (Order.ROW, Order.COL)


@pytest.mark.parametrize("sparse_is_a", [True, False], ids=["sparse=A", "sparse=B"])
@pytest.mark.parametrize("dtype", [DataType.R_16BF, DataType.R_16F], ids=["bf16", "fp16"])
def test_16_bit_in_every_order_and_op(
    handle: cslt.Handle, dtype: DataType, sparse_is_a: bool
) -> None:
    orders = itertools.product(OPS, OPS, ORDERS, ORDERS, ORDERS)
    for op_a, op_b, order_a, order_b, order_d in orders:
        case = Case(
            dtype=dtype,
            op_a=op_a,
            op_b=op_b,
            order_a=order_a,
            order_b=order_b,
            order_d=order_d,
            sparse_is_a=sparse_is_a,
            ld_extra=16,
        )
        Problem(handle, case).assert_right()


@pytest.mark.parametrize("out", [DataType.R_8I, DataType.R_32I, DataType.R_16F, DataType.R_16BF])
def test_int8(handle: cslt.Handle, out: DataType) -> None:
    case = Case(
        m=64,
        n=48,
        k=96,
        dtype=DataType.R_8I,
        out_dtype=out,
        order_b=Order.COL,
        compute_type=ComputeType.COMPUTE_32I,
    )
    problem = Problem(handle, case)
    if out == DataType.R_32I:
        problem.assert_right()
        return
    alpha = 2.0**-10  # brings the sums into the range of the small types, exactly
    exact = alpha * problem.expected()
    if out == DataType.R_8I:
        exact = exact.round().clamp(-128, 127)
    assert torch.equal(problem.run(alpha), exact.to(TORCH[out]))


@pytest.mark.parametrize("dtype", [DataType.R_8F_E4M3, DataType.R_8F_E5M2])
@pytest.mark.parametrize("out", [DataType.R_16BF, DataType.R_32F, DataType.R_8F_E4M3])
def test_fp8_on_sm90(
    emulator: Emulator, handle: cslt.Handle, dtype: DataType, out: DataType
) -> None:
    emulator.arch(90)
    c_dtype = DataType.R_16BF if out == DataType.R_8F_E4M3 else None
    case = Case(dtype=dtype, out_dtype=out, c_dtype=c_dtype, order_b=Order.COL)
    Problem(handle, case).assert_right()


@pytest.mark.parametrize("shape", [(16, 8, 16), (48, 40, 80), (144, 24, 208), (384, 16, 64)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_odd_shapes(
    emulator: Emulator, handle: cslt.Handle, layout: str, shape: tuple[int, int, int]
) -> None:
    emulator.layout(layout, seed=5)
    m, n, k = shape
    problem = Problem(handle, Case(m=m, n=n, k=k))
    problem.assert_right()
    by_plan, turned = -(-m // 32) * 32 * -(-k // 64) * 64, -(-m // 64) * 64 * -(-k // 32) * 32
    tiles = turned if layout in ("sm90_atom", "sm90_published") else 0  # of 64 x 32
    metadata = max(by_plan, tiles) // 8
    assert problem.compressed.numel() == m * k + metadata
    assert problem.scratch.numel() == problem.plan.workspace_size == metadata
    bare = max(by_plan, turned) // 8
    assert problem.matmul.a.compressed_size() == (m * k + bare, bare)
    emulator.full_sizes()
    assert problem.plan.compressed_size() == (m * k + bare, bare)


def test_the_documented_size_of_a_small_matrix(handle: cslt.Handle) -> None:
    with cslt.MatDescriptor.structured(handle, 16, 16, dtype=DataType.R_16F) as a:
        assert a.compressed_size() == (16 * 16 + 256, 256)


def test_metadata_in_another_order_gives_wrong_numbers(
    emulator: Emulator, handle: cslt.Handle
) -> None:
    case = Case(m=256, n=32, k=128)
    emulator.layout("plain")
    packed_plain = Problem(handle, case)
    emulator.layout("blocked")
    reads_blocked = Problem(handle, case)
    reads_blocked.assert_right()
    reads_blocked.compressed.copy_(packed_plain.compressed)
    reads_blocked.a, reads_blocked.b_memory = packed_plain.a, packed_plain.b_memory
    reads_blocked.b = packed_plain.b
    with pytest.raises(AssertionError, match="beyond the bound"):
        reads_blocked.assert_right()


def test_plain_and_blocked_agree_at_128_rows_and_differ_from_256(emulator: Emulator) -> None:
    same = [emulator.layout_addresses(name, 128, 128) for name in ("plain", "blocked")]
    other = [emulator.layout_addresses(name, 256, 128) for name in ("plain", "blocked")]
    assert same[0] == same[1]
    assert other[0] != other[1]


def word_address(name: str, rows: int, r: int, c: int) -> int:
    """The published word formulas for 16-bit data, written down a second time."""
    in32 = (r % 8) * 8 + ((r // 16) % 2) * 4 + ((c // 16) % 2) * 2 + ((r // 8) % 2)
    if name == "plain":
        return (c // 32) * (2 * rows) + (r // 32) * 64 + in32
    if name == "blocked":
        column_tile = (c // 64) * 512 * (rows // 128) + ((c % 64) // 32) * 256
        return (r // 128) * 512 + ((r % 128) // 32) * 64 + column_tile + in32
    atom = ((r // 8) % 2) + (r % 8) * 2 + ((c // 16) % 2) * 16 + ((r // 16) % 4) * 32
    return (r // 64) * 128 + (c // 32) * (rows // 64) * 128 + atom


@pytest.mark.parametrize("name", ["plain", "blocked", "sm90_atom"])
def test_layouts_follow_the_published_formulas(emulator: Emulator, name: str) -> None:
    rows, cols = 512, 192
    expected = [
        word_address(name, rows, r, 4 * g) * 4 + g % 4
        for r in range(rows)
        for g in range(cols // 4)
    ]
    assert emulator.layout_addresses(name, rows, cols) == expected


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(128, 128), (512, 256), (144, 208), (384, 320)])
def test_every_layout_is_injective_and_stays_inside(
    emulator: Emulator, name: str, shape: tuple[int, int]
) -> None:
    rows, cols = shape
    addresses = emulator.layout_addresses(name, rows, cols, seed=3)
    nibbles = (
        2
        * max(-(-rows // 32) * 32 * -(-cols // 64) * 64, -(-rows // 64) * 64 * -(-cols // 32) * 32)
        // 8
    )
    assert len(set(addresses)) == len(addresses)
    assert min(addresses) == 0
    assert max(addresses) < nibbles


def test_random_layouts_differ_by_seed_and_repeat(emulator: Emulator) -> None:
    drawn = [tuple(emulator.layout_addresses("random", 128, 64, seed)) for seed in (1, 2, 1)]
    assert drawn[0] != drawn[1]
    assert drawn[0] == drawn[2]


def test_groups_with_fewer_than_two_non_zeros(handle: cslt.Handle) -> None:
    groups = torch.tensor(
        [[5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0], [0, 0, 0, 5], [0, 0, 0, 0], [0, 5, 0, 6]]
    )
    pairs = [(0, 3), (1, 3), (2, 3), (2, 3), (2, 3), (1, 3)]
    problem = Problem(handle, Case(m=32, n=8, k=32))
    dense = torch.zeros(32, 32)
    dense[0, :24] = groups.flatten()
    memory = dense.to(torch.bfloat16)
    compressed = problem.compressed
    problem.plan.compress(memory.data_ptr(), compressed.data_ptr(), problem.scratch.data_ptr())
    values = compressed[: 32 * 32].view(torch.bfloat16).view(32, 16)[0]
    metadata = compressed[32 * 32 :]
    # Row 0 of the plain order: words 0 and 2, four groups each, first group in the low nibble.
    nibbles = [int(metadata[i // 2]) >> (4 * (i % 2)) & 15 for i in (0, 1, 2, 3, 8, 9)]
    assert nibbles == [i0 | i1 << 2 for i0, i1 in pairs]
    expected = [float(groups[g][i]) for g, pair in enumerate(pairs) for i in pair]
    assert values[:12].tolist() == expected


def test_alpha_beta_and_bias(handle: cslt.Handle) -> None:
    problem = Problem(handle, Case(m=32, n=24, k=32, dtype=DataType.R_16F))
    bias = random_matrix(32, 1, DataType.R_16F)
    problem.matmul.set(MatmulDescAttribute.BIAS_POINTER, bias.data_ptr())
    problem.d_memory.fill_(3.0)
    got = problem.run(alpha=0.5, beta=2.0)
    expected = 0.5 * problem.expected() + 6.0 + bias.double()
    slack = problem.bound(0.5) + 2.0**-11 * expected.abs()
    assert ((got.double() - expected).abs() <= slack).all()


def test_relu_clips_from_both_sides(handle: cslt.Handle) -> None:
    problem = Problem(handle, Case(m=32, n=24, k=32))
    plain = problem.run().clone()
    problem.matmul.set(MatmulDescAttribute.ACTIVATION_RELU, 1)
    problem.matmul.set(MatmulDescAttribute.ACTIVATION_RELU_UPPERBOUND, 2.0)
    assert torch.equal(problem.run(), plain.clamp(0.0, 2.0))


def test_alpha_vector_scales_rows_of_int8(lib: cslt.Library, handle: cslt.Handle) -> None:
    case = Case(
        m=32,
        n=16,
        k=32,
        dtype=DataType.R_8I,
        out_dtype=DataType.R_32I,
        order_b=Order.COL,
        compute_type=ComputeType.COMPUTE_32I,
    )
    problem = Problem(handle, case)
    problem.matmul.set(MatmulDescAttribute.ALPHA_VECTOR_SCALING, 1)
    alpha, beta = torch.arange(32.0), torch.zeros(1)
    a, b, d = problem.pointers()
    addresses = (handle.address, problem.plan.address, alpha.data_ptr(), a, b, beta.data_ptr())
    capi.matmul(lib, *addresses, d, d, 0, 0, 0)
    assert torch.equal(problem.result().double(), alpha.double()[:, None] * problem.expected())


def test_batches(handle: cslt.Handle) -> None:
    m, n, k, batches = 32, 24, 32, 3
    single = [Problem(handle, Case(m=m, n=n, k=k)) for _ in range(batches)]
    first = single[0].matmul
    for matrix, size in ((first.a, m * k), (first.b, k * n), (first.c, m * n)):
        matrix.set(cslt.MatDescAttribute.NUM_BATCHES, batches)
        matrix.set(cslt.MatDescAttribute.BATCH_STRIDE, size)
        assert matrix.get(cslt.MatDescAttribute.BATCH_STRIDE) == size
    plan = cslt.MatmulPlan(handle, first, single[0].alg)
    a = torch.stack([p.a_memory for p in single])
    b = torch.stack([p.b_memory for p in single])
    d = torch.zeros(batches, m, n, dtype=torch.bfloat16)
    size, scratch = plan.compressed_size()
    packed, buffer = torch.empty(size, dtype=torch.uint8), torch.empty(scratch, dtype=torch.uint8)
    plan.compress(a.data_ptr(), packed.data_ptr(), buffer.data_ptr())
    plan.matmul(1.0, packed.data_ptr(), b.data_ptr(), 0.0, d.data_ptr(), d.data_ptr())
    for i, problem in enumerate(single):
        assert ((d[i].double() - problem.expected()).abs() <= problem.bound()).all()
