"""Reading NVIDIA's disassembler on a compiled kernel: registers, stack, instructions and loops.

``cuobjdump`` comes with Triton's wheel, so no CUDA toolkit is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property

import triton

_LINE = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)")
_MATRIX = re.compile(r"(?:[HQIDBO]G?MMA|UTC\w*MMA)$")
_GLOBAL_LOADS = ("LDG", "LD", "LDGSTS")
_BULK_LOADS = ("UTMALDG", "UBLKCP")
_GLOBAL_WRITES = ("STG", "ST", "RED", "REDG", "ATOM", "ATOMG", "UTMASTG", "UTMAREDG", "UBLKRED")
TMA_BITS = 1024
"""Width that a load by the bulk copy engine counts as: at least a row of 128 bytes."""


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers: LDG of LDG.E.128."""
        return self.opcode.partition(".")[0]

    @property
    def bits(self) -> int:
        """Width of a load or store per thread."""
        if self.name in _BULK_LOADS:
            return TMA_BITS
        widths = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
        return next((widths[part] for part in self.opcode.split(".") if part in widths), 32)


@dataclass(frozen=True)
class Disassembly:
    """One kernel. ``shared``: statically allocated bytes (Triton's own are dynamic and not among them)."""

    registers: int
    stack: int
    shared: int
    instructions: list[Instruction]

    def count(self, *names: str) -> int:
        return sum(instruction.name in names for instruction in self.instructions)

    @cached_property
    def matrix(self) -> dict[str, int]:
        """Matrix-unit instructions by name."""
        names = [i.name for i in self.instructions if _MATRIX.match(i.name)]
        return {name: names.count(name) for name in sorted(set(names))}

    @cached_property
    def loads(self) -> dict[int, int]:
        """Loads from device memory: bits per thread -> number of instructions."""
        widths = [i.bits for i in self.instructions if i.name in (*_GLOBAL_LOADS, *_BULK_LOADS)]
        return {bits: widths.count(bits) for bits in sorted(set(widths), reverse=True)}

    def main_load_bits(self, data_bytes: int, threads: int) -> int:
        """The width that half of the data, or more, is loaded with or above; 0 if loads carry less than that.

        Args:
            data_bytes: what the kernel's code loads, each instruction counted once; indices are not data.
            threads: of one program.
        """
        carried = 0
        for bits, count in self.loads.items():
            carried += count * threads * bits // 8
            if 2 * carried >= data_bytes:
                return bits
        return 0

    @property
    def writes(self) -> int:
        """Instructions that change device memory."""
        return self.count(*_GLOBAL_WRITES)

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return self.count("LDL", "STL")

    @cached_property
    def matrix_loop_spills(self) -> int:
        """Spills inside loops with matrix-unit instructions."""
        inside = set()
        for first, last in self._loops():
            body = [i for i in self.instructions if first <= i.address <= last]
            if any(_MATRIX.match(i.name) for i in body):
                inside.update(i.address for i in body if i.name in ("LDL", "STL"))
        return len(inside)

    def _loops(self) -> list[tuple[int, int]]:
        """First and last address of each loop: a branch back. (Branches to themselves only end the program.)"""
        loops = []
        for instruction in self.instructions:
            target = re.search(r"0x([0-9a-f]+)", instruction.operands) if instruction.name == "BRA" else None
            if target and int(target[1], 16) < instruction.address:
                loops.append((int(target[1], 16), instruction.address))
        return loops


def parse(sass: str, usage: str) -> Disassembly:
    """From the text of ``cuobjdump -sass`` and ``cuobjdump -res-usage`` of a file with one kernel."""
    instructions = [
        Instruction(int(match["address"], 16), match["opcode"], match["operands"])
        for match in map(_LINE.match, sass.splitlines())
        if match
    ]
    found = _USAGE.search(usage)
    if not instructions or not found:
        raise RuntimeError(f"cuobjdump's output is not understood: {len(instructions)} instructions, usage {usage!r}")
    return Disassembly(int(found["registers"]), int(found["stack"]), int(found["shared"]), instructions)


def disassemble(cubin: bytes) -> Disassembly:
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        ]
    return parse(*texts)
