"""Reading of machine code, on a kernel made up for it."""

import pytest

from bench import sass
from bench.sass import Instruction


def line(number, text, stall=1, written=7, read=7, waits=()):
    """An instruction as nvdisasm prints it: two lines with 64 bits each."""
    control = stall | written << 5 | read << 8 | sum(1 << board for board in waits) << 11
    return (
        f"        /*{16 * number:04x}*/  {text:>40} ;   /* 0x000000ffff007b82 */\n"
        f"                                          /* 0x{control << 41 | 0x1234:016x} */\n"
    )


LISTING = "".join(
    [
        '\t.section\t.text.kernel,"ax",@progbits\n.text.kernel:\n',
        line(0, "LDG.E.128 R4, desc[UR6][R2.64]", stall=4, written=0),
        line(1, "@!P0 BRA `(.L_x_2)"),
        ".L_x_0:\n",
        line(2, "FMUL R1, R1, 2"),
        line(3, "@P1 BRA `(.L_x_0)", stall=5),
        ".L_x_1:\n",
        line(4, "WARPGROUP.ARRIVE"),
        line(5, "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0", waits=(0, 3)),
        line(6, "@P2 EXIT"),
        line(7, "BRA `(.L_x_3)"),
        line(8, "BRA `(.L_x_3)"),
        ".L_x_3:\n",
        line(9, "WARPGROUP.DEPBAR.LE gsb0, 0x0"),
        line(10, "MUFU.EX2 R1, R1", written=2, read=5),
        line(11, "BRA `(.L_x_1)"),
        ".L_x_2:\n",
        line(12, "STG.E [R2.64], R1"),
        line(13, "EXIT"),
        ".L_x_4:\n",
        line(14, "BRA `(.L_x_4)"),
    ]
)


def test_instructions_come_with_what_the_compiler_scheduled():
    code = sass.parse(LISTING)
    assert len(code.instructions) == 15
    assert code.instructions[0] == Instruction(
        "LDG.E.128", "R4, desc[UR6][R2.64]", stall=4, written=0
    )
    assert code.instructions[1].predicate == "!P0"
    assert code.instructions[5].waits == (0, 3)
    assert (code.instructions[10].written, code.instructions[10].read) == (2, 5)
    assert code.labels == {".L_x_0": 2, ".L_x_1": 4, ".L_x_3": 9, ".L_x_2": 12, ".L_x_4": 14}
    assert [x.target for x in code.instructions[10:12]] == [None, ".L_x_1"]


def test_the_main_loop_is_the_one_with_products():
    code = sass.parse(LISTING)
    assert code.main_loop() == range(4, 12)
    # Without matrix instructions FFMA is what multiplies.
    scalar = sass.parse(LISTING.replace("FMUL", "FFMA").replace("HGMMA", "HFMA2"))
    assert scalar.main_loop() == range(2, 4)
    assert sass.parse(LISTING.replace("HGMMA", "HFMA2")).main_loop() == range(0)


def test_of_nested_loops_the_innermost_with_all_products_is_taken():
    outer = LISTING.replace(line(13, "EXIT"), line(13, "BRA `(.L_x_0)"))
    assert sass.parse(outer).instructions[13].target == ".L_x_0"
    assert sass.parse(outer).main_loop() == range(4, 12)


def test_a_path_leaves_out_what_is_always_jumped_over():
    code = sass.parse(LISTING)
    assert [x.name for x in code.path(code.main_loop())] == [
        *("WARPGROUP", "HGMMA", "EXIT", "BRA", "WARPGROUP", "MUFU", "BRA")
    ]
    assert [x.name for x in code.path(range(12, 15))] == ["STG", "EXIT"]


def test_counts_are_those_of_the_loop():
    code = sass.parse(LISTING)
    found = sass.counts(code.path(code.main_loop()))
    others = dict.fromkeys(sass.COUNTED, 0)
    assert found == {
        "instructions": 7,
        **{**others, "products": 1, "product_waits": 1, "exponentials": 1},
    }


@pytest.mark.parametrize(
    ("opcode", "kinds"),
    [
        ("HMMA.16816.F32.BF16", {"products"}),
        ("UTCHMMA", {"products"}),
        ("WARPGROUP.ARRIVE", set()),
        ("MUFU.RCP", {"reciprocals"}),
        ("F2FP.BF16.F32.PACK_AB", {"conversions"}),
        ("LDSM.16.M88.4", {"shared_loads"}),
        ("STS.128", {"shared_stores"}),
        ("LDGSTS.E.BYPASS.128", {"async_copies"}),
        ("LDGDEPBAR", set()),
        ("BAR.SYNC.DEFER_BLOCKING", {"barriers"}),
    ],
)
def test_each_kind_counts_its_instructions(opcode, kinds):
    found = sass.counts([Instruction(opcode)])
    assert {name for name in sass.COUNTED if found[name]} == kinds


def test_what_is_no_disassembly_is_refused():
    with pytest.raises(
        ValueError, match=r"expected a disassembly by nvdisasm -c -hex, got 'nothing'"
    ):
        sass.parse("nothing")
