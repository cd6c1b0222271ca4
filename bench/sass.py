"""What a compiled kernel consists of: its instructions by pipe and width, registers, occupancy.

Read off the machine code with the cuobjdump that Triton ships; no GPU is asked. Instructions of a
loop count as often as the loop runs, which the caller must know.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)(.*?);"
)
# Opcode -> the pipe that executes it.
_PIPES = {
    "alu": "FSEL FSETP FMNMX FSET FCHK SEL ISETP ISET PLOP3 P2R R2P VOTE IMNMX VIMNMX VIMNMX3 "
    "VIADDMNMX LOP3 LOP SHF SHL SHR PRMT IADD3 LEA IADD IABS SGXT BMSK VABSDIFF VIADD LOP32I F2FP "
    "HSETP2 HMNMX2 HSET2 I2FP MOV CS2R IMNMX3 FMNMX3",
    "fma": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 FHADD FHFMA HADD2 HFMA2 HMUL2",
    "imad": "IMAD",
    "xu": "I2F F2I F2F MUFU I2I FRND POPC FLO BREV REDUX S2R S2UR R2UR",
    "memory": "LDG STG LDL STL LDS STS LDSM STSM SHFL RED ATOM ATOMG LDC LDCU ULDC",
    "control": "BAR WARPSYNC BSYNC BSSY DEPBAR MEMBAR ERRBAR CCTL BRA EXIT RET CALL YIELD BREAK "
    "BMOV KILL PREEXIT ACQBULK NOP WARPGROUP",
}
_PIPE_OF = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes.split()}
# Kilobytes of shared memory, registers, warps and blocks of one multiprocessor, by architecture.
_LIMITS = {80: (164, 64, 32), 90: (228, 64, 32), 100: (228, 64, 32), 120: (100, 48, 24)}


@dataclass(frozen=True)
class Code:
    """One kernel's machine code, counted for one warp.

    Attributes:
        pipes: instructions by pipe; "imad.wide" are those that give 64 bits, "uniform" those of
            the uniform datapath, which no warp's lanes take part in.
        accesses: loads and stores, by name and bytes per lane: ("LDG", 16) -> how many.
        registers: of one thread.
        stack: bytes of local memory of one thread.
        shared: bytes of shared memory of one block.
        warps: warps of one block.
        resident: warps that one multiprocessor holds.
        loops: backward branches.
    """

    pipes: Counter[str]
    accesses: Counter[tuple[str, int]]
    registers: int
    stack: int
    shared: int
    warps: int
    resident: int
    loops: int

    @property
    def issued(self) -> int:
        """Instructions that a warp issues."""
        return self.pipes.total()


def read(compiled: Any, target: int, trips: int = 1) -> Code:
    """Count one compiled Triton kernel.

    Args:
        compiled: what ``triton.compile`` returned.
        target: compute capability, such as 80.
        trips: how often each of its loops runs.

    Raises:
        ValueError: an opcode that no pipe is known for.
    """
    text, usage = (_dump(compiled.asm["cubin"], flag) for flag in ("-sass", "-res-usage"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"read: cuobjdump must print REG and STACK, got {usage!r}")
    lines = [(int(m[1], 16), m[2], m[3]) for m in map(_LINE.match, text.splitlines()) if m]
    # What follows the last EXIT is a branch to itself and padding.
    last = max(i for i, (_, opcode, _) in enumerate(lines) if opcode == "EXIT")
    lines = lines[: last + 1]
    loops = _loops(lines)
    pipes: Counter[str] = Counter()
    accesses: Counter[tuple[str, int]] = Counter()
    for address, opcode, _ in lines:
        times = trips if any(start <= address <= stop for start, stop in loops) else 1
        pipe = _pipe(opcode)
        pipes[pipe] += times
        if pipe == "memory":
            accesses[opcode.split(".")[0], _width(opcode)] += times
    registers, shared, warps = int(found[1]), compiled.metadata.shared, compiled.metadata.num_warps
    return Code(
        pipes,
        accesses,
        registers,
        int(found[2]),
        shared,
        warps,
        _resident(target, registers, shared, warps),
        len(loops),
    )


def _dump(cubin: bytes, flag: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _pipe(opcode: str) -> str:
    base = opcode.split(".")[0]
    if base == "IMAD":
        return "imad.wide" if ".WIDE" in opcode or ".HI" in opcode else "imad"
    if base in _PIPE_OF:
        return _PIPE_OF[base]
    if base.startswith("U"):
        return "uniform"
    raise ValueError(f"_pipe: opcode must be a known one, got {opcode}. Add it to _PIPES.")


def _width(opcode: str) -> int:
    """Return the bytes that each lane moves."""
    for part in opcode.split("."):
        if part in ("64", "128", "256"):
            return int(part) // 8
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:]) // 8
    return 4


def _loops(lines: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """Return first and last address of every loop."""
    found = []
    for address, opcode, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if opcode.startswith("BRA") and target and int(target[1], 16) < address:
            found.append((int(target[1], 16), address))
    return found


def _resident(target: int, registers: int, shared: int, warps: int) -> int:
    """Return the warps that a multiprocessor holds, by registers, shared memory and its limits."""
    kilobytes, most_warps, most_blocks = _LIMITS[target]
    # Registers are handed out by 256 a warp, shared memory by 128 bytes and 1 KiB for the system.
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = kilobytes * 1024 // (-(-(shared + 1024) // 128) * 128)
    return min(by_registers, by_shared, most_warps // warps, most_blocks) * warps
