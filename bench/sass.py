"""The machine code of a kernel, as `nvdisasm -c -hex` prints it: instructions, loops, counts.

The compiler schedules instructions itself, in bits 41 to 57 of the second half of each one: cycles
until the warp may issue its next one (stall), the scoreboards that it sets until it has written its
result or read its operands, and those that it waits for. Layout as since Volta: Jia et al.,
"Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", arXiv 1804.06826, section 2.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

NO_SCOREBOARD = 7

LABEL = re.compile(r"^(\.L_\w+):")
FIRST = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/"
)
SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
TARGET = re.compile(r"\.L_\w+")

MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
"""The instructions that multiply matrices."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp."""

    opcode: str
    """With what modifies it: "MUFU.EX2"."""
    operands: str = ""
    predicate: str | None = None
    stall: int = 1
    written: int = NO_SCOREBOARD
    """The scoreboard that is set until the result is there."""
    read: int = NO_SCOREBOARD
    """The scoreboard that is set until the operands have been read."""
    waits: tuple[int, ...] = ()
    """The scoreboards that must be clear first."""

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> str | None:
        """The label that a branch leads to."""
        found = TARGET.search(self.operands) if self.name == "BRA" else None
        return found and found[0]


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel in their order, and the position of each label."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def main_loop(self) -> range:
        """The innermost loop with the most products; empty if no loop has any.

        Products are matrix instructions, or FFMA in a kernel that has none of them.
        """
        names = [instruction.name for instruction in self.instructions]
        products = MATRIX if any(name in MATRIX for name in names) else ("FFMA",)
        best, most = range(0), (0, 0)
        for end, instruction in enumerate(self.instructions):
            start = self.labels.get(instruction.target or "", end + 1)
            loop = range(start, end + 1)
            weight = sum(names[i] in products for i in loop)
            if weight and (weight, -len(loop)) > most:
                best, most = loop, (weight, -len(loop))
        return best

    def path(self, part: range) -> list[Instruction]:
        """What a warp runs of a part: it leaves out what branches always jump over.

        Conditional branches fall through, which in these kernels is the usual way.
        """
        path, i = [], part.start
        while i in part:
            instruction = self.instructions[i]
            path.append(instruction)
            if instruction.predicate is None and instruction.name == "EXIT":
                break
            target = self.labels.get(instruction.target or "", 0)
            i = target if instruction.predicate is None and target > i else i + 1
        return path


def disassemble(binary: bytes) -> Code:
    """The code of a cubin with one kernel, by the disassembler that comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", "-hex", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return parse(text)


def parse(text: str) -> Code:
    """Reads a disassembly; ValueError if it has no instructions."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    first: re.Match[str] | None = None
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := FIRST.search(line):
            first = found
        elif first and (second := SECOND.match(line)):
            instructions.append(_instruction(first, int(second[1], 16) >> 41))
            first = None
    if not instructions:
        raise ValueError(f"expected a disassembly by nvdisasm -c -hex, got {text[:200]!r}")
    return Code(tuple(instructions), labels)


def _instruction(first: re.Match[str], control: int) -> Instruction:
    predicate, opcode, operands = first.groups()
    return Instruction(
        opcode,
        operands,
        predicate,
        stall=control & 15,
        written=control >> 5 & 7,
        read=control >> 8 & 7,
        waits=tuple(board for board in range(6) if control >> 11 + board & 1),
    )


COUNTED = {
    "products": re.compile("HG?MMA|UTCHMMA"),
    "product_waits": re.compile(r"WARPGROUP\.DEPBAR"),
    "exponentials": re.compile(r"MUFU\.EX2"),
    "reciprocals": re.compile(r"MUFU\.RCP"),
    "multiplications": re.compile("FMUL"),
    "conversions": re.compile("F2F|I2F|F2I"),
    "shared_loads": re.compile("LDS"),
    "shared_stores": re.compile("STS"),
    "async_copies": re.compile("LDGSTS|UTMALDG"),
    "barriers": re.compile(r"BAR\.SYNC"),
}
"""What is counted of a loop, under the names of a row."""


def counts(path: Sequence[Instruction]) -> dict[str, int]:
    """How many instructions of each kind a warp runs."""
    found = {
        name: sum(bool(kind.match(instruction.opcode)) for instruction in path)
        for name, kind in COUNTED.items()
    }
    return {"instructions": len(path), **found}
