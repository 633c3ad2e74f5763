"""How long a kernel takes by its machine code alone: a model that ranks variants with no GPU.

An SM has four partitions that share its memory pipes. One of them is played cycle by cycle with the
warps that it gets of the programs that fit: each cycle one warp issues an instruction, when the
stall count of its last one has passed, the scoreboards that it waits for are clear and its pipe is
free. The other three partitions are taken to do the same at the same time.

Bank conflicts, the bandwidth of device memory and the start of programs are not in it, so it is
optimistic: Triton's fused attention on an H100 (forward, head_dim 64, 16,384 tokens; 403 TFLOP/s in
arXiv 2407.08608) comes out a fifth too fast. Compare its figures with each other, not with a clock.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.sass import NO_SCOREBOARD, Code, Instruction

PARTITIONS = 4


@dataclass(frozen=True)
class Machine:
    """A GPU."""

    clock: float
    """Hz, under load."""
    multiprocessors: int
    products: int
    """Floating-point operations of an SM's 16-bit products in a cycle."""
    float32: int
    """Cycles for which a warp's FFMA holds its partition: it has 16 lanes in sm_80, 32 in sm_90."""
    hmma: float
    """Cycles for which HMMA.16816 does; in sm_90 it reaches 62 % of the tensor cores' rate (arXiv
    2402.13499)."""
    exponentials: int = 16
    """An SM's in a cycle."""
    l2: int = 5120
    """Bytes that all SMs get from the L2 cache in a cycle (A100 whitepaper)."""


MACHINES = {
    "sm_80": Machine(1.41e9, 108, products=2048, float32=2, hmma=8.0),
    "sm_90": Machine(1.755e9, 132, products=4096, float32=1, hmma=6.5),
}
"""An A100 and an H100, those with 80 GB and NVLink."""

# Pipes by CUDA's table of arithmetic throughput: an SM has 4 * 32 / (cycles held) results a cycle.
FLOAT32 = ("FFMA", "FMUL", "FADD")
HALF_RATE = ("IMAD", "HFMA2", "HMUL2", "HADD2")
SPECIAL = ("MUFU", "I2F", "F2I", "F2F", "POPC", "FLO", "BREV")
SHARED = ("LDS", "STS", "LDSM", "STSM", "SHFL", "LDL", "STL")  # What spills stays in L1.
GLOBAL = ("LDG", "STG", "LDGSTS", "LD", "ST", "ATOMG", "RED")
UNCOUNTED = (
    *("BRA", "BSSY", "BSYNC", "EXIT", "NOP", "BAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "CALL"),
    *("RET", "WARPGROUP", "SYNCS", "MEMBAR", "FENCE", "ERRBAR", "CCTL", "YIELD", "BREAK", "ELECT"),
    *("R2UR", "S2R", "S2UR", "CS2R", "LDC"),
)
"""These take a turn of the scheduler and no pipe that fills; so does the uniform datapath."""

LATENCY = {
    "integer": 4.0,
    "float": 4.0,
    "other": 18.0,
    "special": 18.0,
    "shared": 25.0,  # With its 4 cycles in the pipe a load takes 29 (arXiv 2402.13499).
    "global": 480.0,  # From device memory (the same: 466 on an A100, 479 on an H100).
    "tensor": 24.0,  # HMMA.16816 takes 33 on an A100 (arXiv 2208.11174), 8 of them in the pipe.
}
"""Cycles from when an instruction has left its pipe until its result is there."""
BARRIER = 20.0
"""Cycles from the last arrival of a warp until all go on."""
READ = 8.0
"""Cycles from when a memory instruction has left its pipe until its operands may change."""
QUEUE = 4
"""Instructions for shared memory or the tensor cores that a partition takes while one is under way
(Huerta et al., arXiv 2503.20481). Those for device memory queue further away."""
WIDTHS = {"64": 2, "128": 4, "2": 2, "4": 4}
"""Transfers of 128 bytes for a warp, by the bits of a thread or the matrices of LDSM and STSM."""


class Cost(NamedTuple):
    """What an instruction takes: a pipe, for how many cycles, and how many more until its result is
    there."""

    pipe: str
    held: float
    latency: float


def cost(instruction: Instruction, machine: Machine) -> Cost:
    """What an instruction takes on a machine."""
    pipe, held = _pipe(instruction, machine)
    return Cost(pipe, held, LATENCY[pipe])


def _pipe(instruction: Instruction, machine: Machine) -> tuple[str, float]:
    name, modifiers = instruction.name, instruction.opcode.split(".")[1:]
    if instruction.predicate == "!PT" or name in UNCOUNTED or name.startswith("U"):
        return "other", 0.0
    if name == "HGMMA":
        _, columns, depth = (int(size) for size in modifiers[0].split("x"))
        # 64 rows at 2,048 multiply-adds a cycle, shared by the four warps of a group. The right
        # operand comes from shared memory at 128 bytes a cycle, and the left one often too.
        operands = 2 * depth * columns / 128
        if instruction.operands.split(", ")[1].startswith("gdesc"):
            operands += 2 * depth * 64 / 128
        return "tensor", max(64 * columns * depth / (machine.products / 2), operands)
    if name == "HMMA":
        return "tensor", machine.hmma
    if name in SHARED or name in GLOBAL:
        transfers = max((WIDTHS.get(modifier, 1) for modifier in modifiers), default=1)
        if name in SHARED:
            return "shared", PARTITIONS * transfers
        return "global", PARTITIONS * transfers * 128 * machine.multiprocessors / machine.l2
    if name in SPECIAL:
        return "special", PARTITIONS * 32 / machine.exponentials
    if name in FLOAT32:
        return "float", machine.float32
    return "float" if name in HALF_RATE else "integer", 2.0


class Timeline(NamedTuple):
    """How a partition spent its time."""

    cycles: float
    busy: dict[str, float]
    """Pipe -> fraction of the time in which it worked; "issue" is the warp scheduler."""
    waits: dict[str, float]
    """Why warps did not issue -> fraction of all the time that they lived."""


@dataclass(eq=False)
class _Program:
    warps: list[_Warp] = field(default_factory=list)
    arrived: int = 0


@dataclass(eq=False)
class _Warp:
    """Where a warp is, and what its next instructions may wait for."""

    program: _Program
    at: float
    """The cycle from which its stall count lets it issue."""
    step: int = 0
    ready: float = 0.0
    """The cycle from which its own past lets it issue."""
    blamed: str = ""
    boards: list[tuple[float, str]] = field(default_factory=lambda: [(0.0, "")] * 6)
    """When each scoreboard is clear, and the pipe to blame."""
    products: list[float] = field(default_factory=list)
    """When each group of HGMMA is done."""
    copies: list[float] = field(default_factory=list)
    """When each group of LDGSTS is done."""
    copied: float = 0.0
    stored: float = 0.0
    at_barrier: bool = False


def play(
    path: Sequence[Instruction],
    machine: Machine,
    *,
    programs: int,
    resident: int,
    warps: int,
) -> Timeline:
    """Plays an SM's programs in one partition: so many, of which so many are resident at a time.

    ``path`` is what each warp runs, ``warps`` how many of a program's this partition gets.
    """
    costs = {x: cost(x, machine) for x in set(path)}
    steps = [(x, *costs[x]) for x in path]
    free: dict[str, float] = defaultdict(float)
    busy: dict[str, float] = defaultdict(float)
    waits: dict[str, float] = defaultdict(float)
    running: list[_Warp] = []
    left, issue, lived = programs, 0.0, 0.0

    def start(now: float) -> None:
        program = _Program()
        program.warps = [_Warp(program, now) for _ in range(warps)]
        for warp in program.warps:
            _look(warp, path[0])
        running.extend(program.warps)

    for _ in range(min(resident, programs)):
        start(0.0)
        left -= 1
    while running:
        first, chosen, blamed = float("inf"), running[0], ""
        for warp in running:
            if warp.at_barrier:
                continue
            when, why = warp.ready, warp.blamed
            _, pipe, held, _ = steps[warp.step]
            if held and pipe != "global":
                room = free[pipe] - (QUEUE * held if pipe in ("shared", "tensor") else 0.0)
                if room > when:
                    when, why = room, f"{pipe} pipe"
            if when < issue:
                when, why = issue, "issue"
            if when < first:
                first, chosen, blamed = when, warp, why
        instruction, pipe, held, latency = steps[chosen.step]
        waits[blamed] += first - chosen.at
        waits["stall count"] += max(1, instruction.stall) - 1
        lived += first - chosen.at + max(1, instruction.stall)
        issue = first + 1
        busy["issue"] += 1
        end = first
        if held:
            end = free[pipe] = max(first, free[pipe]) + held
            busy[pipe] += held
        chosen.at = first + max(1, instruction.stall)
        _note(chosen, instruction, pipe, end, end + latency)
        chosen.step += 1
        if chosen.step < len(steps):
            _look(chosen, path[chosen.step])
        if instruction.name == "BAR" and _arrive(chosen):
            for warp in chosen.program.warps:
                waited = max(0.0, first + BARRIER - warp.at)
                waits["barrier"] += waited
                lived += waited
                warp.at += waited
                if warp.step < len(steps):
                    _look(warp, path[warp.step])
        if chosen.step == len(steps):
            running.remove(chosen)
            chosen.program.warps.remove(chosen)
            if not chosen.program.warps and left:
                start(first)
                left -= 1
    return Timeline(
        issue,
        {pipe: busy[pipe] / issue for pipe in sorted(busy, key=busy.__getitem__, reverse=True)},
        {why: waits[why] / lived for why in sorted(waits, key=waits.__getitem__, reverse=True)},
    )


GROUPS = re.compile(r"(?:gsb|SB)\d+, (0x[0-9a-f]+)")
"""How many of the last groups may still be under way."""


def _look(warp: _Warp, instruction: Instruction) -> None:
    """Finds when a warp's own past lets it issue its next instruction, and what to blame."""
    ready, blamed = warp.at, "stall count"
    for board in instruction.waits:
        clear, pipe = warp.boards[board]
        if clear > ready:
            ready, blamed = clear, pipe
    if instruction.name == "MEMBAR" and warp.stored > ready:
        ready, blamed = warp.stored, "shared"
    elif "DEPBAR.LE" in instruction.opcode and (allowed := GROUPS.search(instruction.operands)):
        of_products = instruction.name == "WARPGROUP"
        groups = warp.products if of_products else warp.copies
        awaited = groups[: len(groups) - int(allowed[1], 16)][-1:]
        if awaited and awaited[0] > ready:
            ready, blamed = awaited[0], "tensor" if of_products else "global"
    warp.ready, warp.blamed = ready, blamed


def _note(warp: _Warp, instruction: Instruction, pipe: str, end: float, done: float) -> None:
    """Notes when an instruction has left its pipe and when its result is there."""
    for board, until in ((instruction.written, done), (instruction.read, end + READ)):
        if board != NO_SCOREBOARD:
            warp.boards[board] = max(warp.boards[board], (until, pipe))
    if instruction.name == "HGMMA" and "gsb" in instruction.operands:
        warp.products.append(done)
    elif instruction.name == "LDGSTS":
        warp.copied = done
    elif instruction.name == "LDGDEPBAR":
        warp.copies.append(warp.copied)
    elif instruction.name in ("STS", "STSM"):
        warp.stored = done


def _arrive(warp: _Warp) -> bool:
    """Takes a warp to its program's barrier; whether it is the last one, which opens it."""
    program = warp.program
    warp.at_barrier = True
    program.arrived += 1
    if program.arrived < len(program.warps):
        return False
    program.arrived = 0
    for other in program.warps:
        other.at_barrier = False
    return True


def whole_path(code: Code, turns: int) -> list[Instruction]:
    """What a warp runs if the main loop takes so many turns."""
    loop = code.main_loop()
    before, after = range(loop.start), range(loop.stop, len(code.instructions))
    left_inside = loop and code.instructions[loop[-1]].predicate is None
    return [
        *code.path(before),
        *turns * code.path(loop),
        *([] if left_inside else code.path(after)),
    ]
