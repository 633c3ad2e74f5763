"""The cycle model on instructions made up for it: what each limit alone makes of them."""

import pytest

from bench import cycles
from bench.cycles import BARRIER, LATENCY, MACHINES, QUEUE, cost, play, whole_path
from bench.sass import Code, Instruction

H100 = MACHINES["sm_90"]
SMALL = "HGMMA.64x64x16.F32.BF16"


def played(path, programs=1, resident=1, warps=1, machine=H100):
    return play(path, machine, programs=programs, resident=resident, warps=warps)


@pytest.mark.parametrize(
    ("opcode", "operands", "pipe", "held"),
    [
        # Bound by the tensor cores: 64 columns of 16 in 32 cycles.
        ("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR52], RZ, !UPT", "tensor", 64),
        (SMALL, "R24, R56, gdesc[UR52].tnspB, R24", "tensor", 32),
        # Bound by shared memory: 64 rows of 16 in 16 cycles, 16 columns in 4.
        ("HGMMA.64x16x16.F32.BF16", "R24, gdesc[UR52], R24", "tensor", 20),
        ("HGMMA.64x16x16.F32.BF16", "R24, R56, gdesc[UR52], R24", "tensor", 8),
        ("HMMA.16816.F32.BF16", "R4, R8, R12, R4", "tensor", 6.5),
        ("MUFU.EX2", "R4, R4", "special", 8),
        ("FFMA", "R4, R4, R5, R6", "float", 1),
        ("IMAD", "R4, R4, R5, R6", "float", 2),
        ("FMNMX", "R4, R4, R5, !PT", "integer", 2),
        ("LDS.128", "R4, [R8]", "shared", 16),
        ("LDSM.16.M88.4", "R4, [R8]", "shared", 16),
        ("STL", "[R1], R4", "shared", 4),
        ("STG.E", "desc[UR6][R2.64], R1", "global", 13.2),
        ("LDGSTS.E.BYPASS.128", "[R3], desc[UR6][R2.64]", "global", 52.8),
        ("UIADD3", "UR4, UR4, 0x1, URZ", "other", 0),
        ("BAR.SYNC.DEFER_BLOCKING", "0x0", "other", 0),
    ],
)
def test_an_instruction_holds_its_pipe(opcode, operands, pipe, held):
    found = cost(Instruction(opcode, operands), H100)
    assert (found.pipe, found.held) == (pipe, pytest.approx(held))


def test_an_a100_takes_twice_as_long_for_a_multiplication():
    assert cost(Instruction("FFMA"), MACHINES["sm_80"]).held == 2


def test_what_never_runs_holds_nothing():
    assert cost(Instruction("LDS", "RZ, [RZ]", predicate="!PT"), H100).held == 0


def test_a_warp_issues_when_its_stall_count_has_passed():
    timeline = played([Instruction("FFMA", stall=4), Instruction("FFMA")])
    assert timeline.cycles == 5
    assert timeline.waits["stall count"] == 3 / 5
    assert timeline.busy["issue"] == timeline.busy["float"] == 2 / 5


def test_warps_share_the_scheduler_and_hide_each_others_stalls():
    path = 50 * [Instruction("FFMA", stall=4)]
    alone, together = played(path), played(path, programs=4, resident=4)
    assert alone.cycles == 197
    assert together.cycles == 200
    assert together.busy["issue"] == 1


def test_a_full_pipe_is_the_limit():
    path = 100 * [Instruction("MUFU.EX2")]
    timeline = played(path, programs=2, resident=2)
    assert timeline.cycles == pytest.approx(2 * 100 * 8, rel=0.01)
    assert timeline.busy["special"] > 0.99
    assert max(timeline.waits, key=timeline.waits.__getitem__) == "special pipe"


def test_memory_instructions_queue_before_they_hold_a_warp_up():
    path = (1 + QUEUE) * [Instruction("LDS")]
    assert played(path).cycles == 1 + QUEUE
    assert played([*path, Instruction("LDS")]).cycles > 1 + QUEUE


def test_a_scoreboard_holds_back_until_the_result_is_there():
    load = Instruction("LDG.E", written=1)
    taking = [load, Instruction("FFMA"), Instruction("FFMA", waits=(1,))]
    timeline = played(taking)
    assert timeline.cycles == pytest.approx(LATENCY["global"] + 13.2 + 1)
    assert timeline.waits["global"] > 0.9
    assert played([load, *2 * [Instruction("FFMA", waits=(0,))]]).cycles == 3


def product(*operands):
    return Instruction(SMALL, ", ".join(("R24", "R56", "gdesc[UR52]", "R24", *operands)))


def wait(still):
    return Instruction("WARPGROUP.DEPBAR.LE", f"gsb0, {still:#x}")


def test_products_run_beside_their_warp_until_it_waits_for_them():
    products = [product(), product("gsb0")]
    done = 2 * 32 + LATENCY["tensor"]
    assert played([*products, Instruction("FFMA")]).cycles == 3
    timeline = played([*products, wait(0)])
    assert timeline.cycles == done + 1
    assert timeline.waits["tensor"] > 0.9
    # With one group allowed to go on, it waits for the group before.
    assert played([*products, product("gsb0"), wait(1)]).cycles == done + 1
    assert played([*products, wait(1)]).cycles == 3


def test_two_programs_overlap_products_with_exponentials():
    turn = [product("gsb0"), wait(0), *4 * [Instruction("MUFU.EX2")]]
    alone = played(10 * turn, programs=2, resident=1)
    together = played(10 * turn, programs=2, resident=2)
    assert together.cycles < 0.7 * alone.cycles


def copies(prefetched):
    """A turn that waits for the copy which it started itself, or for the one before."""
    work = 100 * [Instruction("FFMA", stall=5)]
    copy = [Instruction("LDGSTS.E.128"), Instruction("LDGDEPBAR")]
    return [*copy, Instruction("DEPBAR.LE", f"SB0, {int(prefetched):#x}"), *work]


def test_a_copy_that_was_started_a_turn_ago_costs_nothing():
    assert played(10 * copies(False)).cycles > 10 * LATENCY["global"] + 10 * 500
    assert played(10 * copies(True)).cycles < LATENCY["global"] + 10 * 510


def test_a_barrier_makes_the_warps_of_a_program_wait_for_each_other():
    path = [Instruction("MUFU.EX2"), Instruction("BAR.SYNC", "0x0"), Instruction("FFMA")]
    timeline = played(path, warps=2)
    # The second exponential is issued in cycle 8, its warp arrives in 9, both go on from there.
    assert timeline.cycles == 9 + BARRIER + 2
    assert timeline.waits["barrier"] > 0.5
    assert played(path, programs=2, resident=2).waits.get("barrier", 0) > 0


def test_a_fence_waits_for_what_was_stored():
    path = [Instruction("STS"), Instruction("MEMBAR.ALL.CTA")]
    assert played(path).cycles == 4 + LATENCY["shared"] + 1


def test_programs_follow_each_other_into_the_places_that_there_are():
    path = 10 * [Instruction("FFMA", stall=10)]
    once = played(path, programs=1, resident=3).cycles
    assert played(path, programs=6, resident=3).cycles == pytest.approx(2 * once, rel=0.15)
    assert played(path, programs=7, resident=3).cycles == pytest.approx(3 * once, rel=0.15)


def loop(last):
    names = ["MOV", "HGMMA", last, "STG", "EXIT"]
    code = [Instruction(name) for name in names]
    code[2] = Instruction("BRA", "`(.L_x_0)", last)
    return Code(tuple(code), {".L_x_0": 1})


def test_the_whole_path_takes_the_turns_and_what_is_around_them():
    names = [x.name for x in whole_path(loop("P0"), 2)]
    assert names == ["MOV", "HGMMA", "BRA", "HGMMA", "BRA", "STG", "EXIT"]
    # A loop that always goes back is left from inside: what follows it never runs.
    assert [x.name for x in whole_path(loop(None), 1)] == ["MOV", "HGMMA", "BRA"]
    code = Code((Instruction("FFMA"), Instruction("STG")), {})
    assert [x.name for x in whole_path(code, 5)] == ["FFMA", "STG"]


def test_every_pipe_has_a_latency():
    known = (*cycles.FLOAT32, *cycles.SPECIAL, *cycles.SHARED, *cycles.GLOBAL, *cycles.UNCOUNTED)
    assert {cost(Instruction(name), H100).pipe for name in (*known, "LOP3")} < LATENCY.keys()
