"""What a card was seen to answer: cuSPARSELt 0.10.0 on sm86, as measured by third parties.

Statuses are the library's: 0 success, 3 invalid value, 7 internal error, 10 not supported. Each
entry of FACTS is a question that :mod:`tests.emulator.questions` asks. Nobody of this project has
seen the card; what no card was asked is in README.md beside this file.
"""

from __future__ import annotations

from itertools import product

Answer = object

#: A 2:4 operand [rows, cols] row-major in a plan with 64 dense columns: bytes of the compressed
#: operand, of Compress's scratch, of the workspace.
SIZES = {
    ("bf16", 16, 16): (512, 256, 256),
    ("bf16", 16, 32): (768, 256, 256),
    ("bf16", 16, 64): (1280, 256, 256),
    ("bf16", 32, 32): (1280, 256, 256),
    ("bf16", 32, 96): (3584, 512, 512),
    ("bf16", 48, 48): (2816, 512, 512),
    ("bf16", 64, 64): (4608, 512, 512),
    ("bf16", 64, 128): (9216, 1024, 1024),
    ("bf16", 64, 256): (18432, 2048, 2048),
    ("bf16", 64, 512): (36864, 4096, 4096),
    ("bf16", 96, 64): (6912, 768, 768),
    ("bf16", 128, 128): (18432, 2048, 2048),
    ("bf16", 256, 128): (36864, 4096, 4096),
    ("i8", 32, 32): (2560, 1024, 1024),
    ("i8", 64, 64): (4096, 1024, 1024),
    ("i8", 64, 128): (6144, 1024, 1024),
    ("i8", 64, 256): (12288, 2048, 2048),
    ("i8", 96, 64): (7168, 2048, 2048),
    ("i8", 128, 128): (12288, 2048, 2048),
}

#: Element types of A and B, of C and D, and accumulation, that MatmulDescriptorInit takes; the
#: last column is what AlgSelectionInit says. All other combinations are refused with 10.
TYPES = {
    **{("i8", cd, "32I"): 0 for cd in ("f16", "bf16", "i8", "i32")},
    ("f16", "f16", "32F"): 0,
    ("bf16", "bf16", "32F"): 0,
    ("f16", "f16", "16F"): 10,
    **{(ab, cd, "32F"): 10 for ab in ("e4m3", "e5m2") for cd in ("f16", "bf16", "f32")},
}

ERROR_STRINGS = {
    0: "success",
    1: "initialization error",
    2: "out of memory",
    3: "invalid value",
    4: "architecture mismatch",
    5: "texture memory mapping error",
    6: "kernel launch failure",
    7: "internal error",
    8: "matrix type not supported",
    9: "zero pivot",
    10: "operation not supported",
    11: "insufficient resources",
}

_DESCRIPTORS = {
    "dense f16 8x128": 0,
    "dense f16 4x128": 10,
    "structured f16 8x128": 10,
    "structured f16 16x128": 0,
    "structured i8 48x128": 10,
    "dense f32 4x128": 0,
    "structured f32 4x128": 10,
    "dense f64 64x128": 3,
    "dense u8 64x128": 3,
    "dense f16, ld 136": 0,
    "dense f16, ld 132": 10,
    "dense f16, ld 127": 3,
    "dense f16, column order, ld too small": 3,
    "dense f16, alignment 0": 10,
    "dense f16, alignment 8": 10,
    "dense f16, alignment 24": 10,
    "dense f16, alignment 256": 0,
    "dense f16, no rows": 3,
    "dense f16, order 3": 3,
    "structured f16, sparsity 1": 3,
    "no handle": 3,
    "no descriptor": 3,
    "default batches": (0, 1),
    "default batch stride, row 64x64": (0, 4096),
    "default batch stride, column 64x32": (0, 2048),
    "set batches 3": 0,
    "set batches 0": 3,
    **{f"set stride {value}": 0 for value in (0, 4096, 4104, 8192)},
    **{f"set stride {value}": 3 for value in (100, 4095, -8)},
    "get attribute 2": 3,
}

_ATTRIBUTES = {
    "default RELU": (0, 0),
    "default RELU_UPPERBOUND": (0, 3.4028234663852886e38),
    "default GELU_SCALING": (0, 1.0),
    "default BIAS_STRIDE": (0, 0),
    "default BIAS_POINTER": (0, None),
    "get RELU, wrong size": 3,
    "get attribute 20": 3,
    "set RELU 2, get it": (0, 1),
    "set GELU on f16": 3,
    "set GELU_SCALING on f16": 3,
    "set ALPHA_VECTOR on f16": 0,
    "set BIAS_STRIDE -5": 3,
    "set BIAS_POINTER, no data": 3,
    "set SPARSE_MAT_POINTER, get it": (0, 7),
    "scale modes 0 on f16: selection, plan": (0, 0),
    "scale modes 1 on f16: selection, plan": (0, 0),
    "scale modes 2 on f16: selection, plan": (10, None),
}

_PROBLEMS = {
    "as it should be": 0,
    "ld of D differs from C": 10,
    "order of D differs from C": 10,
    "inner dimensions differ": 3,
    "none structured": 3,
    "both structured": 3,
    "operation 2": 3,
    "compute type 7": 3,
    "no A": 3,
    "no D": 3,
    "batches differ": 3,
}

_ALGORITHMS = {
    "defaults: id, count, iterations, split_k, mode, buffers": (0, 4, 5, 1, 1, 0),
    **{f"set id {value}": status for value, status in ((3, 0), (4, 3), (-1, 3))},
    "set count 1": 3,
    "set iterations 0": 0,
    "set iterations 100": 0,
    "set split_k 0": 3,
    "set split_k 65": 0,
    **{f"set mode {value}": status for value, status in ((0, 3), (2, 0), (3, 3))},
    "set buffers -1": 3,
    "get id, wrong size": 3,
    "get attribute 6": 3,
    "algorithm 1": 3,
    "destroy nothing": (3, 3),
}

_CALLS = {
    "CompressedSize, no size": 3,
    "CompressedSize, no buffer size": 3,
    "Compress, no scratch": 0,
    "Compress, no input": 3,
    "Compress, no output": 3,
    "GetWorkspace, no size": 3,
    "Matmul, no workspace": 0,
    "Matmul, no streams": 0,
    **{f"Matmul, no {name}": 3 for name in ("alpha", "A", "B", "beta", "C", "D")},
    "Matmul, -1 streams": 3,
    "Matmul, one stream that is not given": 3,
    "Prune, algorithm 2": 3,
    "Prune, no input": 3,
    "PruneCheck, no result": 3,
    "Prune2, operation 2": 3,
}

_LIBRARY = {
    "Init, no handle": 3,
    "GetVersion": (0, 1000),
    "GetVersion, no handle": 3,
    "GetProperty 3": 3,
    "Init, Destroy, Destroy": (0, 0, 3),
    "descriptor of a zeroed handle": 3,
    "GetErrorName 12": "unrecognized error code",
}


def _types() -> dict[str, Answer]:
    """Every combination on 64^3, all row-major: (MatmulDescriptorInit, AlgSelectionInit)."""
    inputs = ("i8", "f16", "bf16", "e4m3", "e5m2", "e2m1")
    outputs = ("f16", "bf16", "f32", "i8", "i32", "e4m3", "e5m2")
    found: dict[str, Answer] = {}
    for ab, cd, compute, op in product(inputs, outputs, ("32F", "16F", "32I"), OPERATIONS):
        refused = (ab, cd, compute) not in TYPES or not _takes(ab, "RR", op)
        name = f"{ab} to {cd} in {compute}, {op}"
        found[name] = (10, None) if refused else (0, TYPES[ab, cd, compute])
    return found


def _orders() -> dict[str, Answer]:
    """Every order of A, B and of C with D, and every operation: as in _types."""
    usual = {"f16": ("f16", "32F"), "i8": ("i32", "32I"), "e4m3": ("bf16", "32F")}
    found: dict[str, Answer] = {}
    for ab, orders, op in product(usual, ORDERS, OPERATIONS):
        cd, compute = usual[ab]
        taken = _takes(ab, orders, op)
        found[f"{ab}, {orders}, {op}"] = (0, TYPES[ab, cd, compute]) if taken else (10, None)
    return found


OPERATIONS = ("NN", "NT", "TN", "TT")
ORDERS = tuple("".join(three) for three in product("RC", repeat=3))


def _takes(ab: str, orders: str, op: str) -> bool:
    """16-bit operands lie as they like, 8-bit ones with the reduced dimension contiguous."""
    a_contiguous = (orders[0] == "R") == (op[0] == "N")
    b_contiguous = (orders[1] == "R") == (op[1] == "T")
    return ab in ("f16", "bf16") or (a_contiguous and b_contiguous)


FACTS: dict[str, Answer] = {
    **_LIBRARY,
    **{f"GetErrorString {status}": text for status, text in ERROR_STRINGS.items()},
    **_DESCRIPTORS,
    **_types(),
    **_orders(),
    **{f"sizes of {dtype} {r}x{c}": answer for (dtype, r, c), answer in SIZES.items()},
    **_ATTRIBUTES,
    **_PROBLEMS,
    **_ALGORITHMS,
    **_CALLS,
}
