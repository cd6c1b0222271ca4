"""Ask a library the questions of :mod:`tests.emulator.card`, through the C functions alone."""

from __future__ import annotations

import ctypes
from typing import Any

import pycusparselt as cslt
import torch
from pycusparselt import cusparselt as capi
from pycusparselt.abi import OpaqueStorage

from tests.emulator.card import ERROR_STRINGS, OPERATIONS, ORDERS, SIZES, TYPES, Answer

NUMBER = {"f32": 0, "f64": 1, "f16": 2, "i8": 3, "u8": 8, "i32": 10, "bf16": 14}
NUMBER |= {"e4m3": 28, "e5m2": 29, "e2m1": 33}
COMPUTE = {"32I": 0, "16F": 1, "32F": 2}
ORDER, OPERATION = {"C": 1, "R": 2}, {"N": 0, "T": 1}
INT, LONG, FLOAT, POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

Asked = dict[str, Answer]


class Asker:
    """A library and one handle of it; every call returns the status and raises nothing."""

    def __init__(self, library: cslt.Library) -> None:
        self.library, self.handle = library, OpaqueStorage()
        self.alive: list[tuple[str, OpaqueStorage]] = []
        self("Init", self.handle)

    def __call__(self, name: str, *arguments: Any) -> Any:
        function = capi.FUNCTIONS["cusparseLt" + name].resolve(self.library)
        return function(*(a.address if isinstance(a, OpaqueStorage) else a for a in arguments))

    def matrix(
        self,
        rows: int,
        cols: int,
        dtype: str,
        order: int = 2,
        *,
        structured: bool = False,
        ld: int | None = None,
        alignment: int = 16,
        sparsity: int = 0,
    ) -> tuple[int, OpaqueStorage]:
        made = OpaqueStorage()
        ld = (cols if order == 2 else rows) if ld is None else ld
        given = (self.handle, made, rows, cols, ld, alignment, NUMBER[dtype], order)
        if structured:
            status = self("StructuredDescriptorInit", *given, sparsity)
        else:
            status = self("DenseDescriptorInit", *given)
        if status == 0:
            self.alive.append(("MatDescriptorDestroy", made))
        return status, made

    def get(self, function: str, thing: OpaqueStorage, attribute: int, kind: Any = INT) -> Any:
        value = kind()
        size = ctypes.sizeof(value)
        status = self(function, self.handle, thing, attribute, ctypes.addressof(value), size)
        return status, value.value

    def put(
        self, function: str, thing: OpaqueStorage, attribute: int, value: Any, kind: Any = INT
    ) -> Any:
        data = kind(value)
        size = ctypes.sizeof(data)
        return self(function, self.handle, thing, attribute, ctypes.addressof(data), size)

    def matmul(
        self,
        m: int,
        n: int,
        k: int,
        types: tuple[str, str, str],
        op: str = "NN",
        orders: str = "RRR",
    ) -> tuple[int, OpaqueStorage, list[OpaqueStorage]]:
        """Describe [m, k] @ [k, n] with a structured A: status, descriptor, its matrices."""
        ab, cd, compute = types
        a_order, b_order, c_order = (ORDER[letter] for letter in orders)
        a_shape, b_shape = (m, k) if op[0] == "N" else (k, m), (k, n) if op[1] == "N" else (n, k)
        _, a = self.matrix(*a_shape, ab, a_order, structured=True)
        _, b = self.matrix(*b_shape, ab, b_order)
        _, c = self.matrix(m, n, cd, c_order)
        made, operations = OpaqueStorage(), (OPERATION[op[0]], OPERATION[op[1]])
        given = (self.handle, made, *operations, a, b, c, c, COMPUTE[compute])
        return self("MatmulDescriptorInit", *given), made, [a, b, c]

    def selection(self, matmul: OpaqueStorage, algorithm: int = 0) -> tuple[int, OpaqueStorage]:
        made = OpaqueStorage()
        status = self("MatmulAlgSelectionInit", self.handle, made, matmul, algorithm)
        if status == 0:
            self.alive.append(("MatmulAlgSelectionDestroy", made))
        return status, made

    def plan(self, matmul: OpaqueStorage, selection: OpaqueStorage) -> tuple[int, OpaqueStorage]:
        made = OpaqueStorage()
        status = self("MatmulPlanInit", self.handle, made, matmul, selection)
        if status == 0:
            self.alive.append(("MatmulPlanDestroy", made))
        return status, made

    def close(self) -> None:
        """Destroy everything, the youngest first."""
        while self.alive:
            function, thing = self.alive.pop()
            self(function, thing)
        self("Destroy", self.handle)


F16 = ("f16", "f16", "32F")


def ask(library: cslt.Library) -> Asked:
    """Return the answer to every question."""
    answers: Asked = {}
    for section in (
        _library,
        _descriptors,
        _types,
        _sizes,
        _attributes,
        _problems,
        _algorithms,
        _calls,
    ):
        asker = Asker(library)
        answers |= section(asker)
        asker.close()
    return answers


def _library(ask: Asker) -> Asked:
    value, handle = INT(), OpaqueStorage()
    at = ctypes.addressof(value)
    version = ask("GetVersion", ask.handle, at), value.value
    zeroed = (OpaqueStorage(), OpaqueStorage(), 64, 64, 64, 16, NUMBER["f16"], 2)
    texts = {f"GetErrorString {s}": ask("GetErrorString", s).decode() for s in ERROR_STRINGS}
    return texts | {
        "Init, no handle": ask("Init", 0),
        "GetVersion": version,
        "GetVersion, no handle": ask("GetVersion", 0, at),
        "GetProperty 3": ask("GetProperty", 3, at),
        "GetErrorName 12": ask("GetErrorName", 12).decode(),
        "Init, Destroy, Destroy": (
            ask("Init", handle), ask("Destroy", handle), ask("Destroy", handle)
        ),
        "descriptor of a zeroed handle": ask("DenseDescriptorInit", *zeroed),
    }  # fmt: skip


def _descriptors(ask: Asker) -> Asked:
    found: Asked = {}
    for kind, dtype, rows in (
        ("dense", "f16", 8), ("dense", "f16", 4), ("structured", "f16", 8),
        ("structured", "f16", 16), ("structured", "i8", 48), ("dense", "f32", 4),
        ("structured", "f32", 4), ("dense", "f64", 64), ("dense", "u8", 64),
    ):  # fmt: skip
        made = ask.matrix(rows, 128, dtype, structured=kind == "structured")
        found[f"{kind} {dtype} {rows}x128"] = made[0]
    for ld in (136, 132, 127):
        found[f"dense f16, ld {ld}"] = ask.matrix(128, 128, "f16", ld=ld)[0]
    for alignment in (0, 8, 24, 256):
        made = ask.matrix(128, 128, "f16", alignment=alignment)
        found[f"dense f16, alignment {alignment}"] = made[0]
    found["dense f16, column order, ld too small"] = ask.matrix(128, 64, "f16", 1, ld=64)[0]
    found["dense f16, no rows"] = ask.matrix(0, 64, "f16")[0]
    found["dense f16, order 3"] = ask.matrix(64, 64, "f16", 3)[0]
    found["structured f16, sparsity 1"] = ask.matrix(64, 64, "f16", structured=True, sparsity=1)[0]
    usual = (64, 64, 64, 16, NUMBER["f16"], 2)
    found["no handle"] = ask("DenseDescriptorInit", 0, OpaqueStorage(), *usual)
    found["no descriptor"] = ask("DenseDescriptorInit", ask.handle, 0, *usual)
    get, put = "MatDescGetAttribute", "MatDescSetAttribute"
    _, row = ask.matrix(64, 64, "f16", structured=True)
    _, column = ask.matrix(64, 32, "f16", 1)
    found["default batches"] = ask.get(get, row, 0)
    found["default batch stride, row 64x64"] = ask.get(get, row, 1, LONG)
    found["default batch stride, column 64x32"] = ask.get(get, column, 1, LONG)
    found |= {f"set batches {value}": ask.put(put, row, 0, value) for value in (3, 0)}
    for stride in (0, 4096, 4104, 8192, 100, 4095, -8):
        found[f"set stride {stride}"] = ask.put(put, row, 1, stride, LONG)
    return found | {"get attribute 2": ask.get(get, row, 2)[0]}


def _types(ask: Asker) -> Asked:
    inputs = ("i8", "f16", "bf16", "e4m3", "e5m2", "e2m1")
    outputs = ("f16", "bf16", "f32", "i8", "i32", "e4m3", "e5m2")
    found: Asked = {}

    def one(name: str, types: tuple[str, str, str], op: str, orders: str) -> None:
        status, matmul, _ = ask.matmul(64, 64, 64, types, op, orders)
        found[name] = (status, ask.selection(matmul)[0] if status == 0 else None)

    for op in OPERATIONS:
        for ab, cd, compute in ((a, c, t) for a in inputs for c in outputs for t in COMPUTE):
            one(f"{ab} to {cd} in {compute}, {op}", (ab, cd, compute), op, "RRR")
        for ab, (cd, compute) in {
            "f16": ("f16", "32F"), "i8": ("i32", "32I"), "e4m3": ("bf16", "32F")
        }.items():  # fmt: skip
            for orders in ORDERS:
                one(f"{ab}, {orders}, {op}", (ab, cd, compute), op, orders)
    assert {("i8", "i32", "32I"), ("f16", "f16", "32F"), ("e4m3", "bf16", "32F")} <= set(TYPES)
    return found


def _sizes(ask: Asker) -> Asked:
    found: Asked = {}
    for dtype, rows, cols in SIZES:
        eight = dtype == "i8"
        types = ("i8", "i32", "32I") if eight else ("bf16", "bf16", "32F")
        _, matmul, _ = ask.matmul(rows, 64, cols, types, "NT" if eight else "NN")
        _, plan = ask.plan(matmul, ask.selection(matmul)[1])
        sizes = [ctypes.c_size_t() for _ in range(3)]
        at = [ctypes.addressof(size) for size in sizes]
        ask("SpMMACompressedSize", ask.handle, plan, *at[:2])
        ask("MatmulGetWorkspace", ask.handle, plan, at[2])
        found[f"sizes of {dtype} {rows}x{cols}"] = tuple(size.value for size in sizes)
    return found


def _attributes(ask: Asker) -> Asked:
    get, put = "MatmulDescGetAttribute", "MatmulDescSetAttribute"
    _, matmul, _ = ask.matmul(64, 32, 128, F16)
    found: Asked = {
        "default RELU": ask.get(get, matmul, 0),
        "default RELU_UPPERBOUND": ask.get(get, matmul, 1, FLOAT),
        "default GELU_SCALING": ask.get(get, matmul, 4, FLOAT),
        "default BIAS_STRIDE": ask.get(get, matmul, 7, LONG),
        "default BIAS_POINTER": ask.get(get, matmul, 8, POINTER),
        "get RELU, wrong size": ask.get(get, matmul, 0, LONG)[0],
        "get attribute 20": ask.get(get, matmul, 20, LONG)[0],
        "set RELU 2, get it": (ask.put(put, matmul, 0, 2), ask.get(get, matmul, 0)[1]),
        "set GELU on f16": ask.put(put, matmul, 3, 1),
        "set GELU_SCALING on f16": ask.put(put, matmul, 4, 1.0, FLOAT),
        "set ALPHA_VECTOR on f16": ask.put(put, matmul, 5, 1),
        "set BIAS_STRIDE -5": ask.put(put, matmul, 7, -5, LONG),
        "set BIAS_POINTER, no data": ask(put, ask.handle, matmul, 8, 0, 8),
        "set SPARSE_MAT_POINTER, get it": (
            ask.put(put, matmul, 9, 0x1230, POINTER), ask.get(get, matmul, 9, POINTER)[0]
        ),
    }  # fmt: skip
    for mode in (0, 1, 2):
        _, scaled, _ = ask.matmul(64, 64, 64, F16)
        for attribute in (10, 11):
            ask.put(put, scaled, attribute, mode)
        status, selection = ask.selection(scaled)
        planned = ask.plan(scaled, selection)[0] if status == 0 else None
        found[f"scale modes {mode} on f16: selection, plan"] = (status, planned)
    return found


def _problems(ask: Asker) -> Asked:
    def matrix(*shape: Any, **options: Any) -> OpaqueStorage:
        return ask.matrix(*shape, **options)[1]

    a, b = matrix(64, 128, "f16", structured=True), matrix(128, 32, "f16")
    c, wide, column = (
        matrix(64, 32, "f16"), matrix(64, 32, "f16", ld=40), matrix(64, 32, "f16", 1)
    )  # fmt: skip
    dense_a, structured_b = matrix(64, 128, "f16"), matrix(128, 32, "f16", structured=True)
    two = matrix(64, 128, "f16", structured=True)
    ask.put("MatDescSetAttribute", two, 0, 2)
    cases = {
        "as it should be": (0, 0, a, b, c, c, 2),
        "ld of D differs from C": (0, 0, a, b, c, wide, 2),
        "order of D differs from C": (0, 0, a, b, column, c, 2),
        "inner dimensions differ": (1, 0, a, b, c, c, 2),
        "none structured": (0, 0, dense_a, b, c, c, 2),
        "both structured": (0, 0, a, structured_b, c, c, 2),
        "operation 2": (2, 0, a, b, c, c, 2),
        "compute type 7": (0, 0, a, b, c, c, 7),
        "no A": (0, 0, 0, b, c, c, 2),
        "no D": (0, 0, a, b, c, 0, 2),
        "batches differ": (0, 0, two, b, c, c, 2),
    }
    made = OpaqueStorage()
    return {
        name: ask("MatmulDescriptorInit", ask.handle, made, *case) for name, case in cases.items()
    }


def _algorithms(ask: Asker) -> Asked:
    get, put = "MatmulAlgGetAttribute", "MatmulAlgSetAttribute"
    _, matmul, _ = ask.matmul(64, 32, 128, F16)
    _, first = ask.selection(matmul)
    defaults = tuple(ask.get(get, first, attribute)[1] for attribute in range(6))
    found: Asked = {"defaults: id, count, iterations, split_k, mode, buffers": defaults}
    names = ("id", "count", "iterations", "split_k", "mode", "buffers")
    values = ((3, 4, -1), (1,), (0, 100), (0, 65), (0, 2, 3), (-1,))
    for attribute, name in enumerate(names):
        for value in values[attribute]:
            _, fresh = ask.selection(matmul)
            found[f"set {name} {value}"] = ask.put(put, fresh, attribute, value)
    return found | {
        "get id, wrong size": ask.get(get, first, 0, LONG)[0],
        "get attribute 6": ask.get(get, first, 6)[0],
        "algorithm 1": ask.selection(matmul, 1)[0],
        "destroy nothing": (ask("MatmulAlgSelectionDestroy", 0), ask("MatmulPlanDestroy", 0)),
    }


def _calls(ask: Asker) -> Asked:
    _, matmul, (a, _, _) = ask.matmul(64, 64, 64, F16)
    _, plan = ask.plan(matmul, ask.selection(matmul)[1])
    memory = [torch.zeros(65536, dtype=torch.uint8) for _ in range(7)]
    dense, b, c, d, packed, scratch, workspace = (tensor.data_ptr() for tensor in memory)
    size, one, zero, stream = ctypes.c_size_t(), FLOAT(1), FLOAT(0), POINTER(0)
    at, alpha, beta, streams = (ctypes.addressof(x) for x in (size, one, zero, stream))

    def multiply(*arguments: Any) -> Any:
        return ask("Matmul", ask.handle, plan, *arguments)

    operands = [alpha, packed, b, beta, c, d]
    found: Asked = {
        "CompressedSize, no size": ask("SpMMACompressedSize", ask.handle, plan, 0, at),
        "CompressedSize, no buffer size": ask("SpMMACompressedSize", ask.handle, plan, at, 0),
        "Compress, no scratch": ask("SpMMACompress", ask.handle, plan, dense, packed, 0, 0),
        "Compress, no input": ask("SpMMACompress", ask.handle, plan, 0, packed, scratch, 0),
        "Compress, no output": ask("SpMMACompress", ask.handle, plan, dense, 0, scratch, 0),
        "GetWorkspace, no size": ask("MatmulGetWorkspace", ask.handle, plan, 0),
        "Matmul, no workspace": multiply(*operands, 0, streams, 1),
        "Matmul, no streams": multiply(*operands, workspace, 0, 0),
        "Matmul, -1 streams": multiply(*operands, workspace, 0, -1),
        "Matmul, one stream that is not given": multiply(*operands, workspace, 0, 1),
        "Prune, algorithm 2": ask("SpMMAPrune", ask.handle, matmul, dense, dense, 2, 0),
        "Prune, no input": ask("SpMMAPrune", ask.handle, matmul, 0, dense, 1, 0),
        "PruneCheck, no result": ask("SpMMAPruneCheck", ask.handle, matmul, dense, 0, 0),
        "Prune2, operation 2": ask("SpMMAPrune2", ask.handle, a, 1, 2, dense, dense, 1, 0),
    }
    for position, name in enumerate(("alpha", "A", "B", "beta", "C", "D")):
        given = [0 if i == position else value for i, value in enumerate(operands)]
        found[f"Matmul, no {name}"] = multiply(*given, workspace, streams, 1)
    return found
