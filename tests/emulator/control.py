"""Steer the emulator from a test: metadata order, bad algorithms, failures, counters."""

from __future__ import annotations

import ctypes
import os
from enum import IntEnum

LAYOUTS = ("plain", "blocked", "eight_bit", "sm90_atom", "sm90_interleaved", "sm90_published")
LAYOUTS += ("random",)


class Bad(IntEnum):
    """How an algorithm misbehaves."""

    GOOD = 0
    WRONG_FROM_256_ROWS = 1  # reads another row's metadata; right below 256 sparse rows
    NON_DETERMINISTIC = 2  # one element is off in every second call, each time another
    NOT_SUPPORTED_AT_PLAN = 3
    NOT_SUPPORTED_AT_MATMUL = 4
    GIVES_NAN = 5
    HANGS_AT_PLAN = 6  # not imitated: INTERNAL_ERROR, and hangs() counts it
    FAILS_AT_MATMUL = 7
    ALWAYS_WRONG = 8  # leaves out the last group of the reduction


class Emulator:
    """Controls of one emulator library; the same file loaded through the binding shares them.

    Args:
        path: what :func:`tests.emulator.build.build` returned.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.cdll = ctypes.CDLL(self.path, mode=ctypes.RTLD_LOCAL)
        for name in ("emu_set_layout", "emu_set_layout_of_algorithm", "emu_layout_addresses"):
            self.cdll[name]  # an AttributeError here names a library that is not the emulator
        self._calls = self.cdll.emu_calls
        self._calls.restype = ctypes.c_long
        for name in ("emu_last_stream", "emu_last_workspace"):
            getattr(self.cdll, name).restype = ctypes.c_long

    def reset(self) -> None:
        """Undo every setting and zero every counter; live objects stay as they are."""
        self.cdll.emu_reset()

    def layout(self, name: str, seed: int = 0, *, alg_id: int | None = None) -> None:
        """Choose the metadata order: of every plan made from now on, or of one algorithm's plans.

        Args:
            name: one of LAYOUTS; "sm80" and "auto" are "blocked", which is plain below 256 rows,
                and "eight_bit" for 8-bit operands.
            seed: picks the permutation of "random".
            alg_id: restrict it to this algorithm; the deprecated compress never uses it.
        """
        text, number = name.encode(), ctypes.c_uint64(seed)
        if alg_id is None:
            self._check("layout", name, self.cdll.emu_set_layout(text, number))
        else:
            status = self.cdll.emu_set_layout_of_algorithm(alg_id, text, number)
            self._check("layout", (name, alg_id), status)

    def layout_of_width(self, width: int, name: str, seed: int = 0) -> None:
        """Choose the metadata order of the plans whose dense operand has this many columns."""
        args = (ctypes.c_int64(width), name.encode(), ctypes.c_uint64(seed))
        self._check("layout_of_width", (width, name), self.cdll.emu_set_layout_of_width(*args))

    def empty_pair(self, i0: int, i1: int) -> None:
        """Choose the two columns that a group without a non-zero keeps; 2 and 3 without it."""
        self._check("empty_pair", (i0, i1), self.cdll.emu_set_empty_pair(i0, i1))

    def full_sizes(self, on: bool = True) -> None:
        """Give plans the metadata region of a bare descriptor instead of the cards' smaller one."""
        self.cdll.emu_set_full_sizes(int(on))

    def default_split_k(self, value: int) -> None:
        """Set what SPLIT_K is in a new algorithm selection: 1, or -1 as one card was seen to."""
        self.cdll.emu_set_default_split_k(value)

    def layout_per_plan(self, on: bool = True) -> None:
        """Give the plans of each algorithm id a random order of their own."""
        self.cdll.emu_set_layout_per_plan(int(on))

    def layout_addresses(self, name: str, rows: int, cols: int, seed: int = 0) -> list[int]:
        """Return the nibble address of every (row, group of 4), row-major, in one order."""
        addresses = (ctypes.c_int64 * (rows * cols // 4))()
        number, shape = ctypes.c_uint64(seed), (ctypes.c_int64(rows), ctypes.c_int64(cols))
        status = self.cdll.emu_layout_addresses(name.encode(), number, *shape, addresses)
        self._check("layout_addresses", name, status)
        return list(addresses)

    def bad_algorithm(self, alg_id: int, kind: Bad) -> None:
        """Make one algorithm misbehave; Bad.GOOD heals it."""
        status = self.cdll.emu_set_bad_algorithm(alg_id, int(kind))
        self._check("bad_algorithm", (alg_id, kind), status)

    def algorithm_delay(self, alg_id: int, microseconds: int) -> None:
        """Make one algorithm slower by a fixed time per call."""
        status = self.cdll.emu_set_algorithm_delay(alg_id, microseconds)
        self._check("algorithm_delay", (alg_id, microseconds), status)

    def max_alg_id(self, count: int) -> None:
        """Set how many algorithm ids there are; without it 4, and 21 from arch 90 on."""
        self.cdll.emu_set_max_alg_id(count)

    def arch(self, arch: int) -> None:
        """Imitate the rules of another GPU: 80 (default), 89, 90."""
        self.cdll.emu_set_arch(arch)

    def version(self, major: int, minor: int, patch: int) -> None:
        """Imitate the struct sizes and attributes of another library version."""
        self.cdll.emu_set_version(major, minor, patch)

    def noop(self, on: bool = True) -> None:
        """Let matmul return at once, to time what surrounds it."""
        self.cdll.emu_set_noop(int(on))

    def thread_check(self, on: bool = True) -> None:
        """Refuse a handle on another thread than its own, as the library does."""
        self.cdll.emu_set_thread_check(int(on))

    def workspace(self, size: int) -> None:
        """Set the workspace of every plan, in bytes; -1 for what compress wants as well."""
        self.cdll.emu_set_workspace(ctypes.c_long(size))

    def fail(self, function: str, status: int, *, after: int = 0) -> None:
        """Make a C function return a status once, after so many calls that succeed."""
        code = self.cdll.emu_fail(function.encode(), int(status), after)
        self._check("fail", function, code)

    def live(self) -> dict[str, int]:
        """Return how many objects of each kind are initialised and not destroyed."""
        kinds = {"handle": 0, "mat": 1, "alg": 3, "plan": 4}
        return {name: self.cdll.emu_live_objects(kind) for name, kind in kinds.items()}

    def calls(self, function: str) -> int:
        """Return how often a C function was called since the last reset."""
        return int(self._calls(function.encode()))

    def hangs(self) -> int:
        """Return how many plans would have blocked for ever."""
        return int(self.cdll.emu_hangs())

    def order_violations(self) -> int:
        """Return how many objects were destroyed while something built on them was live."""
        return int(self.cdll.emu_order_violations())

    def unpruned_groups(self) -> int:
        """Return how many groups with more than two non-zeros were given to a compress."""
        return int(self.cdll.emu_unpruned_groups())

    def last_stream(self) -> int:
        """Return the stream of the last asynchronous call, -1 before any."""
        return int(self.cdll.emu_last_stream())

    def last_workspace(self) -> int:
        """Return the workspace pointer of the last matmul, -1 before any."""
        return int(self.cdll.emu_last_workspace())

    def last_algorithm(self) -> int:
        """Return the algorithm id of the last matmul, -1 before any."""
        return int(self.cdll.emu_last_algorithm())

    @staticmethod
    def _check(function: str, got: object, status: int) -> None:
        if status:
            raise ValueError(f"{function}: arguments must be known to the emulator, got {got}")
